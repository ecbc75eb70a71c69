"""Readers: the images of a batch by position, from packed arrays or from image files."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import DatasetError
from image_data.dataset import prepare_again
from image_data.image_file import as_dali_input, decode_image, reason, upright_size

UNKNOWN, AS_STORED, AS_PNG = range(3)  # the form in which DALI gets a file


class PackedReader:
    """Reads the `rows` of packed pixels, uint8 (N, S, S, 3), which stay in GPU memory if the device is a GPU."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device):
        self.rows = rows
        self.pixels: Tensor | np.ndarray = pixels  # memory-mapped, so that the processes of a host share one copy
        if device.type == "cuda":
            self.rows, self.pixels = np.arange(len(rows)), torch.from_numpy(pixels[rows]).to(device)

    def read(self, positions: np.ndarray) -> Tensor | np.ndarray:
        """Return the images at `positions` of the split: uint8 (B, S, S, 3)."""
        rows = self.rows[positions]
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(rows).to(self.pixels.device, non_blocking=True)]
        return self.pixels[rows]

    def raise_for_unreadable(self, positions: np.ndarray) -> None:
        """Do nothing: packed pixels were checked when they were written, and there is no file to name."""


class PaddedPackedReader(PackedReader):
    """Reads the `rows` of packed pixels, padded by `padding` black pixels on each side; a random crop is one gather."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device, padding: int):
        N, (S, _, C) = len(rows), pixels.shape[1:]
        self.padding = padding
        self.windows: Tensor | np.ndarray
        padded = np.zeros((N, C, S + 2 * padding, S + 2 * padding), dtype=np.uint8)
        images = padded[:, :, padding : padding + S, padding : padding + S]
        for i, row in enumerate(rows):  # not pixels[rows], which would need the memory twice
            images[i] = pixels[row].transpose(2, 0, 1)
        if device.type == "cuda":
            on_device = torch.from_numpy(padded).to(device)
            self.windows = on_device.unfold(2, S, 1).unfold(3, S, 1)  # a view: (N, C, 2p+1, 2p+1, S, S)
        else:
            self.windows = np.lib.stride_tricks.sliding_window_view(padded, (S, S), axis=(2, 3))

    def read_crops(self, positions: np.ndarray, corner: np.ndarray | None) -> Tensor:
        """Return crops of the images at `positions`: uint8 (B, 3, S, S).

        `corner` is the upper left corner (y, x) of each crop, (B, 2), relative to the unpadded image; None: no crop.
        """
        if corner is None:
            corner = np.zeros((1, 2), dtype=np.int64)
        at = positions, *(corner.astype(np.int64) + self.padding).T
        if isinstance(self.windows, Tensor):
            device = self.windows.device
            rows, y, x = (torch.from_numpy(np.ascontiguousarray(a)).to(device, non_blocking=True) for a in at)
            return self.windows[rows, :, y, x]
        return torch.from_numpy(self.windows[at[0], :, at[1], at[2]])


class FileReader:
    """Reads encoded files with a few threads, in a form that DALI decodes to Pillow's pixels (see `image_file`).

    Args:
        dataset_folder: the prepared dataset that lists the files, for messages.
    """

    def __init__(self, paths: list[Path], num_threads: int, dataset_folder: Path):
        self.paths, self.dataset_folder = paths, dataset_folder
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="files")
        # Learned at the first read of each file: reading headers in every epoch would cost more than it saves.
        self._form = np.zeros(len(paths), dtype=np.int8)
        self._sizes = np.zeros((len(paths), 2), dtype=np.int64)

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """Return files at `positions` as uint8 arrays of bytes. Raises DatasetError, which names an unreadable file."""
        return list(self._pool.map(self._read_one, positions))

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Return height and width of the decoded images at `positions`: int64 (B, 2)."""
        return np.array(list(self._pool.map(self._size_of, positions)))

    def raise_for_unreadable(self, positions: np.ndarray) -> None:
        """Find a file that Pillow cannot decode; DALI's message does not always name it. Raises DatasetError."""
        for position in positions:
            with self._naming(position):
                decode_image(self.paths[position], max_megapixels=None)

    def _read_one(self, position: int) -> np.ndarray:
        with self._naming(position):
            encoded = np.fromfile(self.paths[position], dtype=np.uint8)
            if not encoded.size:
                raise ValueError("empty file")
            if self._form[position] != AS_STORED:
                png = as_dali_input(encoded.tobytes())
                self._form[position] = AS_STORED if png is None else AS_PNG
                encoded = encoded if png is None else np.frombuffer(png, dtype=np.uint8)
            return encoded

    def _size_of(self, position: int) -> np.ndarray:
        if not self._sizes[position].any():
            with self._naming(position):
                self._sizes[position] = upright_size(self.paths[position])
        return self._sizes[position]

    @contextmanager
    def _naming(self, position: int) -> Iterator[None]:
        """Turn any failure to read or decode a file into a DatasetError that names it."""
        try:
            yield
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and others
            raise DatasetError(
                f"{self.paths[position]} cannot be read ({reason(error)}). "
                f"Restore the file, or run: {prepare_again(self.dataset_folder)}"
            ) from None
