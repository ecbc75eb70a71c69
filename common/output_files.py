"""Files that an option names as output, checked before the work begins rather than after it."""

from __future__ import annotations

import os
from pathlib import Path

from common.errors import SettingsError


def check_output_file(path: Path, option: str) -> None:
    """Raise SettingsError where the file of an option cannot be written: no such folder, a folder itself, read-only."""
    if path.is_dir():
        raise SettingsError(f"{option} {path} is a folder. Name a file, for example {option} {path / 'NAME'}")
    check_output_folder(path.parent, f"{option} {path}")


def check_output_folder(folder: Path, what: str) -> None:
    """Raise SettingsError where a folder does not exist or is not writable. `what` names the option that needs it."""
    if not folder.is_dir():
        raise SettingsError(f"{what}: the folder {folder} does not exist. Create it: mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"{what}: the folder {folder} is not writable. Choose another one")
