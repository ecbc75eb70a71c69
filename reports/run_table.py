"""The table of all runs and comparisons below the folder of runs, with a cache of the rows in that folder.

A row is read again only where one of its files has changed, so that thousands of runs are listed in about a second.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reports.run_rows import COMPARISON, DAMAGED, FILES, OTHER, RUN, Row, default_settings, read_row

VERSION = 2  # of the cache; a change of what a row holds needs another number
CACHE = ".index-cache.json"
DEPTH = 3  # runs/<name>, runs/<comparison>/<name>, and one more
MOST_FOLDERS = 10_000  # without a run that are looked into: --runs-dir may be a home folder
BASE = ("name", "kind", "state", "date")  # columns that come first
RESULTS = (
    *("validation_accuracy", "test_accuracy", "train_loss", "validation_loss", "test_loss", "epoch"),
    *("num_parameters", "training_seconds", "images_per_second", "seed", "seeds", "seeds_mean", "seeds_sd"),
)
LAST = ("commit", "code", "uncommitted_changes", "dataset_fingerprint")


@dataclass(frozen=True)
class Source:
    """A folder that becomes a row, and the size and time of the files that the row is read from."""

    kind: str
    folder: Path
    path: str  # relative to the folder of runs
    name: str  # as the table shows it
    signature: list[list[Any]]


def read_table(runs: Path, results: Path | None = None) -> list[Row]:
    """Return a row for every run and comparison below `runs`, and for every comparison in `results`.

    The cache is written where the folder is writable and anything has changed.
    """
    cache = runs / CACHE
    known = _load(cache)
    entries, has_changed = {}, False
    for source in [*find_runs(runs), *find_comparisons(runs, results)]:
        key = f"{source.kind} {source.path}"
        entry = known.get(key)
        # A damaged folder is read again: its files may have been unreadable for a moment only.
        if entry is None or entry[0] != source.signature or entry[1]["note"].startswith(DAMAGED):
            entry = [source.signature, asdict(read_row(source.kind, source.folder, source.path, source.name))]
            has_changed = has_changed or entry != known.get(key)
        entries[key] = entry
    if has_changed or len(entries) != len(known):
        with suppress(OSError):  # a read-only folder of runs: the table is right without its cache
            replace_file(cache, json.dumps({"version": _version(), "rows": entries}, separators=(",", ":")))
    rows = [Row(**row) for _, row in entries.values()]
    _mark_running(rows, runs)
    _add_seeds(rows)
    return rows


def replace_file(path: Path, text: str) -> None:
    """Replace a file that can be made again: without a flush to the disk, and beside other processes that do the same.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link is kept
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def _version() -> str:
    """Return what a cached row depends on besides its files: this code, and the defaults of settings."""
    defaults = json.dumps(default_settings(), sort_keys=True)
    return f"{VERSION}-{hashlib.sha256(defaults.encode()).hexdigest()[:12]}"


def _load(cache: Path) -> dict[str, Any]:
    """Return the cached rows; a missing, damaged or older cache has none."""
    try:
        content = json.loads(cache.read_text(encoding="utf-8"))
        return content["rows"] if content["version"] == _version() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


# --- folders --------------------------------------------------------------------------------------------------------


def find_runs(runs: Path, prefix: str = "", depth: int = 1, visited: list[str] | None = None) -> Iterator[Source]:
    """Yield the run folders below a folder, and the folders that hold none, in the order of their names."""
    visited = [] if visited is None else visited
    visited.append(prefix)
    try:
        with os.scandir(runs) as found:
            folders = sorted(entry.name for entry in found if entry.name[0] != "." and _is_folder(entry))
    except OSError:
        return
    for name in folders:
        folder, path = runs / name, f"{prefix}{name}"
        signature = signature_of(folder, FILES)
        if any(file[0] == "run.json" for file in signature):
            yield Source(RUN, folder, path, path, signature)
            continue
        below = (
            list(find_runs(folder, f"{path}/", depth + 1, visited))
            if depth < DEPTH and len(visited) < MOST_FOLDERS
            else []
        )
        if any(source.kind == RUN for source in below):
            yield from below
        elif not (folder / "report.json").is_file():
            yield Source(OTHER, folder, path, path, _time_of(folder))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def find_comparisons(runs: Path, results: Path | None) -> Iterator[Source]:
    """Yield the folders with the report of a comparison."""
    for place in dict.fromkeys(place for place in (runs, results) if place is not None):
        for report in sorted(place.glob("*/report.json")):
            folder = report.parent
            name = folder.name if place == runs else f"{place.resolve().name}/{folder.name}"
            signature = signature_of(folder, ("report.json", "report.md"))
            yield Source(COMPARISON, folder, os.path.relpath(folder, runs), name, signature)


