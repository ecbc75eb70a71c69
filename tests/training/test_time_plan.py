"""`--max-minutes`: the number of steps is planned from the first ones, once, and a resumed run keeps the plan."""

from __future__ import annotations

import signal

import pytest
from programs import run
from small_runs import STOPPED, copy_of

from benchmarks.lib.forked_programs import start
from config.settings import ResizingSettings, ScheduleSettings
from optim.lr_schedule import Plan, Schedule
from parallel.progressive_resizing import ProgressiveResizing
from records.checkpoint_store import read_facts, step_of
from records.run_folder import RunFolder
from training import time_plan
from training.time_plan import TimePlan, total_within

OFF = ProgressiveResizing(ResizingSettings(), patch=4)
HALF = ProgressiveResizing(ResizingSettings(initial_scale=0.5, fraction=0.25), patch=4)  # a quarter of the pixels
SIDE = 32


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time_plan.time, "perf_counter", lambda: now[0])
    return now


def steps_until_due(plan: TimePlan, clock: list[float], seconds: float, first: float = 0.0) -> int:
    plan.start()
    for step in range(1, 10_000):
        clock[0] += first if step <= time_plan.UNTIMED_STEPS else seconds
        if plan.is_due(step):
            return step
    raise AssertionError("never due")


@pytest.mark.parametrize(("seconds", "after"), [(0.5, 2 + 24), (3.0, 2 + 10)])
def test_the_plan_is_due_after_two_percent_of_the_time_but_at_least_ten_steps(clock, seconds, after):
    schedule = Schedule(ScheduleSettings(), total_steps=5000)
    plan = TimePlan(schedule, 600.0, OFF, SIDE)
    assert steps_until_due(plan, clock, seconds, first=30.0) == after  # the slow first steps are not timed
    assert plan.seconds_per_step() == pytest.approx(seconds)
    spent = 60.0 + (after - 2) * seconds
    made = plan.make(after, spent, plan.full_step_seconds(after, plan.seconds_per_step()))
    assert made == Plan(after, 5000, after + round((600 - spent) / seconds))


def test_a_limit_beside_epochs_or_steps_only_shortens_a_run():
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=100), 60.0, OFF, SIDE, only_shortens=True)
    assert plan.make(10, 10.0, 0.5) == Plan(10, 100, 100)  # 110 steps fit
    assert plan.make(10, 10.0, 1.0) == Plan(10, 100, 60)
    assert plan.make(10, 70.0, 1.0) == Plan(10, 100, 10)  # already spent


def test_a_plan_knows_that_later_images_are_larger():
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=1000), 100.0, HALF, SIDE)
    assert plan.full_step_seconds(10, 1.0) == 4.0  # from small steps: the estimate has 250 of them
    made = plan.make(10, 10.0, 4.0)
    assert made.total_steps == 32  # round(32 / 4) = 8: all smaller steps are over, and 22 at 4 s fit into 90 s
    assert HALF.work(32, 32, SIDE) - HALF.work(10, 32, SIDE) == 22
    assert plan.make(10, 10.0, 0.4).total_steps == 280  # 70 steps at 0.1 s and 210 at 0.4 s


def test_a_plan_is_due_before_the_images_grow(clock):
    """Later, a plan with more steps would shrink them again, and count the steps until then at the wrong cost."""
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=400), 28_800.0, HALF, SIDE)
    assert steps_until_due(plan, clock, 0.5) == 100  # a quarter of the estimate, long before 2 % of the time
    full = plan.full_step_seconds(100, plan.seconds_per_step())
    total = plan.make(100, 50.0, full).total_steps
    assert HALF.num_steps(total) > 100  # all later small steps follow at once
    work = HALF.work(total, total, SIDE) - HALF.work(100, total, SIDE)
    assert 50.0 + full * work == pytest.approx(28_800, abs=2.0)
    early = TimePlan(Schedule(ScheduleSettings(), total_steps=4), 600.0, HALF, SIDE)
    assert steps_until_due(early, clock, 0.5) == 1 and early.seconds_per_step() == 0.0  # of an untimed step


def test_a_run_that_resumes_without_a_plan_where_its_images_have_grown_keeps_to_its_budget():
    """Checkpoints of earlier commits may have no plan there."""
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=400), 28_800.0, HALF, SIDE)
    assert plan.full_step_seconds(120, 0.5) == 0.5
    total = plan.make(120, 60.0, 0.5).total_steps
    small = HALF.num_steps(total) - 120
    assert 60.0 + small * 0.125 + (total - 120 - small) * 0.5 == pytest.approx(28_800, abs=1.0)


