"""What `prepare_dataset.py` wrote, read back: class names, file lists, channel statistics, and the packed pixels.

A prepared dataset is a folder that holds

    dataset.json                counts, image side, channel mean and std, fingerprint
    labels.txt                  the class name of label 0 on the first line, and so on
    training_file_list.txt      lines `relative/path.png<TAB>label`, sorted by path, relative to the dataset's root
    test_file_list.txt
    packed/train.npy            uint8 (N, S, S, 3), row i is line i of the list; only when all images share one square size
    packed/test.npy

    python -c "from dataset import Dataset; print(Dataset.open('data/cifar100'))"

Nothing here imports PyTorch or DALI.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import DatasetError

FORMAT = 1
LIST_FILES = {"train": "training_file_list.txt", "test": "test_file_list.txt"}
DEFAULT = "cifar100"  # trained on where nothing else is named


def too_few(split: str, images: int, batch: int) -> DatasetError:
    """What to raise for a split that does not fill one global batch."""
    return DatasetError(
        f"the {split} split has {images} images, fewer than one global batch of {batch}; "
        "make it smaller with --set train_batch_size=N"
    )


@dataclass(frozen=True)
class Split:
    """One part of a dataset.

    `paths[i]` is the file of image i relative to the dataset's root, `labels[i]` its label (int64),
    `rows[i]` its row in the packed array at `packed` (None when the images were not packed).
    """

    paths: list[str]
    labels: np.ndarray
    rows: np.ndarray
    packed: Path | None

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self) -> np.ndarray:
        """The packed images of the file this split lives in, memory-mapped: uint8 (N, S, S, 3). Index it with `rows`.

        Raises:
            DatasetError: there is no such file, or it is damaged.
        """
        if self.packed is None:
            raise DatasetError(
                "these images were not packed (their sizes differ, or they exceed the packing budget); read the files instead"
            )
        try:
            return np.load(self.packed, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.packed} is damaged ({error}); run prepare_dataset.py --force") from None

    def take(self, keep: np.ndarray) -> Split:
        """The images whose positions are in `keep` (int64), in that order."""
        return replace(self, paths=[self.paths[i] for i in keep], labels=self.labels[keep], rows=self.rows[keep])


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `mean` and `std` are per channel (R, G, B), for pixel values scaled to 0..1."""

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
        """Whether `prepare_dataset.py` has finished with this folder (it writes dataset.json last)."""
        return (Path(folder) / "dataset.json").is_file()

    @classmethod
    def open(cls, folder: str | Path) -> Dataset:
        """Read a prepared dataset. Raises DatasetError when it is missing, unreadable or inconsistent."""
        folder = Path(folder)
        if not cls.is_prepared(folder):
            raise DatasetError(
                f"{folder} holds no prepared dataset (no dataset.json); run: python prepare_dataset.py --data-dir {folder}"
            )
        try:
            facts = json.loads((folder / "dataset.json").read_text())
            classes = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()
            splits = {name: _read_split(folder, name, facts["packed"]) for name in LIST_FILES}
            if facts["format"] != FORMAT:
                raise DatasetError(f"{folder}/dataset.json has format {facts['format']}, this version reads {FORMAT}")
            if facts["num_classes"] != len(classes) or any(facts["num_images"][n] != len(s) for n, s in splits.items()):
                raise DatasetError(f"the lists in {folder} do not match its dataset.json")
        except DatasetError as error:
            raise DatasetError(f"{error}; delete {folder}/dataset.json and run prepare_dataset.py again") from None
        except (OSError, KeyError, ValueError) as error:
            raise DatasetError(
                f"{folder} is damaged ({error}); delete its dataset.json and run prepare_dataset.py again"
            ) from error
        return cls(
            folder=folder,
            root=folder / facts["root"],
            classes=classes,
            image_side=facts["image_side"],
            mean=tuple(facts["mean"]),
            std=tuple(facts["std"]),
            fingerprint=facts["fingerprint"],
            splits=splits,
        )

    def steps_per_epoch(self, global_batch: int) -> int:
        """Whole global batches in the training split. Raises DatasetError where there is not even one."""
        steps = len(self.splits["train"]) // global_batch
        if not steps:
            raise too_few("train", len(self.splits["train"]), global_batch)
        return steps

    def hold_out(self, fraction: float) -> Dataset:
        """Move a stratified `fraction` of each class from `train` to a new split `validation`.

        Which images move depends on their paths alone (the lowest SHA-256 digests of each class), so the part is the
        same on every machine, for every seed, and after new images were added most old ones stay where they were.
        """
        if not 0 < fraction < 1:
            raise DatasetError(f"the held-out fraction must lie between 0 and 1, not {fraction}")
        train = self.splits["train"]
        digests = np.array([hashlib.sha256(path.encode()).hexdigest() for path in train.paths])
        held = np.zeros(len(train), dtype=bool)
        for label in range(len(self.classes)):
            members = np.flatnonzero(train.labels == label)
            count = round(fraction * len(members))
            if not 0 < count < len(members):
                raise DatasetError(
                    f"holding out {fraction:g} of the {len(members)} training images of class "
                    f"'{self.classes[label]}' leaves a part empty; choose another fraction"
                )
            held[members[np.argsort(digests[members])[:count]]] = True
        parts = {"train": train.take(np.flatnonzero(~held)), "validation": train.take(np.flatnonzero(held))}
        return replace(self, splits={**self.splits, **parts})


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
