"""Automatic augmentation policies (RandAugment, TrivialAugment, AutoAugment) and color jitter as tables of operations.

Operation spaces, bins and the CIFAR policy are those of torchvision 0.26 (`transforms/v2/_auto_augment.py`), which
follows the papers. An `OperationBatch` holds one operation per image: its kind, a magnitude, and a matrix for geometric
kinds. Several operations share a kind: every geometric operation is a warp, and inverting is solarizing from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Kinds of operations, implemented in `image_data/dali_backend.py` and `image_data/torch_backend.py`.
IDENTITY, WARP, BRIGHTNESS, COLOR, CONTRAST, SHARPNESS, POSTERIZE, SOLARIZE, AUTOCONTRAST, EQUALIZE = range(10)


@dataclass(frozen=True)
class OperationBatch:
    """One operation for each of B images.

    `magnitude` is a blending factor for BRIGHTNESS, COLOR, CONTRAST and SHARPNESS (1 is the identity), the number of
    bits kept for POSTERIZE, and the lowest inverted value, 0..256, for SOLARIZE. `matrix` (WARP) maps a point (x, y)
    of the output to a point of the input, in pixels from the upper left corner of the image.
    """

    kind: np.ndarray  # int32 (B,)
    magnitude: np.ndarray  # float32 (B,)
    matrix: np.ndarray  # float32 (B, 2, 3)


def shear_x(m: float, side: int) -> np.ndarray:
    return np.array([[1, m, 0], [0, 1, 0]])


def shear_y(m: float, side: int) -> np.ndarray:
    return np.array([[1, 0, 0], [m, 1, 0]])


def translate_x(m: float, side: int) -> np.ndarray:
    return np.array([[1, 0, -np.trunc(m)], [0, 1, 0]])


def translate_y(m: float, side: int) -> np.ndarray:
    return np.array([[1, 0, 0], [0, 1, -np.trunc(m)]])


def rotate(m: float, side: int) -> np.ndarray:
    """Rotate counterclockwise by `m` degrees around the center."""
    cos, sin, center = np.cos(np.radians(m)), np.sin(np.radians(m)), side / 2
    linear = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([linear, (center - linear @ [center, center])[:, None]], axis=1)


WARPS = {"ShearX": shear_x, "ShearY": shear_y, "TranslateX": translate_x, "TranslateY": translate_y, "Rotate": rotate}
BLENDS = {"Brightness": BRIGHTNESS, "Color": COLOR, "Contrast": CONTRAST, "Sharpness": SHARPNESS}


def linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Reproduce `torch.linspace` bit for bit.

    Translations are truncated to whole pixels, so 15.999999 and 16 give different images.
    """
    start, stop = float(np.float32(start)), float(np.float32(stop))  # as PyTorch rounds both ends before it starts
    step = float(np.float32(stop - start) / np.float32(count - 1))
    index = np.arange(count)
    # In float64, so that each value is rounded only once, as by a fused multiply-add.
    values = np.where(index < count // 2, start + step * index, stop - step * (count - 1 - index))
    return values.astype(np.float32).astype(np.float64)


class OperationSpace:
    """Table of operations, indexed by (name, bin, sign).

    Args:
        names: operations of the space.
        side: side of the images in pixels.
        bins: number of magnitudes of each operation.
        shear, color: largest magnitude of their families.
        translation: largest translation in pixels.
        rotation: largest rotation in degrees.
        posterize: largest number of bits removed.
    """

    def __init__(
        self,
        names: list[str],
        side: int,
        bins: int,
        shear: float,
        translation: float,
        rotation: float,
        color: float,
        posterize: int,
    ):
        self.names, self.bins = names, bins
        top = {
            "ShearX": shear,
            "ShearY": shear,
            "TranslateX": translation,
            "TranslateY": translation,
            "Rotate": rotation,
        }
        # [operation, bin, sign]
        self.kind = np.zeros((len(names), bins, 2), np.int32)
        self.magnitude = np.zeros((len(names), bins, 2), np.float32)
        self.matrix = np.tile(np.array([[1, 0, 0], [0, 1, 0]], np.float32), (len(names), bins, 2, 1, 1))
        for i, name in enumerate(names):
            for j in range(bins):
                for k, sign in enumerate((1, -1)):
                    if name in WARPS:
                        self.kind[i, j, k] = WARP
                        self.matrix[i, j, k] = WARPS[name](sign * linspace(0, top[name], bins)[j], side)
                    elif name in BLENDS:
                        self.kind[i, j, k], self.magnitude[i, j, k] = (
                            BLENDS[name],
                            1 + sign * linspace(0, color, bins)[j],
                        )
            if name == "Posterize":
                self.kind[i], self.magnitude[i] = POSTERIZE, np.round(8 - linspace(0, posterize, bins))[:, None]
            elif name == "Solarize":
                self.kind[i], self.magnitude[i] = SOLARIZE, (255 * linspace(1, 0, bins))[:, None]
            elif name == "Invert":
                self.kind[i], self.magnitude[i] = SOLARIZE, 0
            elif name in ("AutoContrast", "Equalize"):
                self.kind[i] = AUTOCONTRAST if name == "AutoContrast" else EQUALIZE

    def batch(
        self, operation: np.ndarray, bin: np.ndarray, negative: np.ndarray, applied: np.ndarray | None = None
    ) -> OperationBatch:
        """Look up one operation per image; `applied` False selects the identity. All arrays are (B,)."""
        at = operation, bin, negative.astype(np.int64)
        kind = self.kind[at] if applied is None else np.where(applied, self.kind[at], IDENTITY).astype(np.int32)
        return OperationBatch(kind, self.magnitude[at], self.matrix[at])


COMMON = [
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
]


def choose(u: np.ndarray, count: int) -> np.ndarray:
    """Map uniform numbers in [0, 1) to integers 0..count-1."""
    return np.minimum((u * count).astype(np.int64), count - 1)


class RandAugment:
    """RandAugment: `ops` uniformly chosen operations, all of magnitude bin `magnitude` of 31 (arXiv 1909.13719)."""

    def __init__(self, side: int, ops: int, magnitude: int):
        self.space = OperationSpace(
            ["Identity", *COMMON],
            side,
            bins=31,
            shear=0.3,
            translation=150 / 331 * side,
            rotation=30,
            color=0.9,
            posterize=4,
        )
        self.ops, self.magnitude = ops, magnitude
        self.num_draws = 4 * ops  # two of each four are used: streams advance in steps of four

    def operations(self, u: np.ndarray) -> list[OperationBatch]:
        bin = np.full(len(u), self.magnitude)
        return [
            self.space.batch(choose(u[:, 4 * i], len(self.space.names)), bin, u[:, 4 * i + 1] < 0.5)
            for i in range(self.ops)
        ]


class TrivialAugment:
    """TrivialAugment (wide): one operation of a uniformly chosen magnitude (arXiv 2103.10158)."""

    num_draws = 4

    def __init__(self, side: int):
        self.space = OperationSpace(
            ["Identity", *COMMON], side, bins=31, shear=0.99, translation=32, rotation=135, color=0.99, posterize=6
        )

    def operations(self, u: np.ndarray) -> list[OperationBatch]:
        return [
            self.space.batch(choose(u[:, 0], len(self.space.names)), choose(u[:, 1], self.space.bins), u[:, 2] < 0.5)
        ]


class AutoAugment:
    """AutoAugment: one of 25 pairs of operations found by search on CIFAR-10 (arXiv 1805.09501)."""

    num_draws = 8
    # two operations a line, each with its probability and its magnitude bin of 10
    PAIRS = [
        ("Invert", 0.1, 0, "Contrast", 0.2, 6),
        ("Rotate", 0.7, 2, "TranslateX", 0.3, 9),
        ("Sharpness", 0.8, 1, "Sharpness", 0.9, 3),
        ("ShearY", 0.5, 8, "TranslateY", 0.7, 9),
        ("AutoContrast", 0.5, 0, "Equalize", 0.9, 0),
        ("ShearY", 0.2, 7, "Posterize", 0.3, 7),
        ("Color", 0.4, 3, "Brightness", 0.6, 7),
        ("Sharpness", 0.3, 9, "Brightness", 0.7, 9),
        ("Equalize", 0.6, 0, "Equalize", 0.5, 0),
        ("Contrast", 0.6, 7, "Sharpness", 0.6, 5),
        ("Color", 0.7, 7, "TranslateX", 0.5, 8),
        ("Equalize", 0.3, 0, "AutoContrast", 0.4, 0),
        ("TranslateY", 0.4, 3, "Sharpness", 0.2, 6),
        ("Brightness", 0.9, 6, "Color", 0.2, 8),
        ("Solarize", 0.5, 2, "Invert", 0.0, 0),
        ("Equalize", 0.2, 0, "AutoContrast", 0.6, 0),
        ("Equalize", 0.2, 0, "Equalize", 0.6, 0),
        ("Color", 0.9, 9, "Equalize", 0.6, 0),
        ("AutoContrast", 0.8, 0, "Solarize", 0.2, 8),
        ("Brightness", 0.1, 3, "Color", 0.7, 0),
        ("Solarize", 0.4, 5, "AutoContrast", 0.9, 0),
        ("TranslateY", 0.9, 9, "TranslateY", 0.7, 9),
        ("AutoContrast", 0.9, 0, "Solarize", 0.8, 3),
        ("Equalize", 0.8, 0, "Invert", 0.1, 0),
        ("TranslateY", 0.7, 9, "AutoContrast", 0.9, 0),
    ]

    def __init__(self, side: int):
        self.space = OperationSpace(
            [*COMMON, "Invert"],
            side,
            bins=10,
            shear=0.3,
            translation=150 / 331 * side,
            rotation=30,
            color=0.9,
            posterize=4,
        )
        index = self.space.names.index
        self.operation = np.array([[index(pair[0]), index(pair[3])] for pair in self.PAIRS])
        self.probability = np.array([[pair[1], pair[4]] for pair in self.PAIRS])
        self.bin = np.array([[pair[2], pair[5]] for pair in self.PAIRS])

    def operations(self, u: np.ndarray) -> list[OperationBatch]:
        pair = choose(u[:, 0], len(self.PAIRS))
        return [
            self.space.batch(
                self.operation[pair, i], self.bin[pair, i], u[:, 1 + i] < 0.5, u[:, 3 + i] < self.probability[pair, i]
            )
            for i in range(2)
        ]


class ColorJitter:
    """ColorJitter: brightness, contrast and saturation, scaled by random factors in random order.

    Hue is not offered: DALI rotates it in YIQ and torchvision in HSV, so the backends would disagree.
    """

    num_draws = 8

    def __init__(self, brightness: float, contrast: float, saturation: float):
        self.kinds = np.array([BRIGHTNESS, CONTRAST, COLOR])
        self.width = np.array([brightness, contrast, saturation])

    def operations(self, u: np.ndarray) -> list[OperationBatch]:
        low, high = np.maximum(0, 1 - self.width), 1 + self.width
        factor = low + u[:, :3] * (high - low)
        order = np.argsort(u[:, 3:6], axis=1)
        matrix = np.tile(np.array([[1, 0, 0], [0, 1, 0]], np.float32), (len(u), 1, 1))
        rows = np.arange(len(u))
        return [
            OperationBatch(
                np.where(self.width[order[:, i]] > 0, self.kinds[order[:, i]], IDENTITY).astype(np.int32),
                factor[rows, order[:, i]].astype(np.float32),
                matrix,
            )
            for i in range(3)
        ]
