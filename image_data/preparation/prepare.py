"""Archive, download or image tree -> the files that training reads (see image_data/dataset.py for what they are)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DatasetError
from common.paths import DATA
from image_data.dataset import DEFAULT, FORMAT, LIST_FILES, Dataset
from image_data.preparation.archives import unpack
from image_data.preparation.decoding import (
    SplitFacts,
    available_cores,
    decode_image,
    decode_split,
    decoder,
    first_side,
    mean_and_std,
)
from image_data.preparation.downloads import fill
from image_data.preparation.image_tree import (
    CIFAR_SIDE,
    PrepareError,
    Tree,
    broken_warnings,
    conversion_warnings,
    duplicate_warnings,
    jpeg_warning,
    list_tree,
    looks_like_jpeg,
)

PACK_LIMIT_GIB = 8.0
JPEG_SAMPLE = 1000  # training images looked at for traces of JPEG
PREPARED_FROM = "prepared_from.json"  # beside dataset.json: the archive or dataset that it was made from
OURS = ".unpacked"  # an empty file that marks <data-dir>/images as made by this script, which may then replace it


@dataclass(frozen=True)
class Survey:
    """What decoding every image found, and the arrays it packed into `packed` (None when they were not packed)."""

    facts: dict[str, SplitFacts]
    packed: Path | None
    warnings: list[str]


def prepare(
    data_dir: str | Path | None = None,
    dataset: str | None = None,
    archive: str | Path | None = None,
    root: str | Path | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    pack_limit_gib: float = PACK_LIMIT_GIB,
    force: bool = False,
    shapes: dict[str, int] | None = None,
) -> Dataset:
    """Prepare a dataset and return it. Raises PrepareError with one sentence that names the thing and the mend.

    Give at most one of `dataset` (a name of SOURCES, default cifar100), `archive` and `root`. A folder that is prepared already
    is returned as it is unless `force`. `shapes` holds side, train_per_class, test_per_class for the dataset 'shapes'.
    """
    if (archive is not None) + (root is not None) + (dataset is not None) > 1:
        raise PrepareError("give only one of --dataset, --archive and --root")
    if workers is not None and workers < 1:
        raise PrepareError(f"--workers must be at least 1, not {workers}")
    started = time.perf_counter()
    folder = _default_folder(dataset, archive, root) if data_dir is None else Path(data_dir)
    source = next((given for given in (archive, root, dataset) if given is not None), None)
    try:
        if not Dataset.is_prepared(folder) or force:
            for option, path, exists in (("--archive", archive, os.path.isfile), ("--root", root, os.path.isdir)):
                if path is not None and not exists(path):
                    raise PrepareError(f"{option} {path} does not exist; check the path")
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not Dataset.is_prepared(folder) or force:
                    _make(
                        folder,
                        dataset,
                        archive,
                        root,
                        shapes,
                        workers or available_cores(),
                        skip_broken,
                        pack_limit_gib,
                    )
                    ready = Dataset.open(folder)
                    print(f"prepared in {time.perf_counter() - started:.1f} s: {_describe(ready)}")
                    return ready
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or error
        raise PrepareError(
            f"cannot prepare {folder} ({what}); check permissions and free space, or choose another --data-dir"
        ) from error
    ready = Dataset.open(folder)
    print(
        f"already prepared: {_describe(ready)}"
        + (f"\n  '{source}' was not looked at; --force to redo from it" if source else "")
    )
    return ready


def find_or_prepare(data_dir: Path | None, dataset: str | None, archive: Path | None) -> Path:
    """The folder of a prepared dataset, prepared if need be; the first process of each host does that, the others wait.

    Raises:
        DatasetError: a folder of the user's own that holds neither a dataset nor a tree, and no word on what to put there;
            or an archive or a dataset that a prepared folder was not made from, and that would be ignored.
    """
    folder = Path(data_dir or DATA / (dataset or DEFAULT))
    if not Dataset.is_prepared(folder):
        if data_dir and not (archive or dataset or (folder / "train").is_dir()):
            raise DatasetError(
                f"--data-dir {folder} holds neither a prepared dataset nor images in train/<class>/; check the path, "
                "or say with --archive FILE or --dataset NAME what to put there"
            )
        prepare(folder, dataset=None if archive else dataset, archive=archive)
    elif archive or (data_dir and dataset):
        _refuse_another_source(folder, dataset, archive)
    return folder


def _refuse_another_source(folder: Path, dataset: str | None, archive: Path | None) -> None:
    """Raises DatasetError where `folder` is known to be prepared from something else than what was given."""
    option, given = ("--archive", archive) if archive else ("--dataset", dataset)
    if archive and not archive.is_file():
        raise DatasetError(
            f"--archive {archive} does not exist; check the path, or leave it out: {folder} is prepared already"
        )
    try:
        made_from = json.loads((folder / PREPARED_FROM).read_text())
    except (OSError, ValueError):  # prepared before this was written down
        print(
            f"note: {folder} is prepared already, so {option} {given} was not read; prepare_dataset.py --force reads it again"
        )
        return
    if made_from != _source(dataset, archive, None):
        raise DatasetError(
            f"{folder} was prepared from {next(iter(made_from.values()))}, and {option} {given} would be ignored; "
            "choose another --data-dir, or prepare it anew with prepare_dataset.py --force"
        )


def _source(dataset: str | None, archive: str | Path | None, root: str | Path | None) -> dict[str, str | int]:
    """What a folder is prepared from, as far as another machine could tell."""
    if archive is not None:
        return {"archive": Path(archive).name, "bytes": os.path.getsize(archive)}
    return {"root": Path(root).name} if root is not None else {"dataset": dataset or DEFAULT}


def _make(
    folder: Path,
    dataset: str | None,
    archive: str | Path | None,
    root: str | Path | None,
    shapes: dict[str, int] | None,
    workers: int,
    skip_broken: bool,
    pack_limit_gib: float,
) -> None:
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        tree = list_tree(_find_images(folder, partial, dataset, archive, root, shapes))
        survey = _survey(tree, partial, workers, skip_broken, pack_limit_gib)
        for warning in (*tree.warnings, *survey.warnings):
            print(f"warning: {warning}", file=sys.stderr)
        (folder / PREPARED_FROM).write_text(json.dumps(_source(dataset, archive, root)) + "\n")
        _write(folder, partial, tree, survey)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _default_folder(dataset: str | None, archive: str | Path | None, root: str | Path | None) -> Path:
    if root is not None:
        return Path(root)
    return Path("data", Path(archive).name.split(".")[0] if archive is not None else dataset or DEFAULT)


def _find_images(
    folder: Path,
    partial: Path,
    dataset: str | None,
    archive: str | Path | None,
    root: str | Path | None,
    shapes: dict[str, int] | None,
) -> Path:
    """The root of an image tree: one that exists, or `partial/images`, newly filled."""
    if root is not None:
        return Path(root)
    if archive is None and dataset is None and (folder / "train").is_dir():
        print(f"using the images that lie in {folder}/train")
        return folder
    if (folder / "images").exists() and not (folder / "images" / OURS).exists():
        raise PrepareError(
            f"{folder}/images is in the way and was not made by this script; "
            "move it, give it as --root, or choose another --data-dir"
        )
    images = partial / "images"
    images.mkdir()
    if archive is not None:
        unpack(Path(archive), images)
    else:
        fill(dataset or DEFAULT, images, folder, shapes)
    (images / OURS).touch()
    return images


def _survey(tree: Tree, partial: Path, workers: int, skip_broken: bool, pack_limit_gib: float) -> Survey:
    """Decode every image once; pack when one square size fits all and the arrays fit the budget."""
    side = first_side(tree.root, tree.paths["train"])
    gib = sum(map(len, tree.paths.values())) * (side or 0) ** 2 * 3 / 2**30
    packed = partial / "packed" if side and gib <= pack_limit_gib else None
    if packed:
        packed.mkdir()
    with decoder(workers) as decode:
        facts = {
            split: decode_split(
                decode, tree.root, paths, side, packed and packed / f"{split}.npy", f"decoding {split} images"
            )
            for split, paths in tree.paths.items()
        }
    broken = [pair for found in facts.values() for pair in found.broken]
    warnings = broken_warnings(tree, {split: found.kept for split, found in facts.items()}, broken, skip_broken)
    sizes = set().union(*(found.sizes for found in facts.values()))
    if len(sizes) > 1 or not side:
        packed = None
        small, large = _extremes(sizes)
        warnings.append(
            f"image sizes vary from {small[0]}x{small[1]} to {large[0]}x{large[1]}"
            if len(sizes) > 1
            else f"the images are {small[0]}x{small[1]}, not square"
        )
        warnings[-1] += ": they are not packed, training will read the files"
    elif not packed:
        warnings.append(
            f"packed arrays would take {gib:.1f} GiB, more than --pack-limit-gib {pack_limit_gib:g}: they are not packed, "
            "training will read the files"
        )
    warnings += conversion_warnings(facts["train"].kinds + facts["test"].kinds)
    warnings += _jpeg_warnings(tree, facts, sizes)
    kept = {split: [tree.paths[split][i] for i in facts[split].kept] for split in facts}
    warnings += duplicate_warnings(kept, {split: facts[split].digests for split in facts})
    return Survey(facts, packed, warnings)


def _jpeg_warnings(tree: Tree, facts: dict[str, SplitFacts], sizes: set[tuple[int, int]]) -> list[str]:
    """CIFAR-sized images that are JPEG files, or were JPEG files once."""
    if sizes != {(CIFAR_SIDE, CIFAR_SIDE)}:
        return []
    if count := sum(found.formats["JPEG"] for found in facts.values()):
        return [jpeg_warning(f"{count} images of {CIFAR_SIDE}x{CIFAR_SIDE} pixels are stored as JPEG")]
    kept = facts["train"].kept
    sample = [tree.root / tree.paths["train"][kept[i]] for i in range(0, len(kept), math.ceil(len(kept) / JPEG_SAMPLE))]
    if looks_like_jpeg(np.stack([decode_image(path)[0] for path in sample])):
        return [jpeg_warning(f"the {CIFAR_SIDE}x{CIFAR_SIDE} images show the traces of JPEG compression")]
    return []


def _write(folder: Path, partial: Path, tree: Tree, survey: Survey) -> None:
    """Put everything in its place: dataset.json goes first and comes last, so it never stands beside files it does not describe."""
    facts, fresh = survey.facts, partial / "images"
    root = folder / "images" if tree.root == fresh else tree.root
    listings = {split: [(tree.paths[split][i], tree.labels[split][i]) for i in facts[split].kept] for split in facts}
    sizes = set().union(*(found.sizes for found in facts.values()))
    small, large = _extremes(sizes)
    side = small[0] if len(sizes) == 1 and small[0] == small[1] else None
    mean, std = mean_and_std(facts["train"].histogram)
    description = {
        "format": FORMAT,
        "num_classes": len(tree.classes),
        "num_images": {split: len(rows) for split, rows in listings.items()},
        "image_side": side,
        "packed": survey.packed is not None,
        "mean": mean,
        "std": std,
        "root": Path(os.path.relpath(root.resolve(), folder.resolve())).as_posix(),
        "fingerprint": _fingerprint(tree.classes, listings, facts),
    }
    if side is None:
        description |= {"smallest_image": small, "largest_image": large}
    texts = {"labels.txt": "".join(f"{name}\n" for name in tree.classes)}
    texts |= {
        LIST_FILES[split]: "".join(f"{path}\t{label}\n" for path, label in rows) for split, rows in listings.items()
    }
    texts["dataset.json"] = json.dumps(description, indent=2, sort_keys=True) + "\n"
    for name, text in texts.items():
        (partial / name).write_bytes(text.encode())

    (folder / "dataset.json").unlink(missing_ok=True)
    if tree.root == fresh:
        if (folder / "images").exists():
            os.replace(folder / "images", partial / "replaced")
        os.replace(fresh, folder / "images")
    for split in facts:
        (folder / "packed" / f"{split}.npy").unlink(missing_ok=True)
        if survey.packed:
            (folder / "packed").mkdir(exist_ok=True)
            os.replace(survey.packed / f"{split}.npy", folder / "packed" / f"{split}.npy")
    for name in texts:
        os.replace(partial / name, folder / name)


def _fingerprint(classes: list[str], listings: dict[str, list[tuple[str, int]]], facts: dict[str, SplitFacts]) -> str:
    """SHA-256 over class names, and path, label and decoded pixels of every image."""
    digest = hashlib.sha256("".join(f"{name}\n" for name in classes).encode())
    for split, rows in listings.items():
        for (path, label), pixels in zip(rows, facts[split].digests, strict=True):
            digest.update(f"{split}\t{path}\t{label}\n".encode() + pixels)
    return f"sha256:{digest.hexdigest()}"


def _extremes(sizes: set[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest and the largest (width, height) by number of pixels."""
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return by_area[0], by_area[-1]


def _describe(ready: Dataset) -> str:
    side = f"{ready.image_side}x{ready.image_side}" if ready.image_side else "not of one square size"
    packed = "packed" if ready.splits["train"].packed else "not packed, read as files"
    mean, std = ("/".join(f"{value:.4f}" for value in values) for values in (ready.mean, ready.std))
    train, test = len(ready.splits["train"]), len(ready.splits["test"])
    return (
        f"{ready.folder}\n  {len(ready.classes)} classes, {train} training and {test} test images, {side}, {packed}\n"
        f"  mean {mean}, std {std}\n  {ready.fingerprint}"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two runs that start at once (several ranks or jobs): the second waits, then finds the folder prepared."""
    with open(folder / ".prepare.lock", "w") as file:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
