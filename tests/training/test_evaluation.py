"""training/evaluation.py: when a run evaluates, what it evaluates, and when it stops early.

Run: python -m pytest tests/training/test_evaluation.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from records.checkpoint_store import Interval
from records.run_folder import Progress
from training import evaluation as module
from training.evaluation import Evaluation


class Engine:
    """Stands for an engine: evaluates to the given accuracies, one after the other, and notes what was asked for."""

    def __init__(self, accuracies: list[float], step: int = 0, ema: object = None):
        self.accuracies, self.step, self.ema = list(accuracies), step, ema
        self.compiled = SimpleNamespace(in_evaluation=False)
        self.evaluated: list[tuple[str, bool]] = []

    def evaluate(self, split: str, raw: bool):
        self.evaluated.append((split, raw))
        return SimpleNamespace(accuracy=self.accuracies.pop(0))


def splits(*names: str) -> dict:
    return {name: SimpleNamespace(epoch=lambda name=name: name) for name in names}


@pytest.mark.parametrize(
    ("every", "due"),
    [
        (Interval(), [4, 8, 12, 14]),
        (Interval(epochs=2), [8, 14]),
        (Interval(steps=3), [3, 6, 9, 12, 14]),
        (Interval(steps=20), [14]),
    ],
)
@pytest.mark.parametrize("start", [0, 5])
def test_evaluations_are_due_at_multiples_of_the_interval_and_at_the_end(every, due, start):
    """A run of 14 steps with epochs of 4 steps; a run that resumes after step 5 evaluates the same steps."""
    engine, found = Engine([], step=start), []
    evaluation = Evaluation(engine, splits("test"), 4, every)
    for step in range(start + 1, 15):
        engine.step = step
        ended = -(-step // 4) if step % 4 == 0 or step == 14 else None
        if evaluation.is_due(ended, is_last=step == 14):
            found.append(step)
            evaluation.set_next()
    assert found == [step for step in due if step > start]


@pytest.mark.parametrize("compiles", [False, True])
def test_other_processes_are_waited_for_longer_while_the_first_evaluation_compiles(monkeypatch, compiles):
    waits = []
    monkeypatch.setattr(module, "limit_waits", lambda at_least=0.0: waits.append(at_least))
    engine = Engine([0.9, 0.9], step=4)
    engine.compiled.in_evaluation = compiles
    evaluation = Evaluation(engine, splits("test"), 4)
    for _ in range(2):
        evaluation.run(Progress(), is_last=False)
    assert waits == ([module.FIRST_STEPS_SECONDS, 0.0] if compiles else [])


def test_without_a_validation_split_the_test_split_selects_nothing():
    engine = Engine([0.9], step=4)
    found = Evaluation(engine, splits("test"), 4, patience=1).run(Progress(), is_last=False)
    assert engine.evaluated == [("test", False)] and list(found.results) == ["test"]
    assert (found.best_accuracy, found.best_step, found.is_best, found.ends_early) == (-1.0, 0, False, False)


def test_with_a_validation_split_the_test_split_is_evaluated_at_the_end_only():
    engine, progress = Engine([0.5, 0.6, 0.1], step=4), Progress()
    evaluation = Evaluation(engine, splits("validation", "test"), 4)
    first = evaluation.run(progress, is_last=False)
    assert list(first.results) == ["validation"]
    assert first.is_best and (first.best_accuracy, first.best_step) == (0.5, 4)
    progress.best_accuracy, progress.best_step, engine.step = first.best_accuracy, first.best_step, 8
    last = evaluation.run(progress, is_last=True)
    assert list(last.results) == ["validation", "test"] and (last.best_accuracy, last.best_step) == (0.6, 8)


@pytest.mark.parametrize(
    ("step", "patience", "is_last", "ends_early"),
    [(11, 2, False, False), (12, 2, False, True), (12, None, False, False), (12, 2, True, False)],
)
def test_early_stopping_counts_whole_epochs_since_the_best_step(step, patience, is_last, ends_early):
    """The best step was 4; an equal accuracy is not better."""
    engine, progress = Engine([0.5, 0.7], step=step), Progress(best_accuracy=0.5, best_step=4)
    found = Evaluation(engine, splits("validation", "test"), 4, patience=patience).run(progress, is_last)
    assert found.ends_early is ends_early and not found.is_best
    assert (found.best_accuracy, found.best_step, found.epochs_without_better) == (0.5, 4, (step - 4) // 4)
    assert ("test" in found.results) is (ends_early or is_last)


@pytest.mark.parametrize(
    ("ema", "raw", "names"),
    [(object(), True, ["test", "test_raw"]), (object(), False, ["test"]), (None, True, ["test"])],
)
def test_the_trained_weights_are_evaluated_too_where_there_is_an_ema(ema, raw, names):
    engine = Engine([0.5, 0.4], step=4, ema=ema)
    found = Evaluation(engine, splits("test"), 4, raw=raw).run(Progress(), is_last=True)
    assert list(found.results) == names
    assert engine.evaluated == [("test", name == "test_raw") for name in names]
