"""A budget in seconds, as a number of optimizer steps for each variant.

A learning rate that follows the clock would make runs that cannot be repeated or resumed exactly. Therefore the speed
of each variant is measured first, by two short runs on the same machine. The difference of their times is the time of
the additional steps, without the start-up. The report then checks the training seconds of the real runs against the
budget.

On a CPU, `compile = "auto"` compiles long bf16 runs alone. Where the real runs would be compiled, a third run measures
the speed of compiled steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from comparison.experiment import Experiment, Variant
from comparison.planned_run import PlannedRun
from records.run_folder import RunFolder

SHORT_STEPS = 20
LEAST_LONG_STEPS = 100
LONG_SHARE = 0.1  # of the budget, for the second run
COMPILING = 2, 0.0  # steps that compile, whose time is not training time: FIRST_STEPS of parallel/compile.py


def calibrate(
    experiment: Experiment,
    make: Callable[[Variant, str, int], PlannedRun],
    run: Callable[[list[PlannedRun]], dict[str, str]],
) -> tuple[dict[str, int], dict[str, str]]:
    """Measure the speed of each variant.

    Args:
        make: makes the plan of a run, from a variant, a name for its folder, and a number of steps.
        run: runs what is not finished; returns those that failed.

    Returns:
        Variant -> steps that fill `experiment.budget_amount` seconds of training, and failed runs -> their errors.
    """
    short = {one.name: make(one, f"calibration-{one.name}-short", SHORT_STEPS) for one in experiment.variants}
    failures = run(list(short.values()))
    ready = [variant for variant in experiment.variants if short[variant.name].state() == "finished"]
    seconds = experiment.budget_amount
    counts = {one.name: _long_steps(seconds, short[one.name]) for one in ready}
    long = {one.name: make(one, f"calibration-{one.name}-long", counts[one.name]) for one in ready}
    failures |= run(list(long.values()))
    steps = {
        name: steps_for(seconds, _measured(short[name]), _measured(task))
        for name, task in long.items()
        if task.state() == "finished"
    }
    compiled = {
        one.name: make(_compiled(one), f"calibration-{one.name}-compiled", counts[one.name])
        for one in ready
        if one.name in steps and _will_compile(one, long[one.name], steps[one.name])
    }
    # The steps of runs that exist are kept. Where compile=on fails, such as without a C compiler, auto trains without.
    run([task for name, task in compiled.items() if not any(task.folder.parent.glob(f"*{name}-*seed*/run.json"))])
    return steps | {
        name: steps_for(seconds, COMPILING, _measured(task))
        for name, task in compiled.items()
        if task.state() == "finished"
    }, failures


def _will_compile(variant: Variant, measured: PlannedRun, steps: int) -> bool:
    """Whether runs of so many steps are long enough to be compiled on a CPU, unlike the measured one."""
    from parallel.compile import CPU_IMAGES  # after the arguments, since it imports PyTorch

    facts = RunFolder(measured.folder).facts()
    is_bf16_on_cpu = facts["device"] == "CPU" and facts.get("precision", "fp32") != "fp32"
    images, measured_images = (count * facts["batch"]["total"] for count in (steps, _measured(measured)[0]))
    is_auto = variant.settings.compile in ("auto", "auto-graphs")
    return is_bf16_on_cpu and is_auto and measured_images < CPU_IMAGES <= images


def _compiled(variant: Variant) -> Variant:
    settings = replace(variant.settings, compile="on")
    return replace(variant, overrides=[*variant.overrides, "compile=on"], settings=settings)


def steps_for(seconds: float, short: tuple[int, float], long: tuple[int, float]) -> int:
    """Return the steps that fill `seconds`, from two measured runs (steps, seconds): a start-up, then equal steps."""
    per_step = (long[1] - short[1]) / (long[0] - short[0])
    if per_step <= 0:  # on a busy machine the longer run can be faster
        per_step = long[1] / long[0]
    start = max(0.0, short[1] - short[0] * per_step)
    return max(1, round((seconds - start) / per_step))


def _long_steps(seconds: float, short: PlannedRun) -> int:
    steps, took = _measured(short)
    return max(LEAST_LONG_STEPS, round(LONG_SHARE * seconds * steps / took))


def _measured(task: PlannedRun) -> tuple[int, float]:
    lines = RunFolder(task.folder).metrics()
    return lines[-1]["step"], sum(line["training_seconds"] for line in lines)
