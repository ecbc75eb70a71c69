"""Survey of an image tree: decode every image once, pack the pixels, and collect warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.text import listed
from image_data.image_file import TOO_LARGE, decode_image
from image_data.preparation.decoding import SplitFacts, decode_split, decoder, first_side, mean_and_std, useful_workers
from image_data.preparation.image_tree import PrepareError, Tree
from image_data.preparation.jpeg_traces import CIFAR_SIDE, jpeg_warning, looks_like_jpeg

JPEG_SAMPLE = 1000  # training images examined for traces of JPEG


@dataclass(frozen=True)
class Options:
    """How to prepare; see the options of `prepare_dataset.py`."""

    workers: int
    skip_broken: bool
    pack_limit_gib: float
    test_fraction: float | None
    max_megapixels: float
    unpack_limit_gib: float | None
    shapes: dict[str, int] | None


@dataclass(frozen=True)
class Survey:
    """Facts found by decoding every image, and the folder of packed arrays (None if they are not packed)."""

    facts: dict[str, SplitFacts]
    packed: Path | None
    warnings: list[str]


def survey_images(tree: Tree, partial: Path, options: Options) -> Survey:
    """Decode every image once; pack them if all have one square size and the arrays fit the limit."""
    side = first_side(tree.root, tree.paths["train"], options.max_megapixels)
    gib = sum(map(len, tree.paths.values())) * (side or 0) ** 2 * 3 / 2**30
    packed = partial / "packed" if side and gib <= options.pack_limit_gib else None
    if packed:
        packed.mkdir()
    facts = {}
    with decoder(useful_workers(options.workers, map(len, tree.paths.values()))) as decode:
        for split, paths in tree.paths.items():
            file, what = packed and packed / f"{split}.npy", f"decoding {split} images"
            facts[split] = decode_split(decode, tree.root, paths, side, file, what, options.max_megapixels)
    broken = [pair for found in facts.values() for pair in found.broken]
    kept = {split: found.kept for split, found in facts.items()}
    warnings = _broken_warnings(tree, kept, broken, options.skip_broken)
    sizes = set().union(*(found.sizes for found in facts.values()))
    if len(sizes) > 1 or not side:
        packed = None
        small, large = extremes(sizes)
        warnings.append(
            f"image sizes vary from {small[0]}x{small[1]} to {large[0]}x{large[1]}"
            if len(sizes) > 1
            else f"the images are {small[0]}x{small[1]}, not square"
        )
        warnings[-1] += ": they are not packed, and training reads the files"
    elif not packed:
        warnings.append(
            f"packed arrays would take {gib:.1f} GiB, more than --pack-limit-gib {options.pack_limit_gib:g}: "
            "the images are not packed, and training reads the files"
        )
    warnings += _conversion_warnings(facts["train"].kinds + facts["test"].kinds)
    warnings += _constant_channel_warnings(facts["train"])
    warnings += _jpeg_warnings(tree, facts, sizes)
    kept_paths = {split: [tree.paths[split][i] for i in facts[split].kept] for split in facts}
    warnings += _duplicate_warnings(kept_paths, {split: facts[split].digests for split in facts})
    return Survey(facts, packed, warnings)


def _broken_warnings(tree: Tree, kept: dict[str, list[int]], broken: list[tuple[str, str]], skip: bool) -> list[str]:
    """Return the warning about images that cannot be decoded.

    Args:
        kept: positions of the decoded images of each split.
        broken: (path, reason) of every other image.
        skip: skip broken images; otherwise they are an error.

    Raises:
        PrepareError: `skip` is False, or a class has no image left in a split.
    """
    if not broken:
        return []
    names = listed(f"{path} ({reason})" for path, reason in broken)
    if not skip:
        raised = " or --max-megapixels N" if any(TOO_LARGE in reason for _, reason in broken) else ""
        raise PrepareError(
            f"{len(broken)} image(s) cannot be decoded: {names}. "
            f"Replace them, or use prepare_dataset.py --skip-broken{raised}"
        )
    for split, positions in kept.items():
        if lost := set(range(len(tree.classes))).difference(tree.labels[split][i] for i in positions):
            names = listed(tree.classes[label] for label in sorted(lost))
            raise PrepareError(
                f"without the broken images the {split} split has none of class {names}. "
                "Replace them, or remove the class"
            )
    return [f"skipped {len(broken)} image(s) that cannot be decoded: {names}"]


def _conversion_warnings(kinds: dict[str, int]) -> list[str]:
    """Return one warning per kind of image that is not 8-bit RGB; `kinds` counts images by kind."""
    how = {"16-bit": "the high byte is kept", "RGBA": "alpha is dropped", "grayscale with alpha": "alpha is dropped"}
    return [
        f"{count} {kind} image{'s' * (count > 1)} converted to 8-bit RGB" + (f" ({how[kind]})" if kind in how else "")
        for kind, count in sorted(kinds.items())
        if kind != "RGB"
    ]


def _duplicate_warnings(paths: dict[str, list[str]], digests: dict[str, list[bytes]]) -> list[str]:
    """Return a warning about images with the same pixels in train and test, which inflate the test accuracy."""
    first_in_train: dict[bytes, str] = {}
    for path, digest in zip(paths["train"], digests["train"], strict=True):
        first_in_train.setdefault(digest, path)
    pairs = [
        (first_in_train[digest], path)
        for path, digest in zip(paths["test"], digests["test"], strict=True)
        if digest in first_in_train
    ]
    if not pairs:
        return []
    shown = ", ".join(f"'{train}' = '{test}'" for train, test in pairs[:3]) + ", ..." * (len(pairs) > 3)
    return [f"{len(pairs)} of {len(paths['test'])} test images are exact duplicates of training images: {shown}"]


def _constant_channel_warnings(facts: SplitFacts) -> list[str]:
    """Return a warning for each channel that has one value in all training images."""
    mean, std = mean_and_std(facts.histogram)
    return [
        f"the {color} channel is constant ({mean[i]:g} in all training images): it is normalized with a standard "
        "deviation of 1 instead of 0"
        for i, color in enumerate(("red", "green", "blue"))
        if std[i] == 0
    ]


def _jpeg_warnings(tree: Tree, facts: dict[str, SplitFacts], sizes: set[tuple[int, int]]) -> list[str]:
    """Return a warning about CIFAR-sized images that are or were JPEG files."""
    if sizes != {(CIFAR_SIDE, CIFAR_SIDE)}:
        return []
    if count := sum(found.formats["JPEG"] for found in facts.values()):
        return [jpeg_warning(f"{count} images of {CIFAR_SIDE}x{CIFAR_SIDE} pixels are stored as JPEG")]
    kept = facts["train"].kept
    sample = [tree.root / tree.paths["train"][kept[i]] for i in range(0, len(kept), math.ceil(len(kept) / JPEG_SAMPLE))]
    if looks_like_jpeg(np.stack([decode_image(path)[0] for path in sample])):
        return [jpeg_warning(f"the {CIFAR_SIDE}x{CIFAR_SIDE} images show traces of JPEG compression")]
    return []


def extremes(sizes: set[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the smallest and the largest (width, height) by number of pixels."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return by_area[0], by_area[-1]
