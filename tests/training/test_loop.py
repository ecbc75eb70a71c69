"""training/loop.py: timed steps of an epoch, and the end of a run; its training is in test_train.py, test_resume.py."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest
from programs import run_ranks
from small_runs import RESIZING

from benchmarks.lib.forked_programs import Program
from parallel import process_group
from records.checkpoint_store import Interval
from records.run_folder import RunFolder
from training.checkpoint_writer import CheckpointWriter
from training.loop import Loop
from training.trackers import Tracking


def end_a_run_whose_tracker_uploads_for_long():
    """The main process closes its trackers for longer than the others may wait for one step."""
    os.environ["HANG_SECONDS"] = "1"
    process_group.init_process_group()
    process_group.control_group()
    process_group.limit_waits()
    is_main = os.environ["RANK"] == "0"
    slow = SimpleNamespace(close=lambda failed: time.sleep(4))
    ending = Loop.__new__(Loop)
    ending.engine = SimpleNamespace(step=4, any=lambda value: any(process_group.all_gather_objects(value)))
    ending.total_steps, ending.record, ending.stop = 4, None, SimpleNamespace(requested=False)
    ending.progress, ending.profile = SimpleNamespace(finished=True), SimpleNamespace(close=lambda: None)
    ending.console = SimpleNamespace(clock=SimpleNamespace(start=lambda *_: None))
    ending.writer = CheckpointWriter(ending.engine, Interval(), {}, None, None)
    ending.tracking = Tracking([slow] if is_main else [])
    assert ending.run()
    process_group.destroy_process_group()


def test_a_tracker_that_uploads_for_long_does_not_fail_a_finished_run():
    run_ranks(2, end_a_run_whose_tracker_uploads_for_long)


def train_with_first_steps(count: int, words: list[str]) -> None:
    """Run train.py with an engine whose first steps compile, as one on a GPU would."""
    import train
    from training import loop

    class LoopOfAnotherEngine(loop.Loop):
        def __init__(self, engine, *arguments):
            engine.first_steps = count
            super().__init__(engine, *arguments)

    loop.Loop = LoopOfAnotherEngine  # main() imports it
    sys.argv = ["train.py", *words]
    sys.exit(train.main())


@pytest.mark.parametrize(("count", "untimed"), [(2, 2), (4, 3), (9, 3)])
def test_the_first_steps_are_not_timed_but_one_of_every_epoch_is(training, runs, count, untimed):
    """Two epochs of four steps: the first epoch uses up the first steps, except that its last step is timed."""
    words = [str(word) for word in (*training, "--name", f"first-{count}", "--max-steps", 8, "--no-report")]
    done = Program(train_with_first_steps, (count, words), {}).end()
    assert done.code == 0, done.text
    first, second = RunFolder(runs / f"first-{count}").metrics()
    assert first["warmup_seconds"] > 0 and first["images_per_second"] > 0 and second["images_per_second"] > 0
    timed = first["images_per_second"] * first["training_seconds"]
    assert timed == pytest.approx((4 - untimed) * 64, abs=31)  # both are rounded, and a step takes milliseconds
    assert second["warmup_seconds"] == 0


def test_the_first_steps_with_larger_images_are_not_timed_either(training, runs):
    """They compile again. Of 8 steps the first 2 have smaller images: steps 1 and 3 compile, 2 and 4 are timed."""
    name = "first-larger"
    words = [str(word) for word in (*training, *RESIZING, "--name", name, "--max-steps", 8, "--no-report")]
    done = Program(train_with_first_steps, (1, words), {}).end()
    assert done.code == 0, done.text
    first, second = RunFolder(runs / name).metrics()
    timed = first["images_per_second"] * first["training_seconds"]
    assert timed == pytest.approx(2 * 64, abs=31) and first["warmup_seconds"] > 0 == second["warmup_seconds"]
