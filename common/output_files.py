"""Files and folders that an option names as output: checked before the work, and sentences for full disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from common.errors import SettingsError
from common.text import quoted

FULL = (errno.ENOSPC, errno.EDQUOT)
LOCKED = (errno.EROFS, errno.EACCES, errno.EPERM)


def check_output_file(path: Path, option: str) -> None:
    """Raise SettingsError where the file of an option cannot be written: no such folder, a folder itself, read-only."""
    if path.is_dir():
        raise SettingsError(f"{option} {path} is a folder. Name a file, for example {option} {quoted(path / 'NAME')}")
    if path.exists() and not path.is_file():  # a device or a pipe, which is written as it is
        if not os.access(path, os.W_OK):
            raise SettingsError(f"{option} {path} is not writable. Choose another file")
        return
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    check_output_folder(target.parent, f"{option} {path}")


def check_picture_suffix(path: Path, option: str) -> None:
    """Raise SettingsError where the file of an option is no picture."""
    if path.suffix not in (".png", ".svg"):
        raise SettingsError(f"{option} ends in .png or .svg, not '{path.suffix}'")


def check_output_folder(folder: Path, what: str) -> None:
    """Raise SettingsError where a folder does not exist or is not writable. `what` names the option that needs it."""
    if not folder.is_dir():
        raise SettingsError(f"{what}: the folder {folder} does not exist. Create it: mkdir -p {quoted(folder)}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"{what}: the folder {folder} is not writable. Choose another one")


def check_new_folder(folder: Path, option: str) -> None:
    """Raise SettingsError where a folder neither exists as a writable one nor can be created."""
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise SettingsError(f"{option} {folder}: {above} is not a folder. Choose another {option}")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SettingsError(f"{option} {folder}: {above} is read-only. Choose another {option}")


def disk_problem(error: OSError) -> str | None:
    """Return the sentence for a disk that is full or read-only, which names the place; None for other errors."""
    place = error.filename
    if error.errno in FULL:
        return f"{place or 'the output'} cannot be written, because its disk is full; free some space and start again"
    if error.errno in LOCKED and place:
        return f"{place} cannot be used ({error.strerror}); change its permissions, or name another folder (--help)"
    return None
