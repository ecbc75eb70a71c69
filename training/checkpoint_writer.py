"""Checkpointing during training: when one is due, what it holds, and the thread that writes it.

Gathering the state is collective and makes training wait. Writing, verifying and removing older checkpoints happens on
the main process alone, in the background. The next checkpoint and the end of the run wait for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from common.errors import RunError
from common.files import write_atomically
from inference.trained_model import TrainedModel
from parallel.engine import Engine
from parallel.process_group import limit_waits
from records.checkpoint_store import ENGINE, PROGRESS, Checkpoints, Interval
from records.run_folder import Progress, RunFolder

SAVE_SECONDS = 1800.0  # longest time of a checkpoint before the waiting processes give up


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after a step, in memory; the tensors are on the main process.

    Attributes:
        tensors: the state; None on other processes, and where only weight files are written.
        facts: content of engine.json.
        weights: tensors of the weight files, by file name.
        loss_sums: sum of the epoch's losses, by rank.
        seconds: time that training waited for the snapshot.
    """

    step: int
    tensors: dict[str, Tensor] | None
    facts: dict[str, Any]
    weights: dict[str, dict[str, Tensor] | None]
    loss_sums: list[float]
    seconds: float


class CheckpointWriter:
    """Takes snapshots of a run and writes them in the background, one after the other."""

    def __init__(
        self,
        engine: Engine,
        interval: Interval,
        conditions: dict[str, Any],
        record: RunFolder | None,
        checkpoints: Checkpoints | None,
    ):
        """`record` and `checkpoints` are None on all but the main process."""
        self.engine, self.interval, self.conditions = engine, interval, conditions
        self.record, self.checkpoints = record, checkpoints
        self._run_text = json.dumps(record.facts(), indent=2) if record else ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # Python waits for this thread at exit
        self._writing: Future | None = None
        self._last = (engine.step, time.monotonic())

    def update_facts(self, changed: dict[str, Any]) -> None:
        """Replace entries of run.json, here and in the checkpoints to come."""
        if self.record:
            facts = json.loads(self._run_text) | changed
            self._run_text = json.dumps(facts, indent=2)
            self.record.create(facts)

    def is_due(self) -> bool:
        """Whether the checkpoint interval within an epoch has passed."""
        step, moment = self._last
        return self.engine.step - step >= self.interval.steps or time.monotonic() - moment >= self.interval.seconds

    def is_due_after(self, epoch: int) -> bool:
        """Whether the end of an epoch, counted from 1, gets a checkpoint."""
        return epoch % self.interval.epochs == 0

    def has_saved_now(self) -> bool:
        """Whether the engine's present step has a checkpoint, or is where this process started."""
        return self._last[0] == self.engine.step

    def has_failed(self) -> bool:
        """Whether writing failed; the next `take_snapshot` or `wait` raises the error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def take_snapshot(
        self,
        progress: Progress,
        weights: dict[str, Callable[[], dict[str, Tensor] | None]] | None = None,
        state: bool = True,
    ) -> Snapshot:
        """Gather the state, and the tensors of the weight files. Collective.

        Args:
            weights: for each file name, the function that gathers its tensors.
            state: False writes the weight files alone, without a checkpoint.
        """
        began = time.perf_counter()
        self.wait()
        loss_sums = self.engine.all_gather_objects(progress.loss_sum)
        tensors = self.engine.gather_state() if state else None
        gathered = {gather: gather() for gather in (weights or {}).values()}  # once, even for two files
        if state:
            self._last = (self.engine.step, time.monotonic())
        facts = {**self.engine.state_facts(), "conditions": self.conditions}
        files = {name: gathered[gather] for name, gather in (weights or {}).items()}
        return Snapshot(self.engine.step, tensors, facts, files, loss_sums, time.perf_counter() - began)

    def write(self, snapshot: Snapshot, progress: Progress, then: Callable[[], None] | None = None) -> None:
        """Write the weights, then the checkpoint with `progress`, in the background of the main process.

        A snapshot without a state writes its weights alone.

        Args:
            then: called in the background once all is on the disk; what it prints is true even if the run is killed.
        """
        if self.record is None:
            return
        sums = snapshot.loss_sums if progress.step_in_epoch or progress.num_losses else []
        texts = {
            ENGINE: json.dumps(snapshot.facts),
            PROGRESS: json.dumps(asdict(replace(progress, loss_sum=0.0, loss_sums=sums))),
            "run.json": self._run_text,
            "metrics.jsonl": self.record.metrics_text,
        }
        self._writing = self._thread.submit(self._write, snapshot, texts, progress.best_step, then)

    def _write(
        self, snapshot: Snapshot, texts: dict[str, str], best_step: int, then: Callable[[], None] | None
    ) -> None:
        from safetensors.torch import save

        assert self.record is not None and self.checkpoints is not None  # `write` returns on other processes
        tensors = snapshot.tensors
        checked = tensors if tensors is not None else (list(snapshot.weights.values())[0] or {})
        invalid = next((key for key, tensor in checked.items() if tensor.isnan().any()), None)
        if invalid:
            raise RunError(
                f"{invalid} contains NaN after step {snapshot.step:,}, so this state is not saved; "
                "the last checkpoint is unchanged. Try a lower optimizer.params.lr"
            )
        # One entry: safetensors writes several in random order, and equal weights must give equal files.
        about = {"trained": json.dumps(TrainedModel.open(self.record.folder).metadata)}
        # The weights first: a run with its last checkpoint counts as finished, and must have its weights.
        for name, weights in snapshot.weights.items():
            assert weights is not None
            write_atomically(self.record.folder / name, save(weights, metadata=about))
        if tensors is not None:
            self.checkpoints.write(snapshot.step, tensors, texts, best_step)
        if then is not None:
            then()

    def wait(self) -> None:
        """Wait until nothing is being written. Collective: other processes wait up to SAVE_SECONDS for a slow disk.

        Raises:
            RunError: the checkpoint could not be written.
        """
        limit_waits(SAVE_SECONDS)
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self.engine.any(False)
        limit_waits()
