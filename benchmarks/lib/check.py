"""What `benchmarks/gpu_check.py` consists of: the facts of one check, a part of it, and how a part can end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.paths import PROJECT
from image_data.dataset import Dataset


class Skipped(Exception):
    """This machine cannot run a part, or does not need it; the message says why."""


class NotReached(Exception):
    """A part failed; the message says how."""


@dataclass(frozen=True)
class Check:
    """Facts about the machine and the command line that the parts use."""

    out: Path
    num_gpus: int
    quick: bool
    data_dir: Path | None
    archive: Path | None
    small: bool = False  # tiny networks on a CPU, to rehearse the timed phases
    end_at: float | None = None  # on the monotonic clock; None: no limit
    began: float = 0.0  # on the clock of the output folder: an older file is of an earlier check

    def seconds_left(self) -> float:
        """Return the seconds until the end of a timed check; infinity for others."""
        return float("inf") if self.end_at is None else self.end_at - time.monotonic()

    @property
    def data(self) -> Path:
        """The dataset that the parts use."""
        if self.data_dir is not None:
            return self.data_dir.resolve()
        if self.archive is not None:
            return self.out / "dataset"
        own = PROJECT / "data" / "cifar100"
        return own if Dataset.is_prepared(own) and not self.quick else self.out / "shapes"

    def file(self, name: str) -> Path:
        return self.out / name

    def read(self, name: str) -> str:
        """Return the text of a file that this check has written into the output folder.

        Raises:
            FileNotFoundError: there is none, or it is of an earlier check.
        """
        file = self.file(name)
        if not file.is_file() or file.stat().st_mtime < self.began:
            raise FileNotFoundError(f"{name} was not written")
        return file.read_text()

    def batch(self, images: int) -> str:
        """Return the setting for a global batch size near `images` that all GPUs share evenly."""
        shares = max(1, self.num_gpus)
        return f"train_batch_size={images // shares * shares}"


@dataclass(frozen=True)
class Part:
    """One part. A large GPU needs far less than the limits for the full and for the quick check."""

    what: str
    commands: Callable[[Check], list[list[str]]]
    read: Callable[[Check, str], dict[str, Any]]
    limit_seconds: float
    quick_seconds: float
    at_once: bool = False  # run all commands concurrently

    def limit(self, check: Check) -> float:
        """Return the time limit in seconds: four times as long on a CPU, and never beyond the end of a timed check."""
        limit = (self.quick_seconds if check.quick else self.limit_seconds) * (1 if check.num_gpus else 4)
        return min(limit, check.seconds_left())


def program(name: str, *words: object) -> list[str]:
    return [sys.executable, str(PROJECT / name), *map(str, words)]
