"""Predictions for image files: `python evaluate.py runs/mine --predict cat.png`.

The input is images of any size, mode and format that Pillow reads, or folders of images. They are preprocessed as in
evaluation. The output is the five most probable classes: as text, or as CSV for folders and with --output:

    path,class,probability,class_2,probability_2, ... class_5,probability_5

A file that cannot be read is reported and skipped. No dataset is needed.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.transforms.v2 import functional as tv

from common.display import escaped
from common.errors import RunError
from common.files import write_atomically
from common.progress import progress
from image_data.image_file import decode_image, reason
from image_data.preparation.decoding import available_cores
from image_data.preparation.image_tree import walk_images
from inference.trained_model import TrainedModel

TOP_CLASSES = 5  # per image
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet takes such a cell for a formula

Predictions = list[tuple[str, float]]  # class and probability, most probable first


def predict(
    trained: TrainedModel, network: nn.Module, names: list[Path], batch_size: int, autocast: bool, output: Path | None
) -> int:
    """Print the most probable classes of images, or write them as CSV.

    Args:
        names: files and folders.
        output: CSV file to write; None prints.

    Returns:
        The number of files that could not be read.

    Raises:
        RunError: there are no images, or `output` cannot be written.
    """
    paths = find_images(names)
    as_table = output is not None or any(name.is_dir() for name in names)
    results = predictions(trained, network, paths, batch_size, autocast)
    rows, num_unreadable = [], 0
    for path, found in progress(results, len(paths), "images") if as_table else results:
        if isinstance(found, str):
            num_unreadable += 1
            print(f"error: {escaped(path)} cannot be read ({found}); skipped", file=sys.stderr)
        elif as_table:
            rows.append((path, found))
        else:
            lines = (f"  {100 * probability:6.2f}%  {escaped(name)}" for name, probability in found)
            print(for_screen("\n".join([escaped(path), *lines])), flush=True)
    if as_table:
        text = table(rows, min(TOP_CLASSES, len(trained.classes)))
        if output is None:
            print(for_screen(text), end="")
        else:
            write_atomically(output, text)
            skipped = f", {num_unreadable} could not be read" if num_unreadable else ""
            print(for_screen(f"wrote {escaped(output)}: {len(rows)} images{skipped}"))
    return num_unreadable


def predictions(
    trained: TrainedModel, network: nn.Module, paths: list[Path], batch_size: int, autocast: bool
) -> Iterator[tuple[Path, Predictions | str]]:
    """Yield each path, in order, with its most probable classes, or with the reason why it cannot be read."""
    first = next(network.parameters())

    def load(path: Path) -> np.ndarray | str:
        try:
            return fit(read_image(path), trained)
        except Exception as error:  # see `decode_image`
            return reason(error)

    with ThreadPoolExecutor(available_cores()) as pool, torch.inference_mode():
        remaining = iter(paths)
        while batch := list(islice(remaining, batch_size)):
            pixels = dict(zip(batch, pool.map(load, batch), strict=True))
            decoded = [image for image in pixels.values() if not isinstance(image, str)]
            found: Iterator[Predictions] = iter(())
            if decoded:
                images = trained.normalize(torch.from_numpy(np.stack(decoded)).to(first.device)).to(first.dtype)
                with torch.autocast(first.device.type, torch.bfloat16, enabled=autocast):
                    found = iter(top(network(images).float(), trained.classes))
            for path, image in pixels.items():
                yield path, image if isinstance(image, str) else next(found)


def top(scores: torch.Tensor, classes: list[str]) -> list[Predictions]:
    """Return the most probable classes of each row of scores (B, K)."""
    values, labels = scores.softmax(1).topk(min(TOP_CLASSES, len(classes)))
    return [
        [(classes[label], value) for label, value in zip(*row, strict=True)]
        for row in zip(labels.tolist(), values.tolist(), strict=True)
    ]


def fit(pixels: np.ndarray, trained: TrainedModel) -> np.ndarray:
    """Resize and crop an image, uint8 (height, width, 3), as evaluation does: uint8 (S, S, 3)."""
    if min(pixels.shape[:2]) == trained.resize_side == trained.side and pixels.shape[0] == pixels.shape[1]:
        return pixels
    image = torch.tensor(pixels).permute(2, 0, 1)
    image = tv.center_crop(tv.resize(image, [trained.resize_side], antialias=True), [trained.side, trained.side])
    return image.permute(1, 2, 0).contiguous().numpy()


def read_image(path: str | Path) -> np.ndarray:
    """Return the pixels of any image that Pillow reads: uint8 (height, width, 3). Raises what `decode_image` raises."""
    return decode_image(Path(path), formats=None, max_megapixels=None)[0]


def find_images(names: list[Path]) -> list[Path]:
    """Return the files among `names`, and the images in the folders among them, sorted, each once.

    Raises:
        RunError: a folder holds no images.
        PrepareError: a folder cannot be listed.
    """
    found: dict[Path, None] = {}
    for name in names:
        inside = [name]
        if name.is_dir():
            inside = sorted(name / folder.path / image for folder in walk_images(name) for image in folder.images)
        if not inside:
            raise RunError(f"{name} holds no images")
        found |= dict.fromkeys(inside)
    return list(found)


def for_screen(text: str) -> str:
    """Escape what the encoding of the screen does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _cell(text: str | Path) -> str:
    """Return a CSV cell that a spreadsheet does not run as a formula: a leading apostrophe marks it as text."""
    text = escaped(text)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def table(rows: list[tuple[Path, Predictions]], shown: int) -> str:
    """Format predictions as CSV with `shown` classes per image."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    more = [f"{what}_{i}" for i in range(2, shown + 1) for what in ("class", "probability")]
    writer.writerow(["path", "class", "probability", *more])
    for path, found in rows:
        cells = [value for name, probability in found for value in (_cell(name), f"{probability:.6f}")]
        writer.writerow([_cell(path), *cells])
    return text.getvalue()
