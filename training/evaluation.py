"""The evaluations of a run: when one is due, the exact counts, the best accuracy, and early stopping."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from dali_pipeline import Batches
from parallel.batch_sizes import EvalCounts
from parallel.compile import FIRST_STEPS_SECONDS
from parallel.engine import Engine
from parallel.process_group import limit_waits
from records.checkpoint_store import Interval
from records.run_folder import Progress

EVERY_EPOCH = Interval()


@dataclass(frozen=True)
class Evaluated:
    """The results after a step, and what follows from them.

    Attributes:
        results: exact counts and seconds by the name of the split; `<split>_raw` are those of the trained weights
            in a run with an EMA.
        best_accuracy: the highest validation accuracy so far, reached after step `best_step`.
        is_best: whether this step reached it.
        epochs_without_better: since `best_step`.
        ends_early: whether early stopping ends the run here.
    """

    results: dict[str, tuple[EvalCounts, float]]
    best_accuracy: float
    best_step: int
    is_best: bool = False
    epochs_without_better: int = 0
    ends_early: bool = False


class Evaluation:
    """Evaluates a run on its validation split, or on its test split where it has no other."""

    def __init__(
        self,
        engine: Engine,
        splits: dict[str, Batches],
        steps_per_epoch: int,
        every: Interval = EVERY_EPOCH,
        raw: bool = True,
        patience: int | None = None,
    ):
        """Prepare the evaluations.

        Args:
            splits: the batches of the test split, and of the validation split where there is one, by name.
            every: interval in steps or in epochs; the last step is always evaluated.
            raw: where there is an EMA, evaluate the trained weights too.
            patience: early stopping: epochs without better validation accuracy; None: no early stopping.
        """
        self.engine, self.splits, self.steps_per_epoch = engine, splits, steps_per_epoch
        self.every, self.raw, self.patience = every, raw, patience
        self._compiles = engine.compiled.in_evaluation  # in the first evaluation of this process
        self.set_next()

    def set_next(self) -> None:
        """Set the step of the next evaluation of an interval in steps, a multiple of it also in a resumed run."""
        steps = self.every.steps
        self.next_step = math.inf if math.isinf(steps) else steps * (self.engine.step // steps + 1)

    def is_due(self, ended_epochs: int | None, is_last: bool) -> bool:
        """Whether the present step is evaluated: by the interval, or because it is the last one.

        Args:
            ended_epochs: the number of epochs that end with this step; None: it ends none.
        """
        if is_last or self.engine.step >= self.next_step:
            return True
        return math.isinf(self.every.steps) and ended_epochs is not None and ended_epochs % self.every.epochs == 0

    def run(self, progress: Progress, is_last: bool) -> Evaluated:
        """Evaluate the present step. Collective.

        Where there is a validation split, the test split is evaluated at the end only. It never selects anything.
        """
        step, best = self.engine.step, (progress.best_accuracy, progress.best_step)
        if "validation" not in self.splits:
            return Evaluated(self._evaluate("test"), *best)
        results = self._evaluate("validation")
        accuracy, waited = results["validation"][0].accuracy, 0
        is_best = accuracy > progress.best_accuracy
        if is_best:
            best = accuracy, step
        else:
            waited = (step - progress.best_step) // self.steps_per_epoch
        ends_early = self.patience is not None and waited >= self.patience and not is_last
        if ends_early or is_last:
            results |= self._evaluate("test")
        return Evaluated(results, *best, is_best, waited, ends_early)

    def _evaluate(self, split: str) -> dict[str, tuple[EvalCounts, float]]:
        """Evaluate a split with the EMA where there is one, and then also with the trained weights as `<split>_raw`."""
        results, also_raw = {}, self.engine.ema is not None and self.raw
        if self._compiles:
            limit_waits(FIRST_STEPS_SECONDS)
        for name, raw in [(split, False), *([(f"{split}_raw", True)] if also_raw else [])]:
            began = time.perf_counter()
            results[name] = self.engine.evaluate(self.splits[split].epoch(), raw=raw), time.perf_counter() - began
        if self._compiles:
            self._compiles = False
            limit_waits()
        return results
