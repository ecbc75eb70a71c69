"""Where the images of a batch come from: packed pixels in memory, or the files of the tree."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset import DatasetError


class Resident:
    """Packed pixels, uint8 (N, S, S, 3) or channels first; on a GPU they live there and are gathered there."""

    def __init__(self, pixels: np.ndarray, rows: np.ndarray, device: torch.device, channels_first: bool):
        self.rows = rows
        if device.type == "cuda" or channels_first:
            pixels = pixels.transpose(0, 3, 1, 2) if channels_first else pixels
            self.pixels: Tensor | np.ndarray = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
        else:
            self.pixels = pixels  # memory-mapped: several processes of a host share one copy

    def read(self, positions: np.ndarray) -> Tensor | np.ndarray:
        """The images at `positions` of the split, in one array (B, ...)."""
        rows = self.rows[positions]
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(rows).to(self.pixels.device, non_blocking=True)]
        return self.pixels[rows]

    def blame(self, positions: np.ndarray) -> None:
        """Packed pixels were checked when they were written: there is no file to name."""


class Files:
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
            raise DatasetError(f"{path} cannot be read ({error.strerror}); restore it, or run prepare_dataset.py --force") from None
        if not encoded.size:
            raise DatasetError(f"{path} is empty; restore it, or run prepare_dataset.py --force")
        return encoded

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Height and width of the images at `positions`, from their headers: int64 (B, 2)."""
        return np.array(list(self._pool.map(self._size_of, positions)))

    def _size_of(self, position: int) -> tuple[int, int]:
        from PIL import Image

        try:
            with Image.open(self.paths[position]) as image:
                width, height = image.size
                return height, width
        except (OSError, SyntaxError, ValueError) as error:
            raise DatasetError(f"{self.paths[position]} is broken ({error}); restore it, or run prepare_dataset.py --force") from None

    def blame(self, positions: np.ndarray) -> None:
        """Find the file that could not be decoded, which DALI's message does not always name. Raises DatasetError."""
        from PIL import Image

        for position in positions:
            try:
                with Image.open(self.paths[position]) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                raise DatasetError(f"{self.paths[position]} is broken ({error}); restore it, or run prepare_dataset.py --force") from None