def signature_of(folder: Path, names: tuple[str, ...]) -> list[list[Any]]:
    """Return name, size and time of those files of a folder that exist."""
    found = []
    for name in names:
        with suppress(OSError):
            state = os.stat(f"{folder}/{name}")
            found.append([name, state.st_size, state.st_mtime_ns])
    return found


def _time_of(folder: Path) -> list[list[Any]]:
    with suppress(OSError):
        return [["", 0, folder.stat().st_mtime_ns]]
    return []


# --- what depends on more than the files of one folder --------------------------------------------------------------


def _mark_running(rows: list[Row], runs: Path) -> None:
    """Mark unfinished runs whose lock a process of this machine holds.

    The list of locks is read instead of trying the lock, which would stop a run that starts at this moment.
    """
    try:
        locks = Path("/proc/locks").read_text()
    except OSError:  # not Linux
        return
    held = held_files(locks)
    for row in rows if held else []:
        if row.values.get("state") == "unfinished" and row.kind == RUN:
            with suppress(OSError):
                state = (runs / row.path / "lock").stat()
                if _identity(os.major(state.st_dev), os.minor(state.st_dev), state.st_ino) in held:
                    row.values["state"] = "running"


def held_files(locks: str) -> set[tuple[int, int, int]]:
    """Return the identities of the files that the content of /proc/locks names as locked."""
    found = set()
    for line in locks.splitlines():
        if "FLOCK" in line and "->" not in line:  # "->": a process that waits for the lock of the line above
            major, minor, inode = line.split()[5].split(":")
            found.add(_identity(int(major, 16), int(minor, 16), int(inode)))
    return found


def _identity(major: int, minor: int, inode: int) -> tuple[int, int, int]:
    """Return the identity of a file. Without a disk of its own (major 0) the minor numbers differ on Btrfs."""
    return major, minor if major else 0, inode


def _add_seeds(rows: list[Row]) -> None:
    """Add number, mean and standard deviation of the accuracy over the finished runs that differ in their seed only."""
    groups = defaultdict(list)
    for row in rows:
        if row.setting and row.values.get("state") == "finished":
            groups[row.setting].append(row)
    for group in groups.values():
        key = "validation_accuracy" if all("validation_accuracy" in row.values for row in group) else "test_accuracy"
        by_age = sorted(group, key=lambda row: row.values.get("date", ""))  # of several runs of one seed, the newest
        by_seed = {row.values.get("seed"): row.values[key] for row in by_age if key in row.values}
        if len(by_seed) < 2:
            continue
        values = list(by_seed.values())
        found = {"seeds": len(values), "seeds_mean": float(np.mean(values)), "seeds_sd": float(np.std(values, ddof=1))}
        for row in group:
            row.values |= {name: round(value, 6) for name, value in found.items()}


# --- columns --------------------------------------------------------------------------------------------------------


def columns_of(rows: list[Row]) -> list[str]:
    """Return all columns: identity, results, further numbers, settings, and provenance last."""
    present = dict.fromkeys(key for row in rows for key in row.values)
    first = [key for key in (*BASE, *RESULTS) if key in present]
    versions = [key for key in present if key.startswith("versions.")]
    last = [key for key in LAST if key in present] + versions
    return first + [key for key in present if key not in {*first, *last}] + last


def intact_runs(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the values of every run whose settings are known: a damaged folder lacks everything."""
    return [row.values for row in rows if row.kind == RUN and row.setting]


def varied_columns(rows: list[Row]) -> list[str]:
    """Return the columns whose value is not the same in every run or comparison.

    A setting that some runs lack differs between runs: an option of a part, or a limit such as max_steps.
    """
    found: dict[str, set[Any]] = defaultdict(set)
    for row in rows:
        for key, value in row.values.items() if row.kind != OTHER else ():
            found[key].add(value)
    runs = intact_runs(rows)
    for key, values in found.items():
        if 0 < sum(key in run for run in runs) < len(runs):
            values.add(None)
    return [key for key in columns_of(rows) if len(found[key]) > (0 if key in BASE + RESULTS else 1)]
