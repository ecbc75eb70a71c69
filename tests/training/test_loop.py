"""training/loop.py: which steps of an epoch are timed, and how a run starts and ends.

What it trains is in tests/test_train.py and test_resume.py.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from programs import run_ranks
from small_runs import RESIZING, STOPPED

from benchmarks.lib.forked_programs import Program
from common.errors import RunError
from parallel import process_group
from records.checkpoint_store import Interval
from records.run_folder import RunFolder
from training import loop
from training.checkpoint_writer import CheckpointWriter
from training.loop import Loop
from training.non_finite import NonFiniteLoss
from training.trackers import Tracking


def ending_run(close) -> Loop:
    """A run of two processes at its last step; the tracker of the main process is closed by `close`."""
    os.environ["HANG_SECONDS"] = "1"
    process_group.init_process_group()
    process_group.control_group()
    process_group.limit_waits()
    is_main = os.environ["RANK"] == "0"
    slow = SimpleNamespace(close=close)
    ending = Loop.__new__(Loop)
    ending.engine = SimpleNamespace(
        step=4, is_main=is_main, any=lambda value: any(process_group.all_gather_objects(value))
    )
    ending.total_steps, ending.record, ending.stop = 4, None, SimpleNamespace(requested=False)
    ending._work = None
    ending.progress, ending.profile = SimpleNamespace(finished=True, num_losses=4), SimpleNamespace(close=lambda: None)
    ending.console = SimpleNamespace(clock=SimpleNamespace(start=lambda *_: None))
    ending.writer = CheckpointWriter(ending.engine, Interval(), {}, None, None)
    ending.tracking = Tracking([slow] if is_main else [])
    return ending


def end_a_run_whose_tracker_uploads_for_long():
    """The main process closes its trackers for longer than the others may wait for one step."""
    assert ending_run(lambda failed: time.sleep(4)).run()
    process_group.destroy_process_group()


def fail_while_a_tracker_uploads(closed: str):
    """A launcher ends the main process soon after another has ended, so that one ends last."""

    def close(failed):
        time.sleep(4)
        Path(closed).touch()

    def fail(stop_at):
        raise NonFiniteLoss("the loss is nan")

    ending = ending_run(close)
    ending._run = fail
    with pytest.raises(NonFiniteLoss if ending.engine.is_main else SystemExit):
        ending.run()
    assert Path(closed).is_file()
    process_group.destroy_process_group()


def test_a_tracker_that_uploads_for_long_does_not_fail_a_finished_run():
    run_ranks(2, end_a_run_whose_tracker_uploads_for_long)


def test_a_run_that_fails_on_all_processes_ends_once_its_trackers_are_closed(tmp_path):
    run_ranks(2, fail_while_a_tracker_uploads, str(tmp_path / "closed"))


def test_a_finished_run_does_not_fail_because_of_its_model_card(monkeypatch, tmp_path):
    def full(record):
        raise RunError("README.md could not be written") from OSError(errno.ENOSPC, "No space left on device")

    said = []
    monkeypatch.setattr(loop, "write_card", full)
    ending = Loop.__new__(Loop)
    ending.engine, ending.total_steps, ending.steps_per_epoch = SimpleNamespace(step=4), 4, 4
    ending._work = None
    ending.record = SimpleNamespace(folder=tmp_path, metrics=lambda: [{}])
    ending.console = SimpleNamespace(
        clock=SimpleNamespace(start=lambda *_: None), result=lambda *_: None, say=lambda text, level: said.append(text)
    )
    ending.profile, ending.writer = SimpleNamespace(close=lambda: None), SimpleNamespace(wait=lambda: None)
    ending.tracking = Tracking([])
    monkeypatch.setattr(Loop, "_run", lambda self, stop_at: True)
    assert ending.run()
    assert said == ["warning: README.md was not written (No space left on device)"]


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


def count_batches(words: list[str]) -> None:
    """Run train.py, and print how many training batches are made more than once."""
    import train
    from dali_pipeline import Batches

    made, produce = [], Batches._produce

    def counted(self, batch):
        if self.training:
            made.append(batch.key)
        return produce(self, batch)

    Batches._produce = counted
    sys.argv = ["train.py", *words]
    code = train.main()
    print(f"made {len(made)}, {len(made) - len(set(made))} of them again")
    sys.exit(code)


def test_batches_that_are_prefetched_at_an_evaluation_are_used_after_it(training):
    steps = ["--max-steps", 8, "--evaluate-every", "1steps", "--no-tensorboard"]  # which shows the first batch
    words = [str(word) for word in (*training, "--name", "prefetched", *steps)]
    done = Program(count_batches, (words,), {}).end()
    assert done.code == 0 and ", 0 of them again" in done.out, done.text


@pytest.mark.parametrize(("fewer", "calls"), [(8, 0), (4, 1)])
def test_images_that_grow_because_of_a_plan_are_first_steps_too(fewer, calls):
    """Of 8 steps, 4 have small images. After 3 of them, a plan of `fewer` steps makes the images grow or not."""
    expected = []
    one = Loop.__new__(Loop)
    one.engine = SimpleNamespace(step=0, resizing=SimpleNamespace(num_steps=lambda total: total // 2))
    one.evaluation, one.total_steps, one._images_are_small = SimpleNamespace(next_step=math.inf), 8, False
    one.timer = SimpleNamespace(expect_first_steps=lambda: expected.append(one.engine.step))
    assert one._steps_until_pause() == 4 and not expected
    one.engine.step, one.total_steps = 3, fewer
    assert one._steps_until_pause() == 1 and len(expected) == calls


def train_and_stop_in_an_evaluation(words: list[str]) -> None:
    """Run train.py, whose first evaluation gets SIGTERM when it begins."""
    import train
    from training.evaluation import Evaluation

    evaluate = Evaluation.run

    def interrupted(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments, **options)

    Evaluation.run = interrupted
    sys.argv = ["train.py", *words]
    sys.exit(train.run())


def test_a_run_that_is_stopped_in_an_evaluation_finishes_it_and_saves(training, runs):
    words = [str(word) for word in (*training, "--strategy", "ddp", "--name", "evaluating", "--max-steps", 8)]
    done = Program(train_and_stop_in_an_evaluation, (words,), {}).end()
    assert done.code == STOPPED and "stopped after step 4 and saved" in done.out, done.text
    record = RunFolder(runs / "evaluating")
    assert [line["step"] for line in record.metrics()] == [4] and record.newest_checkpoint().name == "step-00000004"


def train_to(start: str, words: list[str]) -> None:
    """Run train.py with a start that ends before the first step, and print how its trackers are closed."""
    import train
    from parallel import ddp
    from training import loop
    from training.trackers import Tracking

    class Loop(loop.Loop):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if start == "stopped":
                self.stop.number = signal.SIGTERM
            if start == "nothing left":
                self.total_steps = self.engine.step

    def fail(self, facts):
        raise RunError("no other peer answers")

    def closed(self, error, *details):
        print("closed by", error and error.__name__)
        close(self, error, *details)

    loop.Loop = Loop  # main() imports it
    close, Tracking.__exit__ = Tracking.__exit__, closed
    if start == "failed":
        ddp.Engine.begin = fail
    sys.argv = ["train.py", *words]
    sys.exit(train.run())


@pytest.mark.parametrize(
    ("start", "code", "sentence", "closed_by"),
    [
        ("stopped", STOPPED, "stopped before step 1; the same command starts the run", None),
        ("nothing left", 1, "error: nothing is left to train", "RunError"),
        ("failed", 1, "error: no other peer answers", "RunError"),
    ],
)
def test_a_start_that_ends_before_the_first_step_says_so_and_closes_the_trackers(
    training, runs, start, code, sentence, closed_by
):
    words = [str(word) for word in (*training, "--strategy", "ddp", "--name", f"start-{start}", "--max-steps", 8)]
    words.append("--quiet")
    done = Program(train_to, (start, words), {}).end()
    assert done.code == code, done.text
    assert sentence in done.text and done.out.count(f"closed by {closed_by}") == 1, done.text
