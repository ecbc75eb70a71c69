"""A pickle that runs code."""

from __future__ import annotations

import os
from pathlib import Path


class Bomb:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, folder: Path | str):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)
