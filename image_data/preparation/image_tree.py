"""Image trees: find classes and images below a folder, and report what is wrong with them.

    <root>/train/<class>/*.png      a class is any folder that directly holds images; its name is the path below the
    <root>/test/<class>/*.png       split: `train/animals/cat/1.png` has class `animals/cat`; `val` can replace `test`

`list_tree(root)` returns classes, paths and labels in their final order. `walk_images` is the only rule that finds
images, here and in `evaluate.py --predict`. Nothing here opens an image.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common.errors import DatasetError
from common.stop_signal import end_if_stopped
from common.text import listed
from image_data.dataset import LIST_FILES, PREPARED_FROM
from image_data.image_file import SUFFIXES

TEST_NAMES = ("test", "val", "validation")
SYSTEM_FILES = {"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "System Volume Information"}
# What preparing writes: not part of a tree of class folders without splits, if the dataset is prepared in place.
WRITTEN = frozenset({"dataset.json", "labels.txt", "packed", PREPARED_FROM, *LIST_FILES.values()})


class PrepareError(DatasetError):
    """The dataset cannot be prepared. The message names the cause and the fix."""


@dataclass(frozen=True)
class Tree:
    """Images below `root`: sorted paths and their labels of each split, and warnings."""

    root: Path
    classes: list[str]
    paths: dict[str, list[str]]
    labels: dict[str, list[int]]
    warnings: list[str]


class ImageFolder(NamedTuple):
    """One folder of a walk; all names are sorted."""

    path: str  # relative to the top of the walk, "." for the top
    real: str  # absolute path without links
    subfolders: list[str]
    images: list[str]
    others: list[str]


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden or was left by an operating system; those are skipped silently."""
    return name.startswith(".") or name in SYSTEM_FILES


def walk_images(top: Path, skip: frozenset[str] = frozenset()) -> Iterator[ImageFolder]:
    """Yield every folder at and below `top` with its images, which are recognized by suffix.

    Links to folders are followed, except those to a folder above. Hidden files and folders are skipped, and at the top
    also the names in `skip`.

    Raises:
        PrepareError: a folder cannot be listed.
    """
    real_paths: dict[str, tuple[str, ...]] = {}  # of each folder and of the folders above it, to detect loops
    for folder, subfolders, files in os.walk(top, onerror=_raise, followlinks=True):
        end_if_stopped(f"listing {top}")
        real, above = os.path.realpath(folder), real_paths.get(os.path.dirname(folder), ())
        if real in above:
            subfolders.clear()
            continue
        real_paths[folder] = (*above, real)
        path = Path(folder).relative_to(top).as_posix()
        skipped = skip if path == "." else frozenset()
        # In place: os.walk visits what is left in the list, in this order.
        subfolders[:] = sorted(name for name in subfolders if not is_hidden(name) and name not in skipped)
        files = sorted(name for name in files if not is_hidden(name) and name not in skipped)
        images = [name for name in files if os.path.splitext(name)[1].lower() in SUFFIXES]
        yield ImageFolder(path, real, list(subfolders), images, sorted(set(files).difference(images)))


