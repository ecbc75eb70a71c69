"""An archive -> the tree of images in it: zip or tar of a class tree, or the original python archives of CIFAR-10 and CIFAR-100.

    unpack(Path("cifar100.zip"), Path("somewhere/images"))      gives somewhere/images/train/<class>/*.png, and test

Archives come from strangers: members that would leave the target folder, links and devices are refused by name, and the
pickles inside the CIFAR archives are read by an unpickler that can build lists, dicts and byte arrays and nothing else.
"""

from __future__ import annotations

import gzip
import lzma
import pickle
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from common.progress import progress
from common.text import listed
from image_data.preparation.image_tree import TEST_NAMES, PrepareError, is_hidden

DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    gzip.BadGzipFile,
    EOFError,
    RuntimeError,
    NotImplementedError,
)
BATCHES = {  # folder in the archive: files of each split, file of the class names, key of the labels, key of the class names
    "cifar-10-batches-py": (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar-100-python": ({"train": ["train"], "test": ["test"]}, "meta", "fine_labels", "fine_label_names"),
}


@dataclass(frozen=True)
class Member:
    """A file in an archive; `parts` is its path, `open()` a readable binary file."""

    parts: tuple[str, ...]
    open: Callable


def unpack(archive: Path, target: Path) -> None:
    """Write the tree that `archive` holds into `target`. On any error some files may lie there: the caller removes `target`."""
    try:
        with _members(archive) as members:
            known = {member.parts[-2] for member in members if len(member.parts) > 1} & set(BATCHES)
            if known:
                _unpack_batches(archive, members, known.pop(), target)
            else:
                _unpack_tree(archive, members, target)
    except DAMAGE as error:
        raise PrepareError(f"{archive} is damaged or cut short ({error}); delete it and fetch it again") from None


def check_zip(archive: Path) -> None:
    """Raise PrepareError unless every byte of the zip is whole and it holds train/ and test/."""
    try:
        with _members(archive) as members, zipfile.ZipFile(archive) as file:
            root = _root_of_tree(archive, members)
            inside = {
                member.parts[len(root)]
                for member in members
                if member.parts[: len(root)] == root and len(member.parts) > len(root)
            }
            if missing := {"train", "test"} - inside:
                raise PrepareError(f"{archive} holds no {missing.pop()} folder")
            if bad := file.testzip():
                raise PrepareError(f"{archive} is damaged at '{bad}'")
    except DAMAGE as error:
        raise PrepareError(f"{archive} is damaged or cut short ({error})") from None


@contextmanager
def _members(archive: Path) -> Iterator[list[Member]]:
    """The regular files of a zip or tar, all names checked."""
    if not archive.is_file():
        raise PrepareError(f"{archive} is not a file; give --archive the path of a zip or tar archive")
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            kinds = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "symbolic link"}
            entries = [
                (
                    info.filename,
                    "folder" if info.is_dir() else kinds.get(stat.S_IFMT(info.external_attr >> 16), "device"),
                    partial(file.open, info),
                )
                for info in file.infolist()
            ]
            yield _safe(archive, entries)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as file:
            yield _safe(archive, [(info.name, _tar_kind(info), partial(file.extractfile, info)) for info in file])
    else:
        raise PrepareError(
            f"{archive} is neither a zip nor a tar archive, or it is cut short; fetch it again or give another --archive"
        )


def _tar_kind(info: tarfile.TarInfo) -> str:
    if info.isreg() or info.isdir():
        return "file" if info.isreg() else "folder"
    return "symbolic link" if info.issym() else "hard link" if info.islnk() else "device"


def _safe(archive: Path, entries: list[tuple[str, str, Callable]]) -> list[Member]:
    """Refuse what could write outside the target; drop folders and the droppings of operating systems."""
    members, refused = [], []
    for raw_name, kind, opener in entries:
        name = raw_name.replace("\\", "/")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if name.startswith("/") or re.match("[A-Za-z]:/", name) or ".." in parts:
            refused.append(f"{raw_name} (leads outside)")
        elif kind not in ("file", "folder"):
            refused.append(f"{raw_name} ({kind})")
        elif kind == "file" and parts and not any(map(is_hidden, parts)):
            members.append(Member(parts, opener))
    if refused:
        raise PrepareError(
            f"{archive} is refused because of {len(refused)} unsafe member(s): {listed(refused)}; "
            "it must hold plain files and folders only, so pack it again from a tree you trust"
        )
    return members


