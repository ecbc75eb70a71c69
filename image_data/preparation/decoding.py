"""Image files -> exact facts about their pixels, and the packed arrays; in parallel, with the same result for any number of workers.

    with decoder(workers=2) as decode:
        facts = decode_split(decode, root, paths, side=32, packed=Path("train.npy"))

In: paths relative to a root. Out: a SplitFacts (sizes, digests, histogram, what was converted, what was broken); when `packed` is
given, also the uint8 array (N, side, side, 3) of the images that decoded, in the order of `paths`.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from common.progress import progress
from image_data.preparation.image_tree import PrepareError

CHUNK = 128  # images a task: small enough for a smooth bar, large enough to hide the cost of sending it
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000")
KINDS = {
    "1": "greyscale",
    "L": "greyscale",
    "LA": "grey with alpha",
    "La": "grey with alpha",
    "P": "palette",
    "PA": "palette",
}
EXIF_ORIENTATION = 0x0112


@dataclass
class SplitFacts:
    """What decoding found. `sizes`, `digests` and `kept` have one entry for each image that decoded, in the order of the paths."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height)
    digests: list[bytes] = field(default_factory=list)  # SHA-256 of size and pixels
    kept: list[int] = field(default_factory=list)  # positions in the list of paths
    broken: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    kinds: Counter = field(default_factory=Counter)  # RGB, RGBA, 16-bit, ...
    formats: Counter = field(default_factory=Counter)  # PNG, JPEG, ... by content, not by name
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    pixels: bytes = b""  # of one chunk, on its way to the packed file

    def add(self, other: SplitFacts) -> None:
        """Append the facts of the chunk that follows."""
        for name in ("sizes", "digests", "kept", "broken"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds += other.kinds
        self.formats += other.formats
        self.histogram += other.histogram


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def decoder(workers: int) -> Iterator[Callable]:
    """A function like `map` that runs in `workers` processes and keeps the order."""
    if workers == 1:
        yield map
        return
    # Forking is quick and does not import the caller's script again; the children use nothing but Pillow and NumPy.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),)) as pool:
        try:
            yield pool.map
        except BrokenProcessPool:
            raise PrepareError(
                "a decoding process was killed (out of memory?); try again with a smaller --workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def decode_split(
    decode: Callable, root: Path, paths: list[str], side: int | None, packed: Path | None, what: str
) -> SplitFacts:
    """Decode every image. Packing stops, and the file goes, at the first image that is not `side` x `side`."""
    facts = SplitFacts()
    chunks = [(start, paths[start : start + CHUNK]) for start in range(0, len(paths), CHUNK)]
    results = decode(partial(_decode_chunk, str(root), side if packed else None), chunks)
    file = open(packed, "wb") if packed else None
    try:
        if file:
            file.write(_npy_header(0, side))
        for part in progress(results, len(paths), what, weigh=lambda part: len(part.kept) + len(part.broken)):
            facts.add(part)
            if file and set(part.sizes) - {(side, side)}:
                file.close()
                packed.unlink()
                file = None
            elif file:
                file.write(part.pixels)
        if file:
            file.seek(0)
            file.write(_npy_header(len(facts.kept), side))
    finally:
        if file:
            file.close()
    return facts


def first_side(root: Path, paths: list[str]) -> int | None:
    """The side of the first image that can be decoded; None when it is not square."""
    for path in paths:
        try:
            height, width, _ = decode_image(root / path)[0].shape
            return width if width == height else None
        except Exception:  # it will be reported as broken when it is decoded
            continue
    return None


def decode_image(path: Path, formats: tuple[str, ...] | None = FORMATS) -> tuple[np.ndarray, str, str]:
    """Pixels (height, width, 3) uint8, kind and format of an image file; raises when any part of it cannot be decoded.

    `formats` None: any that Pillow knows.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=formats) as image:
        is_16_bit = any(
            ";16" in str(tile[3]) for tile in image.tile
        )  # known only before loading: Pillow then has 8-bit RGB
        image.load()
        kind, name = "16-bit" if is_16_bit else KINDS.get(image.mode, image.mode), image.format
        if name != "PNG" and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if is_16_bit and image.mode.startswith("I"):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2), kind, name
        if image.mode in ("I", "F"):
            raise ValueError("32 bits per channel")
        if image.mode == "P":
            image = image.convert(
                "RGBA"
            )  # a palette may carry transparency, which Pillow drops only this way in silence
        return np.asarray(image if image.mode == "RGB" else image.convert("RGB")), kind, name


def mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Per channel, in 0..1 units, from counts (3, 256): sums of Python integers, so the last digit is the same everywhere."""
    mean, std = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(round(total / (255 * n), 6))
        std.append(round(math.sqrt((n * squares - total * total) / (255 * n) ** 2), 6))
    return mean, std


def _start_worker(parent: int) -> None:
    """Ctrl-C is the parent's business; a parent that was killed outright must not leave its workers waiting for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _decode_chunk(root: str, side: int | None, chunk: tuple[int, list[str]]) -> SplitFacts:
    start, paths = chunk
    facts, arrays = SplitFacts(), []
    for position, path in enumerate(paths, start):
        try:
            pixels, kind, name = decode_image(Path(root, path))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... on damaged files
            facts.broken.append((path, _reason(error)))
            continue
        height, width, _ = pixels.shape
        raw = pixels.tobytes()
        facts.sizes.append((width, height))
        facts.digests.append(hashlib.sha256(b"%dx%d:" % (width, height) + raw).digest())
        facts.kept.append(position)
        facts.kinds[kind] += 1
        facts.formats[name] += 1
        for channel in range(3):
            facts.histogram[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
        if side is not None:
            arrays.append(raw)
    facts.pixels = b"".join(arrays)
    return facts


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _npy_header(count: int, side: int) -> bytes:
    """The first 128 bytes of a .npy file (format 1.0), written by hand so that its length never depends on NumPy's version."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {side}, {side}, 3), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"
