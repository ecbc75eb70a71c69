"""Where a dataset's images come from: a download, or a drawing. Each source fills a folder with `{train,test}/<class>/*.png`.

    fill("cifar100", target=Path("data/cifar100/.partial/images"), downloads=Path("data/cifar100"))

In: a name of SOURCES, the folder to fill, the folder where downloads stay (a second run finds them there and needs no network).
Downloads go on where they stopped, and a file is used only after its checksum, or every byte of the zip, was verified.
"""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.progress import progress
from image_data.preparation.archives import check_zip, unpack
from image_data.preparation.drawn_shapes import draw_shapes
from image_data.preparation.image_tree import PrepareError

CIFAR100_DRIVE_ID = "1MYQyvXFoxakvQBWnGd1NF5iUO23VATj1"  # a zip of cifar100/{train,test}/<class>/*.png
TORONTO = "https://www.cs.toronto.edu/~kriz/"
TORONTO_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
TIMEOUT_SECONDS = 30
BLOCK = 1 << 20


def fill(dataset: str, target: Path, downloads: Path, shapes: dict | None = None) -> None:
    """Fill `target` with the tree of `dataset`. Raises PrepareError when it cannot be had."""
    if dataset not in SOURCES:
        raise PrepareError(f"unknown dataset '{dataset}'; known are {', '.join(SOURCES)}, or give --archive or --root")
    if shapes and dataset != "shapes":
        raise PrepareError(
            f"options for drawing shapes have no effect on '{dataset}'; drop them or choose --dataset shapes"
        )
    SOURCES[dataset](target, downloads, **(shapes or {}))


def cifar100(target: Path, downloads: Path) -> None:
    """The zip of PNG files from Google Drive; when that fails, the original archive: both give the same names and pixels."""
    archive, original = downloads / "cifar100.zip", downloads / "cifar-100-python.tar.gz"
    if not archive.exists() and not original.exists():
        try:
            _from_drive(CIFAR100_DRIVE_ID, archive)
        except Exception as error:  # gdown raises its own errors, those of requests, and OSError
            reason = error if isinstance(error, PrepareError) else type(error).__name__
            print(
                f"warning: Google Drive gave no cifar100.zip ({reason}); trying {TORONTO}{original.name}",
                file=sys.stderr,
            )
            _from_toronto(original)
    unpack(archive if archive.exists() else original, target)


def cifar10(target: Path, downloads: Path) -> None:
    archive = downloads / "cifar-10-python.tar.gz"
    if not archive.exists():
        _from_toronto(archive)
    unpack(archive, target)


def shapes(target: Path, downloads: Path, **options: int) -> None:
    try:
        draw_shapes(target, **options)
    except (TypeError, ValueError) as error:
        raise PrepareError(
            f"cannot draw shapes: {error}; the options are side, train_per_class and test_per_class"
        ) from None


SOURCES = {"cifar100": cifar100, "cifar10": cifar10, "shapes": shapes}


def _from_drive(drive_id: str, archive: Path) -> None:
    import gdown

    whole = archive.with_name(archive.name + ".unchecked")
    gdown.download(id=drive_id, output=str(whole), resume=True, quiet=not sys.stderr.isatty(), timeout=TIMEOUT_SECONDS)
    try:
        check_zip(whole)
    except PrepareError:
        whole.unlink(missing_ok=True)
        raise
    whole.replace(archive)


def _from_toronto(archive: Path) -> None:
    """Download to `<name>.part`, going on where an earlier try stopped, and rename when the MD5 is right."""
    part = archive.with_name(archive.name + ".part")
    try:
        _download(TORONTO + archive.name, part)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        raise PrepareError(
            f"cannot download {TORONTO}{archive.name} ({_one_line(error)}); without a network give --archive FILE "
            "(a zip or tar of a class tree, or that file fetched elsewhere), or use --dataset shapes"
        ) from None
    md5 = _md5(part)
    if md5 != TORONTO_MD5[archive.name]:
        part.unlink()
        raise PrepareError(
            f"{TORONTO}{archive.name} arrived damaged (MD5 {md5} instead of {TORONTO_MD5[archive.name]}) and was deleted; "
            "try again"
        )
    part.replace(archive)


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to fetch: the checksum will tell whether the file is right
            return
        raise
    resumed = response.status == 206  # a server that ignores the range sends the whole file with 200
    with response, open(part, "ab" if resumed else "wb") as sink:
        size = int(response.headers.get("Content-Length", 0))
        for block in progress(_blocks(response), size, f"downloading {url} (bytes)", weigh=len):
            sink.write(block)
    if size and part.stat().st_size < size + have * resumed:
        raise OSError("the connection closed early; run again to go on")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__