def list_tree(root: Path, test_fraction: float | None = None, name: str = "") -> Tree:
    """Find the classes and images below `root`.

    Args:
        test_fraction: share of the images of each class to use as the test split of a tree that has none.
        name: name of the tree in messages; default: `root`.

    Raises:
        PrepareError: the tree is not a dataset.
    """
    name = name or str(root)
    warnings: list[str] = []
    if test_fraction is None:
        folders = _split_folders(root, name, warnings)
        by_class = {split: _images_by_class(root, folder, warnings) for split, folder in folders.items()}
        for split, found in by_class.items():
            if not found:
                raise PrepareError(f"{name}/{folders[split]} holds 0 images in class folders. Expected {_layout(name)}")
        _refuse_unmatched_classes({folders[split]: set(found) for split, found in by_class.items()})
    else:
        by_class = _split_by_name(_images_without_splits(root, name, warnings), test_fraction, name)
    classes = sorted(by_class["train"])
    if len(classes) == 1:
        layout = _layout(name) if test_fraction is None else f"{name}/<class>/*.png"
        raise PrepareError(
            f"only one class ({listed(classes)}) in {name}; a classifier needs two. "
            f"If the class folders lie one level higher or lower, name that folder. Expected {layout}"
        )
    label_of = {class_name: label for label, class_name in enumerate(classes)}
    if nested := [name for name in classes if any(str(above) in label_of for above in PurePosixPath(name).parents)]:
        warnings.append(
            f"class folders that lie inside another class folder are separate classes: {listed(nested)}. "
            "To make them one class, move their images up"
        )
    pairs = {
        split: sorted((path, label_of[class_name]) for class_name, paths in found.items() for path in paths)
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


def _layout(name: str) -> str:
    return f"{name}/train/<class>/*.png and {name}/test/<class>/*.png"


def _split_folders(root: Path, name: str, warnings: list[str]) -> dict[str, str]:
    if not root.is_dir():
        raise PrepareError(f"{name} is not a folder. Expected {_layout(name)}")
    if not (root / "train").is_dir():
        inner = sorted(child for child in root.iterdir() if (child / "train").is_dir())
        hint = f"Did you mean {inner[0]}?" if inner else _renames(root) or f"Expected {_layout(name)}"
        if not inner and any(map(_holds_images, root.iterdir())):
            hint += ". To split class folders into train and test, add --test-fraction 0.2 to prepare_dataset.py"
        raise PrepareError(f"{name} holds no train folder, so 0 images were found. {hint}")
    present = [folder for folder in TEST_NAMES if (root / folder).is_dir()]
    if not present:
        raise PrepareError(
            f"{name} holds no test folder (nor val, nor validation). {_renames(root) or f'Expected {_layout(name)}'}. "
            "To take the test split from train, add --test-fraction 0.2 to prepare_dataset.py"
        )
    if present[0] != "test":
        warnings.append(f"{name} holds no test folder: '{present[0]}' is used as the test split")
    if present[1:]:
        warnings.append(f"'{present[0]}' is the test split: {listed(present[1:])} is ignored")
    return {"train": "train", "test": present[0]}


def _renames(root: Path) -> str:
    """Return how to rename folders whose names differ from those of splits by case only; empty if there is none."""
    due = ("train", *TEST_NAMES)
    wrong = sorted(path.name for path in root.iterdir() if path.name not in due and path.name.lower() in due)
    return f"Rename {' and '.join(f'{name} to {name.lower()}' for name in wrong)}" if wrong else ""


def _holds_images(folder: Path) -> bool:
    try:
        return any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())
    except OSError:  # a file, or a folder that cannot be listed
        return False


def _images_without_splits(root: Path, name: str, warnings: list[str]) -> dict[str, list[str]]:
    """Class name -> image paths of a tree that has no test split."""
    if not root.is_dir():
        raise PrepareError(f"{name} is not a folder")
    present = [folder for folder in TEST_NAMES if (root / folder).is_dir()]
    if present:
        raise PrepareError(
            f"{name} already holds the folder {present[0]}. Omit --test-fraction, or rename the folder if it is a class"
        )
    about_classes: list[str] = []
    found = _images_by_class(root, ".", about_classes)
    in_train = {class_name for class_name in found if class_name.startswith("train/")}
    beside = found.keys() - in_train - {"train"}
    if in_train and beside:
        raise PrepareError(
            f"{name} holds class folders in train and beside it ({listed(sorted(beside))}). "
            "Rename train if it is a class; otherwise move the folders beside it"
        )
    if not beside and (root / "train").is_dir():
        found = _images_by_class(root, "train", warnings)
    else:
        warnings += about_classes
    if not found:
        raise PrepareError(f"{name} holds 0 images in class folders. Expected {name}/<class>/*.png")
    return found


