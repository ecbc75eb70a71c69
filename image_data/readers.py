"""Read the images of a batch by position: packed pixels in memory, or the files of the tree."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import DatasetError

EXIF_ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # values for which decoders turn an image by 90 degrees


class PackedReader:
    """Packed pixels, uint8 (N, S, S, 3); on a GPU they live there and are gathered there."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device):
        self.rows = rows
        # On a CPU they stay memory-mapped: several processes of a host share one copy.
        self.pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(device) if device.type == "cuda" else pixels

    def read(self, positions: np.ndarray) -> Tensor | np.ndarray:
        """The images at `positions` of the split: (B, S, S, 3)."""
        rows = self.rows[positions]
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(rows).to(self.pixels.device, non_blocking=True)]
        return self.pixels[rows]

    def raise_for_unreadable(self, positions: np.ndarray) -> None:
        """Packed pixels were checked when they were written: there is no file to name."""


class PaddedPackedReader(PackedReader):
    """Packed pixels with channels first and `padding` black pixels on each side: a random crop is one gather."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device, padding: int):
        N, S, _, C = pixels.shape
        self.rows, self.padding = rows, padding
        padded = np.zeros((N, C, S + 2 * padding, S + 2 * padding), dtype=np.uint8)
        padded[:, :, padding : padding + S, padding : padding + S] = pixels.transpose(0, 3, 1, 2)
        if device.type == "cuda":
            self.windows = (
                torch.from_numpy(padded).to(device).unfold(2, S, 1).unfold(3, S, 1)
            )  # (N, C, 2p+1, 2p+1, S, S), a view
        else:
            self.windows = np.lib.stride_tricks.sliding_window_view(padded, (S, S), axis=(2, 3))

    def read_crops(self, positions: np.ndarray, corner: np.ndarray | None) -> Tensor:
        """The images at `positions` of the split, cut at `corner` (y, x; 0 is the image's own): uint8 (B, 3, S, S)."""
        if corner is None:
            corner = np.zeros((1, 2), dtype=np.int64)
        at = self.rows[positions], *(corner.astype(np.int64) + self.padding).T
        if isinstance(self.windows, Tensor):
            rows, y, x = (
                torch.from_numpy(np.ascontiguousarray(a)).to(self.windows.device, non_blocking=True) for a in at
            )
            return self.windows[rows, :, y, x]
        return torch.from_numpy(self.windows[at[0], :, at[1], at[2]])


class FileReader:
    """Encoded files, read by a few threads; who decodes them is not our business."""

    def __init__(self, paths: list[Path], num_threads: int):
        self.paths = paths
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="files")

    def read(self, positions: np.ndarray) -> list[np.ndarray]:
        """The bytes of the files at `positions`: uint8 arrays. Raises DatasetError naming a file that cannot be read."""
        return list(self._pool.map(self._read_one, positions))

    def _read_one(self, position: int) -> np.ndarray:
        path = self.paths[position]
        try:
            encoded = np.fromfile(path, dtype=np.uint8)
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be read ({error.strerror}); restore it, or run prepare_dataset.py --force"
            ) from None
        if not encoded.size:
            raise DatasetError(f"{path} is empty; restore it, or run prepare_dataset.py --force")
        return encoded

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Height and width of the images at `positions` as they are decoded, from their headers: int64 (B, 2)."""
        return np.array(list(self._pool.map(self._size_of, positions)))

    def _size_of(self, position: int) -> tuple[int, int]:
        from PIL import Image

        try:
            with Image.open(self.paths[position]) as image:
                width, height = image.size
                return (width, height) if image.getexif().get(EXIF_ORIENTATION, 1) in SIDEWAYS else (height, width)
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(
                f"{self.paths[position]} is broken ({error}); restore it, or run prepare_dataset.py --force"
            ) from None

    def raise_for_unreadable(self, positions: np.ndarray) -> None:
        """Find the file that could not be decoded, which DALI's message does not always name. Raises DatasetError."""
        from PIL import Image

        for position in positions:
            try:
                with Image.open(self.paths[position]) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise DatasetError(
                    f"{self.paths[position]} is broken ({error}); restore it, or run prepare_dataset.py --force"
                ) from None
