"""Source of a dataset: a known name, an archive or an image tree, and its record `prepared_from.json`.

    Source(None, Path("pets.zip"), None).record()       {"archive": "pets.zip", "bytes": 1234}, without its folder

A folder that is prepared again without a source keeps its own: `completed` never replaces the images of a user.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import DatasetError
from common.paths import DATA, near_path
from common.text import python_command
from image_data.dataset import DEFAULT, KNOWN, PREPARED_FROM, Dataset, read_object
from image_data.preparation.image_tree import PrepareError, walk_images

OURS = ".unpacked"  # an empty file that marks <data-dir>/images as written by prepare_dataset.py, which may replace it


@dataclass(frozen=True)
class Source:
    """Where the images come from: at most one of a dataset's name, an archive and the root of a tree."""

    dataset: str | None
    archive: Path | None
    root: Path | None

    def default_folder(self) -> Path:
        """Return the folder to prepare if --data-dir is not given.

        Raises:
            PrepareError: the name of the archive, such as `.zip`, gives no folder name.
        """
        if self.root is not None:
            return self.root
        name = self.archive.name.split(".")[0] if self.archive is not None else self.dataset or DEFAULT
        if not name or not name.isprintable():
            raise PrepareError(f"--archive {str(self.archive)!r} gives no folder name. Add --data-dir DIR")
        return Path(near_path(DATA / name))

    def completed(self, folder: Path) -> Source:
        """Return this source, or the one of `folder` if none is given: its tree, the dataset recorded, or the default.

        Any images of a user in `folder` are its tree. If they are no dataset, listing them says so.

        Raises:
            PrepareError: `folder` was prepared from an archive, from a tree elsewhere, or from an unknown source.
        """
        if self.dataset or self.archive or self.root:
            return self
        made_from = recorded(folder)
        if "archive" in made_from:
            raise PrepareError(
                f"{folder} was prepared from {made_from['archive']}. Use prepare_dataset.py --archive with its path"
            )
        if (folder / "train").is_dir():
            return Source(None, None, folder)
        if "dataset" in made_from:
            return Source(str(made_from["dataset"]), None, None)
        if any(found.images for found in walk_images(folder, skip=frozenset({"images"}))):
            return Source(None, None, folder)
        if "root" in made_from:
            raise PrepareError(
                f"{folder} was prepared from the image tree {made_from['root']}. Use prepare_dataset.py --root with "
                "its path, and with --test-fraction if it has no test split"
            )
        if Dataset.is_prepared(folder) or (folder / "images" / OURS).exists():
            raise PrepareError(
                f"{folder} is already prepared, and its source is not recorded. "
                "Use prepare_dataset.py with --dataset, --archive or --root"
            )
        return Source(DEFAULT, None, None)

    def record(self) -> dict[str, str | int]:
        """Return the content of prepared_from.json: nothing that depends on this machine."""
        if self.archive is not None:
            return {"archive": self.archive.name, "bytes": os.path.getsize(self.archive)}
        return {"root": self.root.resolve().name} if self.root is not None else {"dataset": self.dataset or DEFAULT}


def recorded(folder: Path) -> dict[str, str | int]:
    """Return the record of the source that `folder` was prepared from; empty if there is none."""
    made_from = read_object(folder / PREPARED_FROM)
    # Earlier versions recorded the default dataset for a tree that was prepared in place.
    if "dataset" in made_from and (folder / "train").is_dir() and not (folder / "images").exists():
        return {"root": folder.resolve().name}
    return made_from


def refuse_another_source(folder: Path, dataset: str | None, archive: Path | None) -> None:
    """Raise DatasetError if `folder` was prepared from something else than the source given."""
    option, given = ("--archive", archive) if archive else ("--dataset", dataset)
    if archive and not archive.is_file():
        wrong = "is not a file" if archive.exists() else "does not exist"
        raise DatasetError(f"--archive {archive} {wrong}. Check the path, or omit it: {folder} is already prepared")
    again = python_command("prepare_dataset.py", "--data-dir", folder, option, given, "--force")
    made_from = recorded(folder)
    if not made_from:  # prepared by a version that did not record it
        print(
            f"note: {option} {given} was not read, because {folder} is already prepared. To prepare it again: {again}"
        )
        return
    name = str(next(iter(made_from.values())))
    if made_from != Source(dataset, archive, None).record() and not (dataset and is_copy_of(dataset, name)):
        raise DatasetError(
            f"{folder} was prepared from {name}, and {option} {given} would be ignored. "
            f"Choose another --data-dir, or prepare it again: {again}"
        )


def is_copy_of(dataset: str, name: str) -> bool:
    """Return whether an archive or a tree has the name of a known dataset: cifar-100-python.tar.gz is cifar100."""
    return dataset in KNOWN and re.search(rf"{dataset}(?!\d)", re.sub("[^a-z0-9]", "", name.lower())) is not None
