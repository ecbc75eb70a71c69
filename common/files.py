"""Files that are written whole or not at all, read back, and counted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import RunError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a machine that loses power, sees the old content or the new, nothing between.

    Raises:
        RunError: it cannot be written; the old content is as it was.
    """
    temporary = path.with_name(path.name + ".unfinished")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            f"{os.path.relpath(path)} could not be written ({error.strerror}); what stood there before is untouched. "
            "Mend the disk and start again"
        ) from error


def flush_to_disk(path: Path, forget: bool = False) -> None:
    """Return when the disk has the file or folder; `forget` lets the next reader ask the disk rather than the memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def room_left(folder: Path) -> int:
    """Bytes that may still be written where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gigabytes(count: int) -> str:
    """A number of bytes for a person."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; a torn last one (power cut) is left out, a file that is not there is empty."""
    lines = path.read_text().split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines[:-1] if line]
