"""The run folder `runs/<name>/`: settings, metrics and checkpoints of one run.

run.json             command, settings, dataset, commit, versions, device: written once, read by resume and evaluate
metrics.jsonl        one line per evaluation, by default per epoch
steps.jsonl          training losses by step (training/trackers.py)
utilisation.jsonl    utilization of GPU, CPU and memory (training/utilization.py)
curves.png           loss and accuracy over the epochs; report.html shows all on one page, pictures/ from report.py
tensorboard/         the same numbers for TensorBoard; wandb_run.txt and mlflow_run.txt hold the id of the run there
state/step-00000780/ a complete checkpoint; a run resumes from the newest one (records/checkpoint_store.py)
lock                 held by the process that trains here, with its number and host
weights.safetensors  the weights after the last epoch, plain fp32; the EMA where ema.decay is set, and then
                     raw_weights.safetensors has the trained weights; best.safetensors of the best validation accuracy
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
from common.files import read_lines, write_atomically
from common.paths import RUNS, near_path
from common.text import python_command, quoted
from records.checkpoint_store import checkpoints_in, step_of

METRICS = "metrics.jsonl"
ASIDE = ".old-"  # and a number: the name of a folder that was renamed to make room
NO_LOCKS = (
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
)  # file systems without locks, where a second process is not kept out


@dataclass
class Progress:
    """Position of a run in optimizer steps; everything else follows from it and the settings."""

    epoch: int = 0  # being trained, or next when step_in_epoch is 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the steps of this epoch, of this process
    loss_sums: list[float] = field(default_factory=list)  # in a checkpoint: of every process, by rank
    skipped_steps: int = 0  # of this epoch, because they were not finite
    training_seconds: float = 0.0  # of this epoch
    data_wait_seconds: float = 0.0  # part of training_seconds
    checkpoint_seconds: float = 0.0  # of this epoch: time that training waited for checkpoints
    warmup_seconds: float = 0.0  # of this epoch, not in training_seconds: first steps after a start, which compile
    timed_images: int = 0  # trained in training_seconds
    num_losses: int = 0  # summands of loss_sum: step_in_epoch minus skipped steps and those that only other peers made
    best_accuracy: float = -1.0  # on the validation split
    best_step: int = 0  # step of best_accuracy; 0: no evaluation yet
    finished: bool = False  # no step is left


class RunFolder:
    """One run folder, written by the main process only."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.metrics_text = ""  # what this process has written, even if the file is damaged meanwhile
        self._lock: IO[str] | None = None

    @property
    def exists(self) -> bool:
        return (self.folder / "run.json").is_file()

    def facts(self) -> dict[str, Any]:
        """Return the content of run.json. Raises RunError where it is missing or unreadable."""
        try:
            facts = json.loads((self.folder / "run.json").read_text())
            if not isinstance(facts, dict):
                raise ValueError("it is not a JSON object")
            return facts
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"{self.folder} is not a run folder (no run.json); runs are in {RUNS.name}/<name>") from None
        except ValueError as error:
            raise RunError(f"{self.folder}/run.json is damaged: {error}") from None

    def create(self, facts: dict[str, Any]) -> None:
        """Create the folder and write run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(facts, indent=2))

    def rename_aside(self) -> Path:
        """Rename the folder to make room for a fresh run; nothing is deleted. Returns the new name.

        Raises:
            RunError: a process trains there.
        """
        self.lock()
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}{ASIDE}{number}")).exists():
            number += 1
        self.folder.rename(aside)
        self.unlock()
        return aside

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a last line that was cut short is skipped."""
        return read_lines(self.folder / METRICS)

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Append a line; a reader never sees a part of it."""
        self.write_metrics(self.metrics_text + json.dumps(line) + "\n")

    def write_metrics(self, text: str) -> None:
        """Replace metrics.jsonl, as when a resumed run returns to the lines of its checkpoint."""
        write_atomically(self.folder / METRICS, text)
        self.metrics_text = text

    def newest_checkpoint(self) -> Path | None:
        """Return the folder of the newest checkpoint; `Checkpoints.newest_intact` also verifies it."""
        found = checkpoints_in(self.folder / "state")
        return found[-1] if found else None

    @staticmethod
    def read_progress(checkpoint: Path) -> Progress:
        values = json.loads((checkpoint / "progress.json").read_text())
        values.pop("epochs_without_better", None)  # earlier commits wrote it; it follows from best_step
        return Progress(**values)

    def is_finished(self) -> bool:
        """Whether nothing was left to do when the newest checkpoint was saved."""
        newest = self.newest_checkpoint()
        if newest is None:
            return False
        facts = self.facts()
        is_estimate = facts.get("max_minutes") and "plan" not in facts
        has_all_steps = not is_estimate and step_of(newest) >= facts["total_steps"]
        try:
            progress = self.read_progress(newest)
        except (OSError, ValueError, TypeError):
            return has_all_steps  # damaged: if steps are left, the next start sets it aside
        # After all steps a peer may still lack the last exchange; then its last epoch has not ended.
        return progress.finished or (has_all_steps and not progress.step_in_epoch)

    def no_epoch(self) -> RunError:
        """Return the error for a run without a finished epoch, with the command that continues it."""
        facts = self.facts()
        command = python_command(*facts["command"])
        if facts.get("num_processes", 1) > 1:  # train.py alone is one process
            command = " ".join(["./launch_local_train.sh", *map(quoted, facts["command"][1:])])
        return RunError(
            f"{near_path(self.folder)} has no finished epoch yet. Wait if it is training, or continue it: {command}"
        )

    # --- one process at a time -------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Create this folder and keep other processes out of it until this process ends, even if it is killed.

        Raises:
            RunError: another process trains there, or the folder cannot be written.
        """
        path = self.folder / "lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = path.open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            assert self._lock is not None  # flock raised it, after the file was opened
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            raise RunError(
                f"{near_path(self.folder)} is in use: {holder} trains there; "
                "wait until it ends, stop it, or choose another --name"
            ) from None
        except OSError as error:
            if self._lock is None or error.errno not in NO_LOCKS:
                raise RunError(
                    f"{near_path(self.folder)} cannot be written ({error.strerror}); choose another --runs-dir"
                ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def newest_run(runs: Path, needed: str) -> Path:
    """Return the run folder in `runs` that was trained last; one without the file `needed` only if no other is there.

    Raises:
        RunError: there is no run.
    """
    found = [path.parent for path in runs.glob("*/run.json")]
    if not found:
        raise RunError(f"there is no run in {runs} yet; start one with ./launch_local_train.sh")
    return max(found, key=lambda folder: (_has_content(folder / needed), _trained_at(folder)))


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _trained_at(folder: Path) -> float:
    """Return when training last wrote a result, or run.json where it has none; evaluations write other files."""
    return max((folder / name).stat().st_mtime for name in ("run.json", METRICS) if (folder / name).is_file())
