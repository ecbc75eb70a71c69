"""Saving before printing: an epoch's line is printed once its checkpoint is on the disk.

Run: python -m pytest tests/training/test_checkpoint_writer.py
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.errors import RunError
from records.checkpoint_store import Checkpoints, Interval
from records.run_folder import Progress, RunFolder
from training import checkpoint_writer, loop
from training.checkpoint_writer import CheckpointWriter, Snapshot
from training.evaluation import Evaluated


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_what_follows_a_checkpoint_is_called_once_it_is_complete(tmp_path, monkeypatch, value):
    record, seen = RunFolder(tmp_path), []
    record.create({})
    monkeypatch.setattr(checkpoint_writer, "TrainedModel", SimpleNamespace(open=lambda _: SimpleNamespace(metadata={})))
    engine = SimpleNamespace(step=4, any=bool)
    writer = CheckpointWriter(engine, Interval(), {}, record, Checkpoints(tmp_path / "state", 2))
    snapshot = Snapshot(4, {"weights/a": torch.tensor([value])}, {}, {}, [0.0], 0.0)
    writer.write(snapshot, Progress(), then=lambda: seen.append(record.newest_checkpoint().name))
    if value == value:
        writer.wait()
        assert seen == ["step-00000004"]
    else:  # a state that cannot be saved
        with pytest.raises(RunError, match="contains NaN"):
            writer.wait()
        assert seen == []


def test_an_epoch_is_written_before_its_line_is_printed(monkeypatch):
    events = []
    training = loop.Loop.__new__(loop.Loop)
    training.engine, training.progress = SimpleNamespace(step=4, ema=None, weights=None), Progress()
    training.steps_per_epoch, training.total_steps = 4, 8
    found = Evaluated({"test": None, "test_raw": None}, best_accuracy=-1.0, best_step=0)
    training.evaluation = SimpleNamespace(run=lambda *_, **__: found, set_next=lambda: None)
    training.record = SimpleNamespace(append_metrics=lambda line: events.append("metrics"))
    training.tracking = SimpleNamespace(take_seconds=lambda: 0.0, epoch=lambda line: events.append("pictures"))
    training.console = SimpleNamespace(epoch=lambda line, splits, last: events.append(f"line {splits} of {last}"))

    def write(snapshot, progress, then):
        events.append(f"checkpoint of epoch {progress.epoch}")
        then()

    training.writer = SimpleNamespace(
        take_snapshot=lambda *_: SimpleNamespace(seconds=0.0), write=write, is_due_after=lambda epoch: True
    )
    monkeypatch.setattr(loop, "epoch_line", lambda *_: {})
    monkeypatch.setattr(training, "_ends_epoch", lambda: True, raising=False)
    training._evaluate_and_record()
    assert events == ["metrics", "checkpoint of epoch 1", "line ['test'] of 2", "pictures"]
