"""What the network of a run sees in image files: `python evaluate.py runs/mine --predict cat.png`.

In: images of any size, mode and format that Pillow reads, or folders of them; each is brought to the network as evaluation
does it. Out: the five likeliest classes as lines for people, or CSV for a folder:

    path,class,probability,class_2,probability_2, ... class_5,probability_5

A file that cannot be read is named, and the others go on. No dataset is needed.
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
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as tv

from common.errors import RunError
from common.files import write_atomically
from common.progress import progress
from image_data.preparation.decoding import available_cores, decode_image
from image_data.preparation.image_tree import IMAGE_SUFFIXES
from inference.trained_model import TrainedModel

SHOWN = 5  # classes an image
ENDINGS = IMAGE_SUFFIXES | {
    ".gif",
    ".avif",
    ".tga",
    ".ico",
}  # what is an image in a folder; a file named by itself may end as it likes

Predictions = list[tuple[str, float]]  # class and probability, the likeliest first


def predict(
    trained: TrainedModel, network: nn.Module, names: list[Path], batch_size: int, autocast: bool, output: Path | None
) -> int:
    """Show the likeliest classes of the images in `names` (files and folders). Returns how many could not be read."""
    paths = find_images(names)
    as_table = output is not None or any(name.is_dir() for name in names)
    rows, unread = [], 0
    for path, found in (
        progress(guesses(trained, network, paths, batch_size, autocast), len(paths), "images")
        if as_table
        else guesses(trained, network, paths, batch_size, autocast)
    ):
        if isinstance(found, str):
            unread += 1
            print(f"error: {path} cannot be read ({found}); it is left out", file=sys.stderr)
        elif as_table:
            rows.append((path, found))
        else:
            print(path, *(f"  {100 * probability:6.2f}%  {name}" for name, probability in found), sep="\n", flush=True)
    if as_table:
        text = table(rows, min(SHOWN, len(trained.classes)))
        if output is None:
            print(text, end="")
        else:
            write_atomically(output, text)
            print(f"wrote {output}: {len(rows)} images" + (f", {unread} could not be read" if unread else ""))
    return unread


def guesses(
    trained: TrainedModel, network: nn.Module, paths: list[Path], batch_size: int, autocast: bool
) -> Iterator[tuple[Path, Predictions | str]]:
    """For each path, in order, the likeliest classes; or why it cannot be read."""
    first = next(network.parameters())

    def denormalize(path: Path) -> np.ndarray | str:
        try:
            return fit(read_image(path), trained)
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
            return why(error)

    with ThreadPoolExecutor(available_cores()) as pool, torch.inference_mode():
        remaining = iter(paths)
        while batch := list(islice(remaining, batch_size)):
            pixels = dict(zip(batch, pool.map(denormalize, batch), strict=True))
            whole = [image for image in pixels.values() if not isinstance(image, str)]
            likeliest: Iterator[Predictions] = iter(())
            if whole:
                images = trained.normalise(torch.from_numpy(np.stack(whole)).to(first.device)).to(first.dtype)
                with torch.autocast(first.device.type, torch.bfloat16, enabled=autocast):
                    likeliest = iter(top(network(images).float(), trained.classes))
            for path, image in pixels.items():
                yield path, image if isinstance(image, str) else next(likeliest)


def top(scores: torch.Tensor, classes: list[str]) -> list[Predictions]:
    """The likeliest classes of each row of scores (B, K)."""
    values, labels = scores.softmax(1).topk(min(SHOWN, len(classes)))
    return [
        [(classes[label], value) for label, value in zip(*row, strict=True)]
        for row in zip(labels.tolist(), values.tolist(), strict=True)
    ]


def fit(pixels: np.ndarray, trained: TrainedModel) -> np.ndarray:
    """An image uint8 (height, width, 3) as evaluation shows it to the network: (S, S, 3)."""
    if min(pixels.shape[:2]) == trained.resize_side == trained.side and pixels.shape[0] == pixels.shape[1]:
        return pixels
    image = torch.tensor(pixels).permute(2, 0, 1)
    image = tv.center_crop(tv.resize(image, [trained.resize_side], antialias=True), [trained.side, trained.side])
    return image.permute(1, 2, 0).contiguous().numpy()


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of any image that Pillow reads, uint8 (height, width, 3). Raises what Pillow raises."""
    return decode_image(Path(path), formats=None)[0]


def why(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


def find_images(names: list[Path]) -> list[Path]:
    """The files among `names`, and the images of the folders among them, by their endings, sorted. Raises RunError where none is left."""
    found: dict[Path, None] = {}  # each once, in order
    for name in names:
        inside = (
            sorted(path for path in name.rglob("[!.]*") if path.suffix.lower() in ENDINGS and path.is_file())
            if name.is_dir()
            else [name]
        )
        if not inside:
            raise RunError(f"{name} holds no images")
        found |= dict.fromkeys(inside)
    return list(found)


def table(rows: list[tuple[Path, Predictions]], shown: int) -> str:
    """Predictions as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "path",
            "class",
            "probability",
            *(f"{what}_{i}" for i in range(2, shown + 1) for what in ("class", "probability")),
        ]
    )
    for path, found in rows:
        writer.writerow([path, *(value for name, probability in found for value in (name, f"{probability:.6f}"))])
    return text.getvalue()