def _root_of_tree(archive: Path, members: list[Member]) -> tuple[str, ...]:
    """The folder that contains train/, nearest to the top of the archive."""
    roots = {member.parts[: member.parts.index("train")] for member in members if "train" in member.parts[:-1]}
    if not roots:
        raise PrepareError(
            f"{archive} holds no train/ folder; expected train/<class>/*.png and test/<class>/*.png, "
            "or an original cifar-10-python.tar.gz or cifar-100-python.tar.gz"
        )
    depth = min(map(len, roots))
    nearest = sorted("/".join(root) for root in roots if len(root) == depth)
    if len(nearest) > 1:
        raise PrepareError(
            f"{archive} holds several trees ({listed(nearest)}); unpack it and give one of them as --root"
        )
    return tuple(PurePosixPath(nearest[0]).parts)


def _unpack_tree(archive: Path, members: list[Member], target: Path) -> None:
    root = _root_of_tree(archive, members)
    depth = len(root)
    wanted = [
        member for member in members if member.parts[:depth] == root and member.parts[depth] in ("train", *TEST_NAMES)
    ]
    for member in progress(wanted, len(wanted), "unpacking"):
        file = target.joinpath(*member.parts[depth:])
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with member.open() as source, open(file, "xb") as sink:
                shutil.copyfileobj(source, sink)
        except FileExistsError:
            raise PrepareError(f"{archive} holds '{'/'.join(member.parts)}' twice; pack it again") from None


def _unpack_batches(archive: Path, members: list[Member], folder: str, target: Path) -> None:
    """The python archives: pickled dicts of pixel rows (N, 3 * 32 * 32), labels and file names."""
    splits, meta, label_key, names_key = BATCHES[folder]
    files = {member.parts[-1]: member for member in members if member.parts[-2:-1] == (folder,)}
    if missing := [name for name in (meta, *splits["train"], *splits["test"]) if name not in files]:
        raise PrepareError(
            f"{archive} lacks {listed(f'{folder}/{name}' for name in missing)}; fetch the whole archive again"
        )
    try:
        classes = _unpickle(archive, files[meta])[names_key]
        for split, names in splits.items():
            for name in names:
                batch = _unpickle(archive, files[name])
                pixels = batch["data"].value.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                rows = list(zip(pixels, batch[label_key], batch["filenames"], strict=True))
                _write_images(progress(rows, len(rows), f"writing {split} images of {name}"), classes, target / split)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, PrepareError):
            raise
        raise PrepareError(
            f"{archive} is damaged: {folder} does not hold what CIFAR holds ({error!r}); fetch it again"
        ) from None


def _write_images(rows: Iterator[tuple[np.ndarray, int, str]], classes: list[str], folder: Path) -> None:
    from PIL import Image

    for pixels, label, name in rows:
        for text in (classes[label], name):
            if text.startswith(".") or "/" in text or "\\" in text or not text.isprintable():
                raise ValueError(f"unsafe name {text!r}")
        stem = PurePosixPath(name).stem
        file, copy = folder / classes[label] / f"{stem}.png", 2
        file.parent.mkdir(parents=True, exist_ok=True)
        while file.exists():
            file, copy = file.with_name(f"{stem}_{copy}.png"), copy + 1
        Image.fromarray(np.ascontiguousarray(pixels)).save(file)


class _Bytes:
    """Stands in for numpy.ndarray while unpickling: takes the state of a uint8 array and nothing else."""

    def __init__(self, *_: object) -> None:
        self.value = np.zeros(0, dtype=np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, raw = state
        if dtype.name not in ("u1", "uint8"):
            raise ValueError(f"pixels of type {dtype.name!r}")
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Type:
    """Stands in for numpy.dtype."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _Bytes,
        ("numpy._core.multiarray", "_reconstruct"): _Bytes,
        ("numpy", "ndarray"): _Bytes,
        ("numpy", "dtype"): _Type,
        ("_codecs", "encode"): lambda text, encoding: text.encode(
            "latin1"
        ),  # how Python 3 stores bytes in an old protocol
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return self.ALLOWED[module, name]


def _unpickle(archive: Path, member: Member) -> dict:
    try:
        with member.open() as file:
            return _Unpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise PrepareError(
            f"{archive} is refused: '{'/'.join(member.parts)}' is not a plain CIFAR batch (it asks for {error}); "
            "fetch the original from https://www.cs.toronto.edu/~kriz/cifar.html"
        ) from None