def test_a_plan_counts_the_pixels_of_the_rounded_side():
    three_quarters = ProgressiveResizing(ResizingSettings(initial_scale=0.75, fraction=0.5), patch=4)
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=100), 60.0, three_quarters, side=28)
    assert plan.full_step_seconds(10, 1.0) == pytest.approx(1.96)  # 20 x 20 of 28 x 28 pixels


@pytest.mark.parametrize("resizing", [OFF, HALF])
@pytest.mark.parametrize(("total", "step"), [(1000, 20), (1000, 600), (400, 99)])
def test_the_plan_and_its_work_are_inverse(resizing, total, step):
    work = resizing.work(total, total, SIDE) - resizing.work(step, total, SIDE)
    assert total_within(work, step, resizing, SIDE) == total


def test_a_pause_is_not_timed_and_the_plan_comes_before_the_estimate_ends(clock):
    plan = TimePlan(Schedule(ScheduleSettings(), total_steps=6), 600.0, OFF, SIDE)
    plan.start()
    for step in (1, 2, 3, 4):
        clock[0] += 1.0
        assert not plan.is_due(step)
    plan.stop()
    clock[0] += 1000.0  # an evaluation
    plan.start()
    due = []
    for step in (5, 6):
        clock[0] += 1.0
        due.append(plan.is_due(step))
    assert due == [False, True] and plan.seconds_per_step() == pytest.approx(1.0)


def test_steps_before_the_plan_keep_their_factors(clock):
    settings = ScheduleSettings(warmup_fraction=0.1)
    estimate, final, planned = Schedule(settings, 1000), Schedule(settings, 200), Schedule(settings, 1000)
    planned.set_plan(Plan(30, 1000, 200))
    assert [planned(step) for step in range(30)] == [estimate(step) for step in range(30)]
    assert [planned(step) for step in range(30, 200)] == [final(step) for step in range(30, 200)]
    again = Schedule(settings, planned.total, planned.plan_facts())
    assert [again(step) for step in range(200)] == [planned(step) for step in range(200)]


def test_a_resumed_run_keeps_the_plan_and_equals_an_uninterrupted_one(training, runs):
    words = ["train.py", *training, "--max-minutes", 0.25]
    program = start(*words, "--name", "planned")
    program.wait_for("plan ")
    program.send(signal.SIGTERM)
    done = program.end()
    assert done.code == STOPPED and "4 steps per epoch, as many as take 0.25 min" in done.out
    planned = RunFolder(runs / "planned")
    plan, stopped = planned.facts()["plan"], step_of(planned.newest_checkpoint())
    assert planned.facts()["total_steps"] == plan["total_steps"] > stopped >= plan["after_step"] >= 12
    again = copy_of(planned, runs / "planned-again")
    run(*words, "--name", "planned", "--stop-at", stopped + 2, code=STOPPED)
    for more in (1, 2):
        said = run(*words, "--name", "planned-again", "--stop-at", stopped + more, code=STOPPED).out
    assert f"resuming  after step {stopped + 1} of {plan['total_steps']}" in said and "plan " not in said
    one, two = (record.newest_checkpoint() for record in (planned, again))
    assert read_facts(two, "engine.json")["plan"] == plan == again.facts()["plan"]
    assert one.name == two.name and step_of(two) == stopped + 2
    assert (one / "state.safetensors").read_bytes() == (two / "state.safetensors").read_bytes()


def test_a_spent_budget_ends_the_run(training, runs):
    words = ["train.py", *training, "--max-minutes", 0.0001, "--name", "spent"]
    run(*words)
    record = RunFolder(runs / "spent")
    assert record.metrics()[-1]["step"] == record.facts()["total_steps"] == record.facts()["plan"]["after_step"] == 12
    assert record.is_finished() and "is finished" in run(*words, code=None).err


def test_steps_that_fit_the_time_budget_are_trained_as_without_one(training, runs):
    for name, budget in (("unlimited", []), ("limited", ["--max-minutes", 5])):
        said = run("train.py", *training, "--max-steps", 14, *budget, "--name", name).out
    assert "at most 14, and as many as take 5 min" in said and "14 steps (3.5 epochs)" in said
    one, two = (RunFolder(runs / name).newest_checkpoint() for name in ("unlimited", "limited"))
    assert step_of(one) == step_of(two) == 14
    assert (one / "state.safetensors").read_bytes() == (two / "state.safetensors").read_bytes()


@pytest.mark.parametrize("flag", [["--profile", 2], ["--host-peers", "127.0.0.1"]])
def test_what_does_not_fit_a_time_budget_is_refused(training, flag):
    said = run("train.py", *training, "--max-minutes", 1, *flag, code=1).err
    assert said.startswith("error: --") and "--max-minutes" in said and said.count("\n") == 1
