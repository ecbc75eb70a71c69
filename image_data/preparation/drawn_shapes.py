"""The dataset `shapes`: ten drawn shapes as a class tree of PNG files, for first steps and tests without a download.

    python prepare_dataset.py --dataset shapes

It writes `<target>/{train,test}/<shape>/<shape>_0001.png` and so on. Position, size, angle and colors vary, and noise
is added. All arithmetic uses integers, and all randomness is the raw output of PCG64. The pixels are therefore the
same on every machine.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.progress import progress

R = 256  # each shape fits into a circle of this radius around the origin; u points right, v down
FINE = 3  # samples per pixel and axis, for antialiased edges


def _beyond(u: np.ndarray, v: np.ndarray, degrees: int) -> np.ndarray:
    """Return the coordinate of points along a direction (0 degrees is up)."""
    cos, sin = _cos_sin(degrees)
    return (u * sin - v * cos) >> 12


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A point lies in the star if it is on the inner side of at least four of the five lines through the tips.
    return np.sum([_beyond(u, v, 180 + 72 * k) <= 79 for k in range(5)], axis=0) >= 4  # 79 = 256 cos 72 degrees


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = u * 5 // 4, -v * 5 // 4 + 32
    return (x * x + y * y - R * R) ** 3 <= x * x * y**3 * R


SHAPES = {
    "bars": lambda u, v: (abs(u) <= 190) & (abs(v) <= 160) & (abs(v) >= 60),
    "circle": lambda u, v: u * u + v * v <= 225 * 225,
    "crescent": lambda u, v: (u * u + v * v <= R * R) & ((u - 120) ** 2 + v * v > 215 * 215),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) <= 70) & (np.maximum(abs(u), abs(v)) <= 240),
    "half": lambda u, v: (u * u + (v + 100) ** 2 <= 240 * 240) & (v >= -100),
    "heart": _heart,
    "ring": lambda u, v: (u * u + v * v <= 240 * 240) & (u * u + v * v >= 140 * 140),
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 180,
    "star": _star,
    "triangle": lambda u, v: np.maximum.reduce([_beyond(u, v, 60 + 120 * k) for k in range(3)]) <= R // 2,
}


def draw_shapes(target: Path, side: int = 32, train_per_class: int = 500, test_per_class: int = 100) -> None:
    """Write the tree. Image i of a class does not depend on the number of images.

    Raises:
        ValueError: `side` is below 16, or a number of images below 1.
    """
    if side < 16 or min(train_per_class, test_per_class) < 1:
        raise ValueError("shapes need a side of at least 16 and at least one image per class and split")
    jobs = [
        (split, name, index)
        for split, count in (("train", train_per_class), ("test", test_per_class))
        for name in SHAPES
        for index in range(count)
    ]
    for split, name, index in progress(jobs, len(jobs), "drawing shapes"):
        file = target / split / name / f"{name}_{index + 1:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw(name, side, [("train", "test").index(split), list(SHAPES).index(name), index])).save(file)


def draw(name: str, side: int, seed: list[int]) -> np.ndarray:
    """Draw one image of the shape `name`: uint8 (side, side, 3)."""
    bits = np.random.PCG64(seed)

    def pick(low: int, high: int, count: int | None = None) -> Any:
        return (
            (bits.random_raw(count) % np.uint64(high - low + 1)).astype(np.int64) + low
            if count
            else int(pick(low, high, 1)[0])
        )

    radius = pick(side * 22, side * 40) * FINE // 100  # in samples, like all lengths down to `coverage`
    margin = radius + FINE
    x, y = pick(margin, side * FINE - margin), pick(margin, side * FINE - margin)
    rows, columns = np.mgrid[: side * FINE, : side * FINE].astype(np.int64)
    columns, rows = (2 * (columns - x) + 1) * R // (2 * radius), (2 * (rows - y) + 1) * R // (2 * radius)
    cos, sin = _cos_sin(pick(0, 359))
    inside = SHAPES[name]((columns * cos + rows * sin) >> 12, (rows * cos - columns * sin) >> 12)
    coverage = inside.reshape(side, FINE, side, FINE).sum(axis=(1, 3))[..., None]  # 0 .. FINE * FINE

    dark, light = pick(0, 110, 3), pick(130, 255, 3)
    front, back = (light, dark) if pick(0, 1) else (dark, light)
    drift = pick(-40, 40, 6).reshape(2, 3)  # change of the background across and down
    ramp = np.arange(side, dtype=np.int64)[:, None]
    ground = back + (ramp * drift[0] // side)[:, None] + (ramp * drift[1] // side)[None]
    noise = pick(-12, 12, 2 * side * side * 3).reshape(2, side, side, 3).sum(axis=0)
    pixels = (ground * (FINE * FINE - coverage) + front * coverage) // (FINE * FINE) + noise
    return pixels.clip(0, 255).astype(np.uint8)


def _cos_sin(degrees: int) -> tuple[int, int]:
    """Return cosine and sine in units of 1/4096; rounding hides differences between math libraries."""
    return round(4096 * math.cos(math.radians(degrees))), round(4096 * math.sin(math.radians(degrees)))
