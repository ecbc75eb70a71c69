"""A budget in seconds as a number of optimiser steps for each arm.

A learning rate that follows the clock would make runs that cannot be repeated or resumed exactly. So the speed of each arm is
measured first, by two short runs on the same machine: what the second takes longer than the first is the time of its additional
steps, without the slow start. The report then checks the training seconds of the real runs against the budget.
"""

from __future__ import annotations

from collections.abc import Callable

from comparison.experiment import Experiment, Variant
from comparison.run_queue import PlannedRun
from records.run_folder import RunFolder

SHORT_STEPS, LEAST_LONG_STEPS = 20, 100
LONG_SHARE = 0.1  # of the budget: what the second run is to take


def calibrate(
    experiment: Experiment,
    make: Callable[[Variant, str, int], PlannedRun],
    run: Callable[[list[PlannedRun]], dict[str, str]],
) -> tuple[dict[str, int], dict[str, str]]:
    """Steps of each arm that fill `experiment.budget_amount` seconds of training, and the calibration runs that failed, with their errors.

    Args:
        make: a run of an arm, from a name for its folder and a number of steps.
        run: makes runs, or leaves alone what is finished; returns those that failed.
    """
    short = {arm.name: make(arm, f"calibration-{arm.name}-short", SHORT_STEPS) for arm in experiment.variants}
    failures = run(list(short.values()))
    ready = [arm for arm in experiment.variants if short[arm.name].state() == "finished"]
    long = {
        arm.name: make(arm, f"calibration-{arm.name}-long", _long_steps(experiment.budget_amount, short[arm.name]))
        for arm in ready
    }
    failures |= run(list(long.values()))
    return {
        name: steps_for(experiment.budget_amount, _measured(short[name]), _measured(task))
        for name, task in long.items()
        if task.state() == "finished"
    }, failures


def steps_for(seconds: float, short: tuple[int, float], long: tuple[int, float]) -> int:
    """Steps that fill `seconds`, from two measured runs (steps, seconds): a start that costs once, then equal steps."""
    a_step = (long[1] - short[1]) / (long[0] - short[0])
    if a_step <= 0:  # a machine so restless that the longer run was faster
        a_step = long[1] / long[0]
    start = max(0.0, short[1] - short[0] * a_step)
    return max(1, round((seconds - start) / a_step))


def _long_steps(seconds: float, short: PlannedRun) -> int:
    steps, took = _measured(short)
    return max(LEAST_LONG_STEPS, round(LONG_SHARE * seconds * steps / took))


def _measured(task: PlannedRun) -> tuple[int, float]:
    lines = RunFolder(task.folder).metrics()
    return lines[-1]["step"], sum(line["training_seconds"] for line in lines)
