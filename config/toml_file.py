"""TOML files of the user, read with errors that name the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from common.errors import SettingsError


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """Return the tree of a TOML file.

    Raises:
        SettingsError: the file cannot be read or is not valid TOML; the message calls it `name`.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # imported here, because launch_distributed_train.sh needs this module without packages

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"{name} is not valid TOML: {error}") from error