def _split_by_name(found: dict[str, list[str]], test_fraction: float, name: str) -> dict[str, dict[str, list[str]]]:
    """Take the paths with the lowest SHA-256 digests of each class as the test split: the same on every machine."""
    if not 0 < test_fraction < 1:
        raise PrepareError(f"--test-fraction must lie between 0 and 1, got {test_fraction}")
    if lonely := sorted(class_name for class_name, paths in found.items() if len(paths) < 2):
        raise PrepareError(
            f"{name} has a single image of class {listed(lonely)}, and --test-fraction needs two. Add images"
        )
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for class_name, paths in found.items():
        count = min(max(1, round(test_fraction * len(paths))), len(paths) - 1)
        in_order = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
        splits["test"][class_name], splits["train"][class_name] = in_order[:count], in_order[count:]
    return splits


def _images_by_class(root: Path, split: str, warnings: list[str]) -> dict[str, list[str]]:
    """Class name -> image paths relative to `root`; adds warnings about everything that is skipped or unusual."""
    found: dict[str, list[str]] = {}
    names_of_folder: dict[str, list[str]] = {}
    unsupported, loose, empty, merged = [], [], [], []
    prefix = "" if split == "." else f"{split}/"
    for folder in walk_images(root / split, _written(root) if split == "." else frozenset()):
        here = prefix if folder.path == "." else f"{prefix}{folder.path}/"
        images = [here + image for image in folder.images]
        unsupported += [here + other for other in folder.others]
        if folder.path == ".":
            loose += images
        elif images:
            name = unicodedata.normalize("NFC", folder.path)  # macOS decomposes accents, other systems do not
            merged += [name] if name in found else []
            found[name] = found.get(name, []) + images
            names_of_folder.setdefault(folder.real, []).append(name)
        elif not folder.subfolders:
            empty.append(here.rstrip("/"))
    for names, what in (
        (empty, "class folder(s) without images"),
        (unsupported, "file(s) with an unsupported suffix"),
        (loose, f"image(s) directly in {split}/, outside any class folder"),
    ):
        if names:
            warnings.append(f"skipped {len(names)} {what}: {listed(sorted(names))}")
    if merged:
        warnings.append(f"merged class folders whose names differ only in Unicode form: {listed(merged)}")
    for names in names_of_folder.values():
        if len(names) > 1:
            warnings.append(f"classes {listed(names)} are links to one folder: each of its images is in all of them")
    return found


def _written(root: Path) -> frozenset[str]:
    """Return the names at the top of `root` that preparing writes; a folder `packed` with images is a class."""
    packed = root / "packed"
    is_class = packed.is_dir() and any(folder.images for folder in walk_images(packed))
    return WRITTEN - {"packed"} if is_class else WRITTEN


def _refuse_unmatched_classes(classes_of: dict[str, set[str]]) -> None:
    """Raise PrepareError if a class has images in one split only; `classes_of` maps split folders to class names."""
    (train, in_train), (test, in_test) = classes_of.items()
    unmatched = [
        f"only in {here}: {listed(sorted(ours - theirs))}"
        for here, ours, theirs in ((train, in_train, in_test), (test, in_test, in_train))
        if ours - theirs
    ]
    if unmatched:
        raise PrepareError(
            f"some classes have images {'; '.join(unmatched)}. "
            f"Give each class images in both {train} and {test}, or remove it"
        )


def _refuse_names(paths: Iterable[str]) -> None:
    """Raise PrepareError for names that do not fit into a list of `path<TAB>label` lines in UTF-8."""
    bad = [
        path
        for path in paths
        if "\t" in path or len(path.splitlines()) != 1 or not path.isprintable() and _unencodable(path)
    ]
    if bad:
        raise PrepareError(
            f"{len(bad)} file name(s) hold a tab, a line break or bytes that are not UTF-8: "
            f"{listed(ascii(path)[1:-1] for path in bad)}. Rename them"
        )


def _unencodable(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return True
    return False


def _raise(error: OSError) -> None:
    raise PrepareError(f"cannot list {error.filename} ({error.strerror}). Check its permissions")
