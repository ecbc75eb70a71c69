"""A folder in the system's temporary folder that no other user can prepare or read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder(name: str, parent: Path | None = None) -> Path:
    """Create `parent/name-UID` with mode 0700, or use it if only this user could write to it; otherwise create another.

    The name is predictable, so another user could have created it first, with programs that this user would then load.
    """
    parent = parent or Path(tempfile.gettempdir())
    folder = parent / f"{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # lstat: a link could lead anywhere
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        folder.chmod(0o700)
    return folder
