"""The original Python archives of CIFAR-10 and CIFAR-100: pickled batches -> PNG files in class folders."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from common.errors import UserError
from common.progress import progress
from common.text import listed
from image_data.preparation.image_tree import PrepareError

# Folder in the archive -> files of each split, file of the class names, key of the labels, key of the class names.
BATCHES = {
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
    """A file in an archive: parts of its path, size in bytes, and a function that opens it for reading."""

    parts: tuple[str, ...]
    size: int
    open: Callable


def write_batches(archive: Path, members: list[Member], folder: str, target: Path) -> None:
    """Write the images of pickled batches: dicts of pixel rows (N, 3 * 32 * 32), labels and file names."""
    splits, meta, label_key, names_key = BATCHES[folder]
    files = {member.parts[-1]: member for member in members if member.parts[-2:-1] == (folder,)}
    if missing := [name for name in (meta, *splits["train"], *splits["test"]) if name not in files]:
        raise PrepareError(f"{archive} lacks {listed(f'{folder}/{name}' for name in missing)}. Download it again")
    try:
        classes = _unpickle(archive, files[meta])[names_key]
        for split, names in splits.items():
            for name in names:
                batch = _unpickle(archive, files[name])
                pixels = batch["data"].value.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                rows = list(zip(pixels, batch[label_key], batch["filenames"], strict=True))
                _write_images(progress(rows, len(rows), f"writing {split} images of {name}"), classes, target / split)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise PrepareError(
            f"{archive} is damaged: {folder} does not hold the data of CIFAR ({error!r}). Download it again"
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
    """Replaces numpy.ndarray while unpickling; accepts only the state of a uint8 array."""

    def __init__(self, *_: object) -> None:
        self.value = np.zeros(0, dtype=np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, raw = state
        if dtype.name not in ("u1", "uint8"):
            raise ValueError(f"pixels of type {dtype.name!r}")
        data = raw.encode("latin1") if isinstance(raw, str) else raw
        self.value = np.frombuffer(data, dtype=np.uint8).reshape(shape, order="F" if is_fortran else "C")


class _Type:
    """Replaces numpy.dtype while unpickling."""

    def __init__(self, name: str, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Unpickles nothing but plain Python objects and byte arrays: a pickle can otherwise run any code."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _Bytes,
        ("numpy._core.multiarray", "_reconstruct"): _Bytes,
        ("numpy", "ndarray"): _Bytes,
        ("numpy", "dtype"): _Type,
        # Python 3 stores bytes in this form in an old protocol.
        ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
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
            f"{archive} is rejected: '{'/'.join(member.parts)}' is not a plain CIFAR batch (it refers to {error}). "
            "Download the original from https://www.cs.toronto.edu/~kriz/cifar.html"
        ) from None
