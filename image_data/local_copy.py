"""Copy a prepared dataset to a disk of this host before training, where the files live on a slow or shared one.

The copy is named after the dataset's fingerprint, made once a host (other processes wait), goes on where it was cut
short, and counts as complete only when its dataset.json, written last, is there.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.errors import DatasetError
from common.progress import progress
from image_data.dataset import LIST_FILES, Dataset

COPY_THREADS = 16  # small files: latency, not bandwidth, is what costs


def stage(dataset: Dataset, target: Path, files: bool) -> Dataset:
    """The same dataset, read from below `target`.

    Args:
        files: copy the image files too (the `files` source needs them; packed pixels make them superfluous).

    Raises:
        DatasetError: not enough room, or a file that cannot be copied.
    """
    folder = (
        Path(target)
        / f"{dataset.folder.name}-{dataset.fingerprint.removeprefix('sha256:')[:16]}{'-files' if files else ''}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Dataset.is_prepared(folder):
            try:
                _copy(dataset, folder, files)
            except OSError as error:
                raise DatasetError(f"cannot stage {dataset.folder} to {folder}: {error}") from None
    staged = Dataset.open(folder)
    if staged.fingerprint != dataset.fingerprint:
        raise DatasetError(f"{folder} holds another dataset than {dataset.folder}; delete it")
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
            f"staging to {folder} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; choose another --stage-to"
        )
    for parent in {copy.parent for _, copy in missing}:
        parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(COPY_THREADS) as pool:
        for _ in progress(pool.map(_copy_one, missing), total=len(missing), what="staging"):
            pass
    facts = json.loads((dataset.folder / "dataset.json").read_text())
    (folder / "dataset.json.unfinished").write_text(json.dumps({**facts, "root": "images" if files else "."}))
    (folder / "dataset.json.unfinished").rename(folder / "dataset.json")


def _copy_one(pair: tuple[Path, Path]) -> None:
    source, copy = pair
    unfinished = copy.with_name(copy.name + ".unfinished")
    shutil.copyfile(source, unfinished)
    unfinished.rename(copy)
