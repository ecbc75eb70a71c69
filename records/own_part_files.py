"""The files of user-defined parts, kept in the run folder, so that a run is complete without the originals.

own_parts/1/mine.py      the file and the neighboring modules that it imports; a number for each folder of such files

run.json names the copies (`own_parts`: file -> copy) and has a digest of each original (`code`). Evaluation, reports
and exports use the copies: they are the code that was trained, whatever has become of the originals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import write_atomically
from config.own_modules import files_of
from config.own_parts import OwnPart, map_own_parts, own_parts_of

FOLDER = "own_parts"  # in a run folder


def own_files(settings: Mapping[str, Any]) -> list[Path]:
    """Return the files of all user-defined parts in a tree of settings, with the neighbors that they import."""
    return sorted({file for part in own_parts_of(settings) for file in files_of(part.file)})


def copies_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return where the files that the settings name are kept: the path as in settings -> path in the run folder."""
    numbers = _numbers(settings)
    return {
        part.text.rpartition(":")[0]: f"{FOLDER}/{numbers[part.file.parent]}/{part.file.name}"
        for part in own_parts_of(settings)
    }


def _numbers(settings: Mapping[str, Any]) -> dict[Path, int]:
    folders = dict.fromkeys(part.file.parent for part in own_parts_of(settings))
    return {folder: number for number, folder in enumerate(folders, start=1)}


def keep_own_parts(run: Path, settings: Mapping[str, Any], old_name: str | None = None) -> None:
    """Copy the files of user-defined parts into a run folder.

    Args:
        old_name: name that existing copies get instead of being overwritten.
    """
    if old_name and (run / FOLDER).is_dir() and not (run / old_name).exists():
        (run / FOLDER).rename(run / old_name)
    numbers = _numbers(settings)
    for part in own_parts_of(settings):
        for file in files_of(part.file):
            copy = run / FOLDER / str(numbers[part.file.parent]) / file.relative_to(part.file.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(copy, file.read_bytes())


def with_digests(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which a user-defined part is its file's name and a digest, the same on every machine."""

    def portable(text: str, part: OwnPart) -> str:
        digest = hashlib.sha256(b"\0".join(file.read_bytes() for file in files_of(part.file) if file.is_file()))
        return f"{part.file.name}:{part.name} ({digest.hexdigest()[:16]})"

    return map_own_parts(settings, portable)


def kept_settings(run: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in `facts` (of run.json), with user-defined parts that refer to the copies in the run folder.

    Raises:
        RunError: neither the copy nor the original of a part exists.
    """
    copies = facts.get("own_parts", {})

    def kept(text: str, part: OwnPart) -> str:
        path = run / copies[text.rpartition(":")[0]] if text.rpartition(":")[0] in copies else None
        file = path if path and path.is_file() else part.file
        if not file.is_file():
            raise RunError(
                f"{run} was trained with {text}, and neither that file nor its copy {path or run / FOLDER} exists; "
                "restore one of them"
            )
        return OwnPart(file.resolve(), part.name).text

    return map_own_parts(facts["settings"], kept)
