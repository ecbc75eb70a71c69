"""When a checkpoint is due, what goes into it, and the thread that writes it while training goes on.

Taking the state is collective and makes training wait; writing, proving and clearing up behind it are the main process's
business alone, in the background. The next checkpoint, and the end of the run, wait for it.
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

SAVE_SECONDS = 1800.0  # that a checkpoint may take before the processes that wait for it give up


@dataclass(frozen=True)
class Snapshot:
    """A run's state after a step, in memory; the tensors are on the main process."""

    step: int
    tensors: dict[str, Tensor] | None
    facts: dict[str, Any]  # of engine.json
    weights: dict[str, dict[str, Tensor] | None]  # by the names of their files
    loss_sums: list[float]  # by rank
    seconds: float  # that training waited for it


class CheckpointWriter:
    """Takes snapshots of a run and writes them, one after the other."""

    def __init__(
        self,
        engine: Engine,
        interval: Interval,
        conditions: dict[str, Any],
        record: RunFolder | None,
        checkpoints: Checkpoints | None,
    ):
        """`record` and `checkpoints` on the main process."""
        self.engine, self.interval, self.conditions = engine, interval, conditions
        self.record, self.checkpoints = record, checkpoints
        self._run_text = json.dumps(record.facts(), indent=2) if record else ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # Python waits for it at its end
        self._writing: Future | None = None
        self._last = (engine.step, time.monotonic())

    def is_due(self) -> bool:
        """Whether the interval is over."""
        step, moment = self._last
        return self.engine.step - step >= self.interval.steps or time.monotonic() - moment >= self.interval.seconds

    def has_failed(self) -> bool:
        """Whether writing has ended in an error, which the next `snapshot` or `settle` will raise."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def take_snapshot(
        self, progress: Progress, weights: dict[str, Callable[[], dict[str, Tensor] | None]] | None = None
    ) -> Snapshot:
        """The state as it is, and what else goes into files of their own, by their names: how to gather it. Collective."""
        began = time.perf_counter()
        self.wait()
        loss_sums = self.engine.all_gather_objects(progress.loss_sum)
        tensors = self.engine.gather_state()
        gathered = {gather: gather() for gather in (weights or {}).values()}  # once, where it goes into two files
        self._last = (self.engine.step, time.monotonic())
        facts = {**self.engine.state_facts(), "conditions": self.conditions}
        files = {name: gathered[gather] for name, gather in (weights or {}).items()}
        return Snapshot(self.engine.step, tensors, facts, files, loss_sums, time.perf_counter() - began)

    def write(self, snapshot: Snapshot, progress: Progress) -> None:
        """Write the weights, then the checkpoint with `progress`, in the background of the main process."""
        if self.record is None:
            return
        texts = {
            ENGINE: json.dumps(snapshot.facts),
            PROGRESS: json.dumps(
                asdict(replace(progress, loss_sum=0.0, loss_sums=snapshot.loss_sums if progress.step_in_epoch else []))
            ),
            "run.json": self._run_text,
            "metrics.jsonl": self.record.metrics_text,
        }
        self._writing = self._thread.submit(self._write, snapshot, texts, progress.best_step)

    def _write(self, snapshot: Snapshot, texts: dict[str, str], best_step: int) -> None:
        from safetensors.torch import save

        spoilt = next((key for key, tensor in snapshot.tensors.items() if tensor.isnan().any()), None)
        if spoilt:
            raise RunError(
                f"{spoilt} is not a number after step {snapshot.step:,}, so this state is not saved; the last checkpoint is untouched"
            )
        # One entry: safetensors writes several in an order of chance, and equal weights are to be equal files.
        about = {"trained": json.dumps(TrainedModel.open(self.record.folder).metadata)}
        # The weights first: a run whose last checkpoint is there is finished, and must have them.
        for name, weights in snapshot.weights.items():
            write_atomically(self.record.folder / name, save(weights, metadata=about))
        self.checkpoints.write(snapshot.step, snapshot.tensors, texts, best_step)

    def wait(self) -> None:
        """Return when nothing is being written any more. Collective; the others wait longer for a disk than for one another's steps.

        Raises:
            RunError: what was being written could not be.
        """
        limit_waits(SAVE_SECONDS)
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
        self.engine.any(False)
        limit_waits()
