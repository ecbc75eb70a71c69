"""What is in an image tree, and what is wrong with it: refusals (PrepareError) and warnings, each by name.

    <root>/train/<class>/*.png      a class is any folder that directly holds images, its name its path below the split,
    <root>/test/<class>/*.png       so `train/animals/cat/1.png` is of class `animals/cat`; `val` stands in for a missing `test`

In: a folder. Out: `list_tree(root)` gives the classes, paths and labels in their final order; the other functions take what
decoding found and give sentences. Nothing here opens an image, except that `looks_like_jpeg` is handed pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import DatasetError
from common.text import listed

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".webp", ".jp2"}
TEST_NAMES = ("test", "val", "validation")
SYSTEM_FILES = {"__MACOSX", "Thumbs.db", "desktop.ini"}
CIFAR_SIDE = 32


class PrepareError(DatasetError):
    """The dataset cannot be prepared; the message is one sentence that names the thing and the mend."""


@dataclass(frozen=True)
class Tree:
    """The images below `root`: `paths[split]` sorted as unicode strings, `labels[split]` beside them, and what to warn about."""

    root: Path
    classes: list[str]
    paths: dict[str, list[str]]
    labels: dict[str, list[int]]
    warnings: list[str]


def is_hidden(name: str) -> bool:
    """Files that operating systems leave behind; they are passed over in silence."""
    return name.startswith(".") or name in SYSTEM_FILES


def list_tree(root: Path) -> Tree:
    """Find the classes and images below `root`. Raises PrepareError when they do not make a dataset."""
    warnings: list[str] = []
    folders = _split_folders(root, warnings)
    by_class = {split: _images_by_class(root, folder, warnings) for split, folder in folders.items()}
    for split, found in by_class.items():
        if not found:
            raise PrepareError(f"{root / folders[split]} holds 0 images in class folders; expected {_layout(root)}")
    _refuse_lonely_classes({folders[split]: set(found) for split, found in by_class.items()})
    classes = sorted(by_class["train"])
    label_of = {name: label for label, name in enumerate(classes)}
    pairs = {
        split: sorted((path, label_of[name]) for name, paths in found.items() for path in paths)
        for split, found in by_class.items()
    }
    _refuse_names(path for listing in pairs.values() for path, _ in listing)
    return Tree(
        root=root,
        classes=classes,
        paths={split: [path for path, _ in listing] for split, listing in pairs.items()},
        labels={split: [label for _, label in listing] for split, listing in pairs.items()},
        warnings=warnings,
    )


def broken_warnings(tree: Tree, kept: dict[str, list[int]], broken: list[tuple[str, str]], skip: bool) -> list[str]:
    """`broken` holds (path, reason) of what cannot be decoded, `kept[split]` the positions of what can. Refuses unless `skip`."""
    if not broken:
        return []
    names = listed(f"{path} ({reason})" for path, reason in broken)
    if not skip:
        raise PrepareError(
            f"{len(broken)} image(s) cannot be decoded: {names}; replace them, or leave them out with --skip-broken"
        )
    for split, positions in kept.items():
        if lost := set(range(len(tree.classes))).difference(tree.labels[split][i] for i in positions):
            names = listed(tree.classes[label] for label in sorted(lost))
            raise PrepareError(
                f"without the broken images the {split} split has none of class {names}; replace them or remove the class"
            )
    return [f"{len(broken)} image(s) that cannot be decoded left out: {names}"]


def conversion_warnings(kinds: dict[str, int]) -> list[str]:
    """What decoding did to images that were not 8-bit RGB; `kinds` counts images by kind."""
    how = {"16-bit": "the high byte is kept", "RGBA": "alpha is dropped", "grey with alpha": "alpha is dropped"}
    return [
        f"{count} {kind} image{'s' * (count > 1)} converted to 8-bit RGB" + (f" ({how[kind]})" if kind in how else "")
        for kind, count in sorted(kinds.items())
        if kind != "RGB"
    ]


def duplicate_warnings(paths: dict[str, list[str]], digests: dict[str, list[bytes]]) -> list[str]:
    """Images whose pixels are exactly the same in train and test: the test accuracy would flatter the model."""
    first_in_train: dict[bytes, str] = {}
    for path, digest in zip(paths["train"], digests["train"], strict=True):
        first_in_train.setdefault(digest, path)
    twins = [
        (first_in_train[digest], path)
        for path, digest in zip(paths["test"], digests["test"], strict=True)
        if digest in first_in_train
    ]
    if not twins:
        return []
    shown = ", ".join(f"'{ours}' = '{theirs}'" for ours, theirs in twins[:3]) + ", ..." * (len(twins) > 3)
    return [f"{len(twins)} of {len(paths['test'])} test images are exact duplicates of training images: {shown}"]


def looks_like_jpeg(pixels: np.ndarray) -> bool:
    """Whether 32x32 images (N, 32, 32, 3) went through JPEG, whatever they are stored as now.

    JPEG rounds the DCT coefficients of each 8x8 block to multiples of a step, which sends most high frequencies to zero; on a
    grid shifted by half a block nothing of that shows. So compare how many high frequencies vanish on the two grids.
    Measured ratio: CIFAR-100 and CIFAR-10 0.8 to 0.9 (at most 1.1 on any 30 images), after JPEG of quality 98 it is 1.6, of 95 3.3,
    of 90, 75 and 50 4.6 and more.
    """
    if len(pixels) < 30:
        return False
    luma = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    on_grid, off_grid = _vanished(luma[:, 8:24, 8:24]), _vanished(luma[:, 4:28, 4:28])
    return bool(on_grid > 1.3 * off_grid + 0.03)


def jpeg_warning(what: str) -> str:
    return (
        f"{what}: a CIFAR recompressed as JPEG costs 2 to 3 points of accuracy and compares with no published number; "
        "use the original pixels (--dataset cifar100 or --dataset cifar10)"
    )


def _vanished(luma: np.ndarray) -> float:
    """The share of high-frequency DCT coefficients of the 8x8 blocks of `luma` (N, h, w) that are nearly zero."""
    n, h, w = luma.shape
    k, x = np.mgrid[:8, :8]
    dct = np.cos(np.pi * (2 * x + 1) * k / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)
    blocks = luma.reshape(n, h // 8, 8, w // 8, 8).swapaxes(2, 3)
    high = (dct @ blocks @ dct.T)[..., k + x >= 5]
    return float((np.abs(high) < 0.8).mean())


def _layout(root: Path) -> str:
    return f"{root}/train/<class>/*.png and {root}/test/<class>/*.png"


def _split_folders(root: Path, warnings: list[str]) -> dict[str, str]:
    if not root.is_dir():
        raise PrepareError(f"{root} is not a folder; expected {_layout(root)}")
    if not (root / "train").is_dir():
        inner = sorted(child for child in root.iterdir() if (child / "train").is_dir())
        hint = f"did you mean {inner[0]}" if inner else f"expected {_layout(root)}"
        raise PrepareError(f"{root} holds no train folder, so 0 images were found; {hint}")
    present = [name for name in TEST_NAMES if (root / name).is_dir()]
    if not present:
        raise PrepareError(f"{root} holds no test folder (nor val, nor validation); expected {_layout(root)}")
    if present[0] != "test":
        warnings.append(f"{root} holds no test folder: '{present[0]}' is used as the test split")
    if present[1:]:
        warnings.append(f"'{present[0]}' is the test split; {listed(present[1:])} is left alone")
    return {"train": "train", "test": present[0]}


def _images_by_class(root: Path, split: str, warnings: list[str]) -> dict[str, list[str]]:
    """Class name -> image paths relative to `root`; adds warnings about strays and empty folders."""
    found: dict[str, list[str]] = {}
    strays, loose, empty, seen = [], [], [], set()
    for folder, subfolders, files in os.walk(root / split, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link that leads back into the tree would loop
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not is_hidden(name)]
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        name = here.relative_to(split).as_posix()
        files = [file for file in files if not is_hidden(file)]
        images = [f"{here}/{file}" for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
        strays += sorted({f"{here}/{file}" for file in files}.difference(images))
        if name == ".":
            loose += sorted(images)
        elif images:
            found[name] = images
        elif not subfolders:
            empty.append(str(here))
    for count, names, what in (
        (len(empty), empty, "class folder(s) without images"),
        (len(strays), strays, "file(s) that are not images"),
        (len(loose), loose, f"image(s) directly in {split}/, outside any class folder"),
    ):
        if count:
            warnings.append(f"{count} {what} left out: {listed(sorted(names))}")
    return found


def _refuse_lonely_classes(classes_of: dict[str, set[str]]) -> None:
    """Every class needs images in both splits; `classes_of` maps the two split folders to their class names."""
    (train, in_train), (test, in_test) = classes_of.items()
    lonely = [
        f"only in {here}: {listed(sorted(ours - theirs))}"
        for here, ours, theirs in ((train, in_train, in_test), (test, in_test, in_train))
        if ours - theirs
    ]
    if lonely:
        raise PrepareError(
            f"some classes have images {'; '.join(lonely)}; give each class images in both {train} and {test}, or remove it"
        )


def _refuse_names(paths: Iterable[str]) -> None:
    """The lists hold one `path<TAB>label` a line in UTF-8: names that would break a line or cannot be encoded are refused."""
    bad = [
        path
        for path in paths
        if "\t" in path or len(path.splitlines()) != 1 or not path.isprintable() and _unencodable(path)
    ]
    if bad:
        raise PrepareError(
            f"{len(bad)} file name(s) hold a tab, a line break or bytes that are not UTF-8: "
            f"{listed(ascii(path)[1:-1] for path in bad)}; rename them"
        )


def _unencodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def _raise(error: OSError) -> None:
    raise PrepareError(f"cannot list {error.filename} ({error.strerror}); check its permissions")
