"""Preparation: archive, download or image tree -> the files that training reads (listed in image_data/dataset.py)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from common.display import escaped
from common.errors import DatasetError
from common.output_files import FULL
from common.paths import DATA, near_path
from common.stop_signal import end_if_stopped, lock_when_free
from common.text import python_command
from image_data.dataset import DEFAULT, FORMAT, LIST_FILES, PREPARED_FROM, Dataset, prepare_first, read_object
from image_data.image_file import MAX_MEGAPIXELS
from image_data.preparation.archives import unpack
from image_data.preparation.decoding import SplitFacts, available_cores, mean_and_std
from image_data.preparation.downloads import fill
from image_data.preparation.image_tree import TEST_NAMES, PrepareError, Tree, list_tree
from image_data.preparation.source import OURS, Source, is_copy_of, recorded, refuse_another_source
from image_data.preparation.survey import Options, Survey, extremes, survey_images

PACK_LIMIT_GIB = 8.0
MAX_WORKERS = 1024


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
    test_fraction: float | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    unpack_limit_gib: float | None = None,
    say_ready: bool = True,
) -> Dataset:
    """Prepare a dataset and return it. A folder that is already prepared is returned unchanged.

    Args:
        data_dir: folder to write to; default: see `Source.default_folder`.
        dataset, archive, root: source of the images, at most one of them; default: see `Source.completed`.
        workers: decoding processes; default: one per available core.
        skip_broken: skip images that cannot be decoded; otherwise they are an error.
        pack_limit_gib: largest size of the packed arrays.
        force: prepare again.
        shapes: side, train_per_class and test_per_class of the dataset 'shapes'.
        test_fraction: share of each class to use as the test split, for a tree without one.
        max_megapixels: larger images count as broken.
        unpack_limit_gib: largest unpacked size of an archive; default: see `archives.unpack`.
        say_ready: say so if nothing had to be prepared.

    Raises:
        PrepareError: the dataset cannot be prepared; the message names the cause and the fix.
    """
    if (archive is not None) + (root is not None) + (dataset is not None) > 1:
        raise PrepareError("give only one of --dataset, --archive and --root")
    started = time.perf_counter()
    source = Source(dataset, _expand(archive), _expand(root))
    folder = _expand(data_dir) or source.default_folder()
    options = Options(
        min(available_cores(), MAX_WORKERS) if workers is None else workers,
        skip_broken,
        pack_limit_gib,
        test_fraction,
        max_megapixels,
        unpack_limit_gib,
        shapes,
    )
    _check_numbers(options)
    try:
        if not Dataset.is_prepared(folder) or force:
            _check_exists(source)
            _refuse_file(folder)
            with _created_and_locked(folder):
                if not Dataset.is_prepared(folder) or force:
                    _make(folder, source.completed(folder), options)
                    ready = Dataset.open(folder)
                    print(f"prepared in {time.perf_counter() - started:.1f} s: {_describe(ready)}")
                    return ready
    except OSError as error:
        raise PrepareError(_explain(error, folder, source)) from error
    ready = Dataset.open(folder)
    if say_ready:
        given = next((given for given in (archive, root, dataset) if given is not None), None)
        print(
            f"already prepared: {_describe(ready)}"
            + (f"\n  '{given}' was not read; --force prepares again from it" if given else "")
        )
    return ready


def _check_numbers(options: Options) -> None:
    """Raise PrepareError for an option that is out of its range."""
    if not 1 <= options.workers <= MAX_WORKERS:
        raise PrepareError(f"--workers must lie between 1 and {MAX_WORKERS}, got {options.workers}")
    if options.test_fraction is not None and not 0 < options.test_fraction < 1:
        raise PrepareError(f"--test-fraction must lie between 0 and 1, got {options.test_fraction}")
    for name, value in (("--pack-limit-gib", options.pack_limit_gib), ("--max-megapixels", options.max_megapixels)):
        if not value >= 0:
            raise PrepareError(f"{name} must be >= 0, got {value}")
    if options.unpack_limit_gib is not None and not options.unpack_limit_gib > 0:
        raise PrepareError(f"--unpack-limit-gib must be > 0, got {options.unpack_limit_gib}")


def _check_exists(source: Source) -> None:
    """Raise PrepareError if the archive or the folder of images is not there, or is the other of the two."""
    for option, path, exists, other in (
        ("--archive", source.archive, os.path.isfile, "is not a file. For a folder use prepare_dataset.py --root"),
        ("--root", source.root, os.path.isdir, "is not a folder. For a zip or tar use --archive"),
    ):
        if path is not None and not exists(path):
            wrong = other if os.path.exists(path) else "does not exist. Check the path"
            raise PrepareError(f"{option} {path} {wrong}")


def find_or_prepare(
    data_dir: Path | None, dataset: str | None, archive: Path | None, skip_broken: bool = False
) -> Path:
    """Return the folder of a prepared dataset; prepare it first if necessary.

    The first process of each host prepares, and the others wait for it.

    Raises:
        DatasetError: `data_dir` holds neither a prepared dataset nor a tree, and no source is given or recorded; or it
            was prepared from another archive or dataset than the one given.
    """
    folder = data_dir or DATA / (dataset or DEFAULT)
    if not Dataset.is_prepared(folder):
        if archive and not data_dir and not dataset and not is_copy_of(DEFAULT, archive.name):
            raise DatasetError(
                f"--archive {archive} would be prepared in {near_path(folder)}, the folder of CIFAR-100. "
                "Add --data-dir DIR to name a folder for it"
            )
        if data_dir and not (archive or dataset or os.path.isdir(folder / "train") or recorded(folder)):
            if os.path.isdir(folder) and os.listdir(folder):
                list_tree(folder)  # raises: it says what the folder holds instead of train
            raise DatasetError(
                f"--data-dir {folder} holds neither a prepared dataset nor images in train/<class>/. Check the path, "
                f"or run: {prepare_first(folder)}"
            )
        prepare(folder, dataset=None if archive else dataset, archive=archive, skip_broken=skip_broken, say_ready=False)
    if archive or dataset:  # also if another process has prepared it meanwhile
        refuse_another_source(folder, dataset, archive)
    return folder


def _expand(path: str | Path | None) -> Path | None:
    """Return the path, whose ~ is the home folder also where another program calls `prepare`."""
    return None if path is None else Path(os.path.expanduser(path))


def _explain(error: OSError, folder: Path, source: Source) -> str:
    """Return the message for a file that cannot be read or written while `folder` is prepared."""
    what = f"{error.strerror or error}: {error.filename}" if error.filename else error.strerror or error
    if error.errno in FULL:
        return f"cannot prepare {folder} ({what}). Free disk space, or choose another --data-dir"
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and not os.access(there, os.W_OK):
        tree = source.root or (folder if os.path.isdir(folder / "train") else None)
        again = tree and python_command("prepare_dataset.py", "--root", tree, "--data-dir", "NEW")
        fix = f"Run: {again}" if again else "Choose another --data-dir"
        return f"cannot prepare {folder} ({what}), because it is read-only. {fix}"
    return f"cannot prepare {folder} ({what}). Check permissions and free space, or choose another --data-dir"


def _make(folder: Path, source: Source, options: Options) -> None:
    has_test = any((folder / name).is_dir() for name in TEST_NAMES)
    if source.root == folder and options.test_fraction is None and not has_test:  # again, with --force
        options = replace(options, test_fraction=read_object(folder / "dataset.json").get("test_fraction"))
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        root = _find_images(folder, partial, source, options)
        tree = list_tree(root, options.test_fraction, name=str(source.archive or source.root or folder))
        if options.test_fraction is not None:
            test, images = len(tree.paths["test"]), sum(map(len, tree.paths.values()))
            print(
                f"split by file name: {test} of {images} images are the test split "
                f"(--test-fraction {options.test_fraction:g})"
            )
        survey = survey_images(tree, partial, options)
        for warning in (*tree.warnings, *survey.warnings):
            print(f"warning: {escaped(warning)}", file=sys.stderr)
        _write(folder, partial, tree, survey, options, source.record())
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _find_images(folder: Path, partial: Path, source: Source, options: Options) -> Path:
    """Return the root of an image tree: an existing one, or `partial/images` after filling it."""
    if source.root is not None:
        if source.root == folder and (folder / "train").is_dir():
            print(f"using the images in {folder}/train")
        return source.root
    if (folder / "images").exists() and not (folder / "images" / OURS).exists():
        raise PrepareError(
            f"{folder}/images exists and was not written by this script. "
            "Move it, use it as prepare_dataset.py --root, or choose another --data-dir"
        )
    images = partial / "images"
    images.mkdir()
    if source.archive is not None:
        unpack(source.archive, images, options.unpack_limit_gib, needs_splits=options.test_fraction is None)
    else:
        fill(source.dataset or DEFAULT, images, folder, options.shapes)
    (images / OURS).touch()
    return images


def _write(
    folder: Path, partial: Path, tree: Tree, survey: Survey, options: Options, made_from: dict[str, str | int]
) -> None:
    """Move everything into `folder`, with the record of the source that it was made from.

    dataset.json is removed first and written last, so that it never describes files of another preparation.
    """
    facts, fresh = survey.facts, partial / "images"
    root = folder / "images" if tree.root == fresh else tree.root
    listings = {split: [(tree.paths[split][i], tree.labels[split][i]) for i in facts[split].kept] for split in facts}
    sizes = set().union(*(found.sizes for found in facts.values()))
    small, large = extremes(sizes)
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
    if options.test_fraction is not None:
        description["test_fraction"] = options.test_fraction
    if side is None:
        description |= {"smallest_image": small, "largest_image": large}
    texts = {"labels.txt": "".join(f"{name}\n" for name in tree.classes)}
    texts |= {
        LIST_FILES[split]: "".join(f"{path}\t{label}\n" for path, label in rows) for split, rows in listings.items()
    }
    texts["dataset.json"] = json.dumps(description, indent=2, sort_keys=True) + "\n"
    for name, text in {**texts, PREPARED_FROM: json.dumps(made_from) + "\n"}.items():
        (partial / name).write_bytes(text.encode())

    (folder / "dataset.json").unlink(missing_ok=True)
    os.replace(partial / PREPARED_FROM, folder / PREPARED_FROM)  # first: an end from here on is prepared again from it
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
    """Return the SHA-256 of class names and of path, label and decoded pixels of every image."""
    digest = hashlib.sha256("".join(f"{name}\n" for name in classes).encode())
    for split, rows in listings.items():
        for (path, label), pixels in zip(rows, facts[split].digests, strict=True):
            digest.update(f"{split}\t{path}\t{label}\n".encode() + pixels)
    return f"sha256:{digest.hexdigest()}"


def _describe(ready: Dataset) -> str:
    side = f"{ready.image_side}x{ready.image_side}" if ready.image_side else "no common square size"
    packed = "packed" if ready.splits["train"].packed else "not packed (training reads the files)"
    mean, std = ("/".join(f"{value:.4f}" for value in values) for values in (ready.mean, ready.std))
    train, test = len(ready.splits["train"]), len(ready.splits["test"])
    return (
        f"{ready.folder}\n  {len(ready.classes)} classes, {train} training and {test} test images, {side}, {packed}\n"
        f"  mean {mean}, std {std}\n  {ready.fingerprint}"
    )


def _refuse_file(folder: Path) -> None:
    """Raise PrepareError if a folder cannot exist, because it or one above it is a file."""
    for path in (folder, *folder.parents):
        if os.path.exists(path):
            if not os.path.isdir(path):
                raise PrepareError(f"{path} is a file, not a folder. Choose another --data-dir")
            return


@contextmanager
def _created_and_locked(folder: Path) -> Iterator[None]:
    """Create and lock a folder: of several ranks or jobs that start at once, one prepares, and the others wait.

    After an error, the lock and the folders that were created are removed; a folder that holds something else is kept.
    """
    lock = folder / ".prepare.lock"
    with ExitStack() as stack:
        while True:
            end_if_stopped(f"preparing {folder}")
            created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "w"))
            with suppress(OSError):  # some network file systems do not support locks
                lock_when_free(file, f"waiting for the process that prepares {folder}")
            # Else the process that held the lock has failed and removed it.
            if os.path.exists(lock) and os.path.samestat(os.fstat(file.fileno()), os.stat(lock)):
                break
        try:
            yield
        except BaseException:
            with suppress(OSError):
                lock.unlink()
                for path in created:
                    path.rmdir()
            raise
