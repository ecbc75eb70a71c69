"""Prepared datasets, as written by `prepare_dataset.py`: class names, file lists, channel statistics, packed pixels.

A prepared dataset is a folder with these files:

    dataset.json                counts, image side, channel mean and std, fingerprint
    labels.txt                  class names in the order of the labels, one per line
    training_file_list.txt      lines `relative/path.png<TAB>label`, sorted by path, relative to the dataset's root
    test_file_list.txt
    packed/train.npy            uint8 (N, S, S, 3), row i is line i of the list; only if all images have one square size
    packed/test.npy

    python -c "from image_data.dataset import Dataset; print(Dataset.open('data/cifar100'))"

This module imports neither PyTorch nor DALI.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DatasetError
from common.text import python_command

FORMAT = 1
PREPARED_FROM = "prepared_from.json"  # next to dataset.json: the archive, dataset or root that it was made from
LIST_FILES = {"train": "training_file_list.txt", "test": "test_file_list.txt"}
KNOWN = ("cifar100", "cifar10", "shapes")  # datasets that prepare_dataset.py can make by name
DEFAULT = KNOWN[0]  # dataset of a command that names none


def too_few(split: str, images: int, batch: int) -> DatasetError:
    """Return the error for a split that is smaller than one global batch."""
    return DatasetError(
        f"the {split} split has {images} images, fewer than one global batch of {batch}. "
        f"Add --set train_batch_size=N with N <= {images}"
    )


@dataclass(frozen=True)
class Split:
    """Images of one split: train, validation or test.

    `paths[i]` is the file of image i relative to the dataset's root, `labels[i]` its label (int64), and `rows[i]` its
    row in the packed array at `packed`. `packed` is None if the images are not packed.
    """

    paths: list[str]
    labels: np.ndarray
    rows: np.ndarray
    packed: Path | None

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self) -> np.ndarray:
        """Return the memory-mapped array that holds this split: uint8 (N, S, S, 3), indexed with `rows`.

        Raises:
            DatasetError: the images are not packed, or the array is damaged.
        """
        if self.packed is None:
            raise DatasetError(
                "the images are not packed (their sizes differ, or they exceed --pack-limit-gib). Use --source files"
            )
        try:
            return np.load(self.packed, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:  # EOFError: an empty file
            again = prepare_again(self.packed.parent.parent)
            raise DatasetError(f"{self.packed} is damaged ({error}). Run: {again}") from None

    def take(self, keep: np.ndarray) -> Split:
        """Select the images at the positions `keep` (int64), in that order."""
        return replace(self, paths=[self.paths[i] for i in keep], labels=self.labels[keep], rows=self.rows[keep])


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `mean` and `std` are per channel (R, G, B), for pixel values scaled to 0..1.

    A constant channel has a standard deviation of 0 in dataset.json and of 1 here, because images are divided by it.
    """

    folder: Path
    root: Path
    classes: list[str]
    image_side: int | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    splits: dict[str, Split]

    @staticmethod
    def is_prepared(folder: str | Path) -> bool:
        """Return whether `prepare_dataset.py` has finished this folder; it writes dataset.json last."""
        return os.path.isfile(Path(folder) / "dataset.json")  # False, not an error, where it cannot be looked up

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read a prepared dataset. Raises DatasetError if it is missing, unreadable or inconsistent."""
        folder = Path(folder)
        if folder.is_file():
            raise DatasetError(f"{folder} is a file, not a folder. Give --data-dir the folder of a prepared dataset")
        if not cls.is_prepared(folder):
            raise DatasetError(
                f"{folder} holds no prepared dataset (dataset.json is missing). Run: {prepare_first(folder)}"
            )
        try:
            facts = json.loads((folder / "dataset.json").read_text())
            classes = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
            splits = {name: _read_split(folder, name, facts["packed"]) for name in LIST_FILES}
            if facts["format"] != FORMAT:
                raise DatasetError(f"{folder}/dataset.json has format {facts['format']}; this version reads {FORMAT}")
            if facts["num_classes"] != len(classes) or any(facts["num_images"][n] != len(s) for n, s in splits.items()):
                raise DatasetError(f"the lists in {folder} do not match its dataset.json")
            red, green, blue = facts["mean"]
            std_red, std_green, std_blue = (value or 1.0 for value in facts["std"])
            return cls(
                folder=folder,
                root=folder / facts["root"],
                classes=classes,
                image_side=facts["image_side"],
                mean=(red, green, blue),
                std=(std_red, std_green, std_blue),
                fingerprint=facts["fingerprint"],
                splits=splits,
            )
        except DatasetError as error:
            raise DatasetError(f"{error}. Run: {prepare_again(folder)}") from None
        except PermissionError as error:
            raise DatasetError(f"{error.filename} cannot be read ({error.strerror}). Check its permissions") from None
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{folder} is damaged ({error}). Run: {prepare_again(folder)}") from error

    def steps_per_epoch(self, global_batch: int) -> int:
        """Return the number of full global batches in the training split. Raises DatasetError if there is none."""
        steps = len(self.splits["train"]) // global_batch
        if not steps:
            raise too_few("train", len(self.splits["train"]), global_batch)
        return steps

    def hold_out(self, fraction: float) -> Dataset:
        """Move a `fraction` of each class from `train` to a new split `validation`.

        The images with the lowest SHA-256 digests of their paths move. The validation split is therefore the same on
        every machine and for every seed, and it stays mostly the same when images are added.

        Raises:
            DatasetError: the fraction is not between 0 and 1, or leaves a class without images in a split.
        """
        if not 0 < fraction < 1:
            raise DatasetError(f"--hold-out must lie between 0 and 1, got {fraction}")
        train = self.splits["train"]
        digests = np.array([hashlib.sha256(path.encode()).hexdigest() for path in train.paths])
        in_validation = np.zeros(len(train), dtype=bool)
        for label in range(len(self.classes)):
            members = np.flatnonzero(train.labels == label)
            count = round(fraction * len(members))
            if not 0 < count < len(members):
                raise DatasetError(
                    f"holding out {fraction:g} of the {len(members)} training images of class "
                    f"'{self.classes[label]}' leaves a split empty. "
                    "Choose another --hold-out (in an experiment file: hold_out)"
                )
            in_validation[members[np.argsort(digests[members])[:count]]] = True
        splits = {
            "train": train.take(np.flatnonzero(~in_validation)),
            "validation": train.take(np.flatnonzero(in_validation)),
        }
        return replace(self, splits={**self.splits, **splits})


def prepare_first(folder: Path) -> str:
    """Return the command that prepares a folder; its source is left to the user if it cannot be known."""
    command = python_command("prepare_dataset.py", "--data-dir", folder)
    if (folder / "train").is_dir():
        return command
    known = folder.name in KNOWN
    return (
        f"{command} --dataset {folder.name}"
        if known
        else f"{command} --archive FILE (or --root DIR, or --dataset NAME)"
    )


def prepare_again(folder: Path) -> str:
    """Return the command that prepares `folder` again from the source that it records."""
    made_from, facts = (read_object(folder / name) for name in (PREPARED_FROM, "dataset.json"))
    options: list[object] = []
    if "archive" in made_from:
        options += ["--archive", f"PATH/{made_from['archive']}"]
    elif "root" in made_from and not (folder / "train").is_dir():
        root = Path(os.path.normpath(folder / facts.get("root", ".")))
        options += ["--root", root if root.is_dir() else "NEW_PLACE"]
    if "test_fraction" in facts:
        options += ["--test-fraction", facts["test_fraction"]]
    return python_command("prepare_dataset.py", "--data-dir", folder, *options, "--force")


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file is missing or damaged."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _read_split(folder: Path, name: str, is_packed: bool) -> Split:
    paths, labels = [], []
    for line in (folder / LIST_FILES[name]).read_text(encoding="utf-8").splitlines():
        path, _, label = line.rpartition("\t")
        paths.append(path)
        labels.append(int(label))
    packed = folder / "packed" / f"{name}.npy" if is_packed else None
    if packed is not None and not packed.is_file():
        raise DatasetError(f"{packed} is missing")
    return Split(paths, np.array(labels, dtype=np.int64), np.arange(len(paths)), packed)
