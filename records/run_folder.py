"""The run folder `runs/<name>/`: what was run, how it went, and what is needed to go on.

run.json             command, settings, dataset, commit, versions, device: written once, read by resume and evaluate
metrics.jsonl        one line an epoch
steps.jsonl          training losses by step; utilisation.jsonl what GPU, CPU and memory did (training/trackers.py, training/utilization.py)
curves.png           loss and accuracy over the epochs; report.html everything on one page, pictures/ from report.py
tensorboard/         the same numbers for TensorBoard
state/step-00000780/ a complete checkpoint; the newest one is where a resumed run goes on (records/checkpoint_store.py)
lock                 held by the process that trains here, with its number and host
weights.safetensors  the weights after the last epoch, plain fp32, averaged where ema.decay is set (raw_weights.safetensors
                     then holds those that were trained); best.safetensors where a held-out part chose one
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from common.errors import RunError
from common.files import write_atomically
from common.paths import RUNS

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # file systems that know no locks: nobody is kept out there


@dataclass
class Progress:
    """Where a run stands, counted in optimiser steps; everything else follows from it and the settings."""

    epoch: int = 0  # being trained, or next when step_in_epoch is 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the steps of this epoch, of this process
    loss_sums: list[float] = field(default_factory=list)  # in a checkpoint: of every process, by rank
    skipped_steps: int = 0  # of this epoch, because they were not finite
    training_seconds: float = 0.0  # of this epoch
    data_wait_seconds: float = 0.0  # part of training_seconds
    checkpoint_seconds: float = 0.0  # that training waited for checkpoints in this epoch
    warmup_seconds: float = 0.0  # of this epoch, on top: the first steps after a start, which compile or warm up
    timed_images: int = 0  # trained in training_seconds
    num_losses: int = 0  # that make loss_sum: step_in_epoch, but for steps that were skipped, or that only others made
    best_accuracy: float = -1.0  # on the held-out part
    best_step: int = 0  # at which it was reached; 0: nothing chose yet
    epochs_without_better: int = 0
    finished: bool = False  # no step is left to make


class RunFolder:
    """One run folder, written by the main process only."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.metrics_text = ""  # what the process that trains here has written, whatever happens to the file
        self._lock: IO[str] | None = None

    @property
    def exists(self) -> bool:
        return (self.folder / "run.json").is_file()

    def facts(self) -> dict[str, Any]:
        """The content of run.json. Raises RunError when there is none or it cannot be read."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(
                f"{self.folder} is not a run folder (no run.json); runs live in {RUNS.name}/<name>"
            ) from None
        except ValueError as error:
            raise RunError(f"{self.folder}/run.json is damaged: {error}") from None

    def create(self, facts: dict[str, Any]) -> None:
        """Make the folder and write run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(facts, indent=2))

    def rename_aside(self) -> Path:
        """Rename the folder to make room for a fresh run; nothing is deleted. Returns the new name.

        Raises:
            RunError: a process trains there.
        """
        self.lock()
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        self.unlock()
        return aside

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that was cut short is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines[:-1] if line]

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line; a reader sees the file before or after, never a part of the line."""
        self.write_metrics(self.metrics_text + json.dumps(line) + "\n")

    def write_metrics(self, text: str) -> None:
        """Replace metrics.jsonl, as when a resumed run goes back to what its checkpoint knew."""
        write_atomically(self.folder / "metrics.jsonl", text)
        self.metrics_text = text

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest finished checkpoint; whether it is undamaged, `Checkpoints.newest_intact` knows."""
        found = sorted((self.folder / "state").glob("step-*"))
        return found[-1] if found else None

    @staticmethod
    def read_progress(checkpoint: Path) -> Progress:
        return Progress(**json.loads((checkpoint / "progress.json").read_text()))

    def is_finished(self) -> bool:
        """Whether no step was left to make when the newest checkpoint was saved."""
        newest = self.newest_checkpoint()
        if newest is None:
            return False
        if int(newest.name.removeprefix("step-")) >= self.facts()["total_steps"]:
            return True
        try:
            return self.read_progress(newest).finished  # before the last step, by its own decision
        except (OSError, ValueError, TypeError):
            return False  # damaged: the next start will see to it

    # --- one process at a time -------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Keep other processes out of this folder, which is made, until this process ends, in whatever way.

        Raises:
            RunError: another process trains there, or the folder cannot be written.
        """
        path = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise RunError(
                f"{os.path.relpath(self.folder)} is in use: {self._lock.read().strip() or 'another process'} trains there; "
                "wait for its end, stop it, or choose another --name"
            ) from None
        except OSError as error:
            if self._lock is None or error.errno not in NO_LOCKS:
                raise RunError(
                    f"{os.path.relpath(self.folder)} cannot be written ({error.strerror}); choose another --runs-dir"
                ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def newest_run(runs: Path) -> Path:
    """The run folder in `runs` whose metrics or start are the most recent. Raises RunError when there is none."""
    found = [path.parent for path in runs.glob("*/run.json")]
    if not found:
        raise RunError(f"there is no run in {runs} yet; start one with ./launch_local_train.sh")
    return max(found, key=lambda folder: max(file.stat().st_mtime for file in folder.glob("*.json*")))
