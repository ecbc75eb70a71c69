"""`--stage-to`: copy a prepared dataset from a slow or shared disk to a local disk before training.

The copy is named after the dataset's fingerprint. One process per host makes it while the others wait. An interrupted
copy resumes, and it counts as complete only when dataset.json, written last, exists.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import DatasetError
from common.paths import name_of
from common.progress import progress
from common.stop_signal import lock_when_free
from image_data.dataset import LIST_FILES, Dataset

COPY_THREADS = 16  # small files are limited by latency, not by bandwidth


def stage(dataset: Dataset, target: Path, files: bool) -> Dataset:
    """Copy `dataset` into a folder below `target` unless a copy exists there, and return the copy.

    Args:
        files: also copy the image files, which only the `files` source reads.

    Raises:
        DatasetError: the disk is too small or read-only, a file cannot be copied, or the existing copy is damaged.
    """
    digest = dataset.fingerprint.removeprefix("sha256:")[:16]
    folder = target / f"{name_of(dataset.folder)}-{digest}{'-files' if files else ''}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as lock:
            lock_when_free(lock, f"waiting for the process that copies the dataset to {folder}")
            if not Dataset.is_prepared(folder):
                _copy(dataset, folder, files)
    except OSError as error:
        raise DatasetError(
            f"cannot stage {dataset.folder} to {folder} ({error.strerror or error}: {error.filename or folder}). "
            "Choose another --stage-to, or omit it"
        ) from None
    try:
        staged = Dataset.open(folder)
    except DatasetError:  # its own advice, to prepare the dataset again, does not apply to a copy
        raise DatasetError(f"the copy {folder} is damaged. Delete it and start again") from None
    if staged.fingerprint != dataset.fingerprint:
        raise DatasetError(f"{folder} holds a different dataset than {dataset.folder}. Delete it and start again")
    return staged


def _copy(dataset: Dataset, folder: Path, files: bool) -> None:
    pairs = [(dataset.folder / name, folder / name) for name in ("labels.txt", *LIST_FILES.values())]
    for split in dataset.splits.values():
        if split.packed is not None:
            pairs.append((split.packed, folder / "packed" / split.packed.name))
        if files:
            pairs += [(dataset.root / path, folder / "images" / path) for path in split.paths]
    missing = [
        (source, copy)
        for source, copy in pairs
        if not (copy.is_file() and copy.stat().st_size == source.stat().st_size)
    ]
    needed, free = sum(source.stat().st_size for source, _ in missing), shutil.disk_usage(folder).free
    if needed > free:
        raise DatasetError(
            f"staging to {folder} needs {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. "
            "Choose another --stage-to"
        )
    for parent in {copy.parent for _, copy in missing}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        try:
            for _ in progress(pool.map(_copy_one, missing), total=len(missing), what="staging"):
                pass
        finally:  # an error or a stop does not wait for the files that are left
            pool.shutdown(cancel_futures=True)
    facts = json.loads((dataset.folder / "dataset.json").read_text())
    (folder / "dataset.json.unfinished").write_text(json.dumps({**facts, "root": "images" if files else "."}))
    (folder / "dataset.json.unfinished").rename(folder / "dataset.json")


def _copy_one(pair: tuple[Path, Path]) -> None:
    source, copy = pair
    unfinished = copy.with_name(copy.name + ".unfinished")
    shutil.copyfile(source, unfinished)
    unfinished.rename(copy)
