"""Named datasets: downloads and drawings that fill a folder with `{train,test}/<class>/*.png`.

    fill("cifar100", target=Path("data/cifar100/.partial/images"), downloads=Path("data/cifar100"))

Downloaded archives stay in `downloads`, so a second run needs no network. Interrupted downloads resume. An archive is
used only if its checksum is the known one.
"""

from __future__ import annotations

import hashlib
import http.client
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import StoppedError
from common.output_files import FULL
from common.progress import progress
from common.stop_signal import stopped_at_once
from image_data.preparation.archives import check_zip, unpack
from image_data.preparation.image_tree import PrepareError

CIFAR100_DRIVE_ID = "1MYQyvXFoxakvQBWnGd1NF5iUO23VATj1"  # a zip of cifar100/{train,test}/<class>/*.png
CIFAR100_SHA256 = "96f95ef818a62f2fcca205d4e44e2d827f0ec528eaadf0b61bf701738d73b3f8"  # of that zip, 143,759,829 bytes
TORONTO = "https://www.cs.toronto.edu/~kriz/"
TORONTO_MD5 = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
}
TIMEOUT_SECONDS = 30
BLOCK = 1 << 20


def fill(dataset: str, target: Path, downloads: Path, shapes: dict | None = None) -> None:
    """Fill `target` with the image tree of `dataset`.

    Args:
        dataset: a name of SOURCES.
        downloads: folder of the downloaded archives.
        shapes: side, train_per_class and test_per_class of the dataset 'shapes'.

    Raises:
        PrepareError: the dataset is unknown, or cannot be downloaded.
    """
    if dataset not in SOURCES:
        raise PrepareError(
            f"unknown dataset '{dataset}' (known: {', '.join(SOURCES)}). Choose one, or use "
            "prepare_dataset.py --archive or --root"
        )
    if shapes and dataset != "shapes":
        raise PrepareError(
            f"options for drawing shapes do not apply to '{dataset}'. Omit them, or choose --dataset shapes"
        )
    SOURCES[dataset](target, downloads, **(shapes or {}))


def cifar100(target: Path, downloads: Path) -> None:
    """Use the zip of PNG files from Google Drive, else the original archive; both give the same names and pixels."""
    archive, original = downloads / "cifar100.zip", downloads / "cifar-100-python.tar.gz"
    if not archive.exists() and not original.exists():
        try:
            _from_drive(CIFAR100_DRIVE_ID, archive)
        except StoppedError:
            raise
        except Exception as error:  # gdown raises its own errors, those of requests, and OSError
            if getattr(error, "errno", None) in FULL:
                raise
            reason = error if isinstance(error, PrepareError) else type(error).__name__
            print(
                f"warning: cannot download cifar100.zip from Google Drive ({reason}); trying {TORONTO}{original.name}",
                file=sys.stderr,
            )
            _from_toronto(original)
    if archive.exists():
        _verify(archive, hashlib.sha256, CIFAR100_SHA256)
        unpack(archive, target)
    else:
        _verify(original, hashlib.md5, TORONTO_MD5[original.name])
        unpack(original, target)


def cifar10(target: Path, downloads: Path) -> None:
    """Use the original archive of CIFAR-10."""
    archive = downloads / "cifar-10-python.tar.gz"
    if not archive.exists():
        _from_toronto(archive)
    _verify(archive, hashlib.md5, TORONTO_MD5[archive.name])
    unpack(archive, target)


def shapes(target: Path, downloads: Path, **options: int) -> None:
    """Draw ten simple shapes; needs no network."""
    try:
        from image_data.preparation.drawn_shapes import draw_shapes  # late: only it draws, with Pillow

        draw_shapes(target, **options)
    except StoppedError:
        raise
    except (TypeError, ValueError) as error:
        raise PrepareError(
            f"cannot draw shapes: {error}. The options are side, train_per_class and test_per_class"
        ) from None


SOURCES = {"cifar100": cifar100, "cifar10": cifar10, "shapes": shapes}


def _from_drive(drive_id: str, archive: Path) -> None:
    import gdown

    unchecked = archive.with_name(archive.name + ".unchecked")
    # Without cookies: gdown keeps them in the home folder, which may be read-only.
    with stopped_at_once(f"downloading {archive.name}"):
        gdown.download(
            id=drive_id,
            output=str(unchecked),
            resume=True,
            quiet=not sys.stderr.isatty(),
            timeout=TIMEOUT_SECONDS,
            use_cookies=False,
        )
    try:
        check_zip(unchecked)  # a better message than a wrong checksum: Drive may answer with a page of HTML
        _verify(unchecked, hashlib.sha256, CIFAR100_SHA256)
    except PrepareError:
        unchecked.unlink(missing_ok=True)
        raise
    unchecked.replace(archive)


def _from_toronto(archive: Path) -> None:
    """Download to `<name>.part`, resuming an earlier attempt, and rename it if the MD5 is right."""
    part = archive.with_name(archive.name + ".part")
    try:
        _download(TORONTO + archive.name, part)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        if getattr(error, "errno", None) in FULL:
            raise
        raise PrepareError(
            f"cannot download {TORONTO}{archive.name} ({_one_line(error)}). Without a network use --dataset shapes, or "
            "--archive FILE (a zip or tar of a class tree, or this file downloaded elsewhere)"
        ) from None
    md5 = _digest(part, hashlib.md5)
    if md5 != TORONTO_MD5[archive.name]:
        part.unlink()
        raise PrepareError(
            f"{TORONTO}{archive.name} arrived damaged (MD5 {md5} instead of {TORONTO_MD5[archive.name]}) and was "
            "deleted. Try again"
        )
    part.replace(archive)


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing is left to download; the checksum shows whether the file is right
            return
        raise
    resumed = response.status == 206  # a server that ignores the range sends the whole file with 200
    with response, open(part, "ab" if resumed else "wb") as sink:
        size = int(response.headers.get("Content-Length", 0))
        for block in progress(_blocks(response), size, f"downloading {url} (bytes)", weigh=len):
            sink.write(block)
    if size and part.stat().st_size < size + have * resumed:
        raise OSError("the connection closed early; run the command again to resume")


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        yield block


def _verify(path: Path, algorithm: Callable, expected: str) -> None:
    """Raise PrepareError unless a downloaded archive has the known digest."""
    found = _digest(path, algorithm)
    if found != expected:
        raise PrepareError(
            f"{path} is not the published file ({algorithm.__name__.removeprefix('openssl_')} {found}, expected "
            f"{expected}). Delete it to download it again, or use it nevertheless with --archive {path}"
        )


def _digest(path: Path, algorithm: Callable) -> str:
    digest = algorithm(usedforsecurity=False)
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
    return digest.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__
