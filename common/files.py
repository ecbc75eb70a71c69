"""Atomic writes, checksums, JSON lines and free disk space."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.paths import near_path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part of it, even after a power loss.

    A link is kept, and the file that it leads to is replaced. A device or a pipe is written as it is.

    Raises:
        RunError: the file cannot be written; its old content is unchanged.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise RunError(f"{near_path(path)} could not be written ({error.strerror})") from error
        return
    target = Path(os.path.realpath(path))
    # Host and process: two processes may write the same file, also through a shared file system.
    temporary = target.with_name(f"{target.name}.{platform.node()}-{os.getpid()}.unfinished")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        flush_to_disk(temporary)
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            f"{near_path(path)} could not be written ({error.strerror}); its previous content is unchanged. "
            "Free or repair the disk and start again"
        ) from error


def flush_to_disk(path: Path, forget: bool = False) -> None:
    """Flush a file or folder to the disk; `forget` drops it from the page cache, so that reads ask the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def room_left(folder: Path) -> int:
    """Return the free bytes of the disk that holds `folder`, which need not exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def bytes_text(count: int) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a JSON-lines file; a missing file has none, and a torn last line is skipped.

    Raises:
        RunError: a line is no JSON object.
    """
    try:
        lines = path.read_text().split("\n") if path.is_file() else []
        values = [json.loads(line) for line in lines[:-1] if line]
    except ValueError as error:
        raise RunError(f"{near_path(path)} is damaged ({error}). Delete its damaged lines") from None
    if not all(isinstance(value, dict) for value in values):
        raise RunError(f"{near_path(path)} is damaged (a line is no JSON object). Delete its damaged lines")
    return values
