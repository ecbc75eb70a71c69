"""The runs that tune each variant: rung by rung, on seeds of their own, resumed like all other runs.

What is chosen follows from the finished runs alone (`comparison/tuning.py`), so nothing else is written to the disk. A
run folder is named after its values, not after their place in the list: a wider grid reuses the runs of a narrower one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import SettingsError
from common.stop_signal import StopSignal
from comparison.experiment import Experiment, Variant, with_candidate
from comparison.planned_run import PlannedRun
from comparison.planning import Data, Steps, make_task
from comparison.results import load
from comparison.run_costs import RunCost, Speeds
from comparison.tuning import DIVERGED, Search, Tuning, search
from comparison.variant_costs import TOLERANCE, cost_of

RunTasks = Callable[[list[PlannedRun]], "dict[str, str]"]  # runs what is not finished; returns those that failed


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning: which runs it took, and the experiment with the values that were chosen."""

    shared: Experiment  # with the file's own values
    experiment: Experiment  # with the chosen values; variants without one are not run
    searches: dict[str, Search]  # variant -> its search
    tasks: list[PlannedRun]  # of tuning, as far as they are known
    failures: dict[str, str]  # runs that failed for another reason than divergence
    undecided: dict[str, str]  # variant without a value -> why

    @property
    def changes_network(self) -> bool:
        """Whether variants may cost something else than with the file's own values."""
        return changes_network(tuning_of(self.shared))

    def steps(self, steps: Steps) -> Steps:
        """Return the steps of the variants that have a value."""
        return {name: count for name, count in steps.items() if name not in self.undecided}


def tuning_of(experiment: Experiment) -> Tuning:
    """Return the tuning of an experiment that has one."""
    assert experiment.tuning is not None
    return experiment.tuning


def changes_network(tuning: Tuning) -> bool:
    """Return whether candidates may differ in their networks, their image sides, or the optimizers of their parts."""
    return any(key.startswith(("model.", "optimizer.type", "image_side", "resizing.")) for key in tuning.keys)


def check_candidates_fit(experiment: Experiment, num_classes: int, image_side: int) -> None:
    """Build every variant with every candidate where tuning changes the network, else the first variant alone.

    Raises:
        SettingsError: one cannot be built, or has another size than `match` gave to its variant.
    """
    tuning = experiment.tuning
    if tuning is None:
        return
    for variant in experiment.variants if changes_network(tuning) else experiment.variants[:1]:
        reference = cost_of(variant, num_classes, image_side)
        for i in range(len(tuning.candidates)):
            cost = cost_of(with_candidate(variant, experiment.preset, tuning, i), num_classes, image_side)
            if experiment.match == "none":
                continue
            here, there = getattr(cost, experiment.match), getattr(reference, experiment.match)
            if abs(here / there - 1) > TOLERANCE:
                raise SettingsError(
                    f"tune: {tuning.describe(i)} changes the {experiment.match} of variant '{variant.name}' from "
                    f'{there:,} to {here:,}, which match = "{experiment.match}" makes equal; remove one of the two'
                )


def tune(
    experiment: Experiment,
    data: Data,
    runs: Path,
    steps: Steps,
    check: Callable[[list[PlannedRun]], None],
    run: RunTasks,
    stop: StopSignal,
) -> Tuned:
    """Make the runs that are missing, rung by rung, and choose a value for each variant.

    Args:
        runs: folder of the run folders.
        steps: of the runs of the comparison; variants without an entry are not tuned.
        check: raises where existing runs cannot be used, or renames them aside, so that they are made again.
        run: makes no runs for a plan or a report: then the result is what the existing runs tell.
    """
    tuning = tuning_of(experiment)
    tasks: dict[tuple[str, int, int, int], PlannedRun] = {}
    done: dict[str, float] = {}
    failures: dict[str, str] = {}

    def task_of(variant: Variant, rung: int, candidate: int, seed: int) -> PlannedRun:
        key = (variant.name, rung, candidate, seed)
        if key not in tasks:
            tasks[key] = make_tuning_task(experiment, variant, rung, candidate, seed, data, runs, steps)
        return tasks[key]

    def accuracy(variant: Variant, rung: int, candidate: int, seed: int) -> float | None:
        task = task_of(variant, rung, candidate, seed)
        if task.name not in done and (found := accuracy_of(task, seed)) is not None:
            done[task.name] = found
        return done.get(task.name)

    variants = [variant for variant in experiment.variants if variant.name in steps]
    while True:
        searches = {
            one.name: search(tuning, lambda rung, candidate, seed, one=one: accuracy(one, rung, candidate, seed))  # type: ignore[misc]
            for one in variants
        }
        check(list(tasks.values()))
        if outdated := [task.name for task in tasks.values() if task.name in done and task.state() == "new"]:
            for name in outdated:
                del done[name]
            continue
        waiting = [
            task
            for one in variants
            for candidate in searches[one.name].waiting
            for seed in tuning.seeds
            if (task := task_of(one, len(searches[one.name].accuracies) - 1, candidate, seed)).name not in done
            and task.name not in failures
        ]
        if not waiting or stop.number:
            break
        random.Random(f"{experiment.name} {len(done)}").shuffle(waiting)
        failed = run(waiting)
        diverged = {task.name for task in waiting if task.name in failed and task.has_diverged()}
        failures |= {name: reason for name, reason in failed.items() if name not in diverged}
        if not any(task.state() == "finished" for task in waiting) and not failed:
            break  # a plan, a report, or an end of the budget
    undecided = {
        one.name: why
        for one in experiment.variants
        if (why := _why_undecided(searches.get(one.name), one.name, tasks, failures))
    }
    chosen = [_with_choice(experiment, one, searches.get(one.name)) for one in experiment.variants]
    return Tuned(experiment, replace(experiment, variants=chosen), searches, list(tasks.values()), failures, undecided)


def make_tuning_task(
    experiment: Experiment, variant: Variant, rung: int, candidate: int, seed: int, data: Data, runs: Path, steps: Steps
) -> PlannedRun:
    """Plan one run of tuning. It ends after its share of the steps, and so does its learning-rate schedule."""
    tuning = tuning_of(experiment)
    share, name = tuning.rungs()[rung].share, tuning.name_of(candidate)
    one = with_candidate(variant, experiment.preset, tuning, candidate)
    folder = runs / f"tuning-{variant.name}-{name}-at-{share:g}-seed{seed}"
    count = rung_steps(experiment, one, data, steps[variant.name], share)
    return make_task(experiment, one, seed, data, folder, count, f"{variant.name} {name} ({100 * share:g} %)")


def rung_steps(experiment: Experiment, variant: Variant, data: Data, steps: int | None, share: float) -> int | None:
    """Return the steps of a share of the budget. The whole budget is stated as in the comparison: None for epochs."""
    return steps if share == 1 else max(1, round(share * full_steps(experiment, variant, data, steps)))


def full_steps(experiment: Experiment, variant: Variant, data: Data, steps: int | None) -> int:
    """Return the steps of a run of the comparison."""
    return steps or int(experiment.budget_amount) * (data.num_train // variant.settings.engine["train_batch_size"])


def accuracy_of(task: PlannedRun, seed: int) -> float | None:
    """Return the accuracy of a run on the validation split, in points; DIVERGED, or None for an unfinished run."""
    if run := load(task, seed, final=False):
        return run.accuracy("validation")
    return DIVERGED if task.has_diverged() else None


def _with_choice(experiment: Experiment, variant: Variant, found: Search | None) -> Variant:
    if found is None or found.chosen is None:
        return variant
    return with_candidate(variant, experiment.preset, tuning_of(experiment), found.chosen)


def _why_undecided(
    found: Search | None, name: str, tasks: dict[tuple[str, int, int, int], PlannedRun], failures: dict[str, str]
) -> str | None:
    """Why a variant has no value; None if it has one."""
    if found is None:
        return "its speed could not be measured, so it was not tuned"
    if found.chosen is not None:
        return None
    if not found.waiting:
        return "every candidate of tune diverged; add smaller values"
    failed = next((task.name for key, task in tasks.items() if key[0] == name and task.name in failures), None)
    return f"its tuning is not finished: {failed} failed" if failed else "its tuning is not finished"


# --- cost -----------------------------------------------------------------------------------------------------------


def planned_tuning(experiment: Experiment, data: Data, steps: Steps, speeds: Speeds) -> RunCost:
    """Return the cost of tuning all variants, the most that it can be."""
    tuning, total = tuning_of(experiment), RunCost()
    for variant in experiment.variants:
        for rung in tuning.rungs():
            one = planned_run(experiment, variant, data, steps.get(variant.name), rung.share, speeds)
            total += one * (rung.candidates * tuning.num_seeds)
    return total


def planned_comparison(experiment: Experiment, data: Data, steps: Steps, speeds: Speeds) -> RunCost:
    """Return the cost of all variants with all seeds once."""
    total = RunCost()
    for variant in experiment.variants:
        one = planned_run(experiment, variant, data, steps.get(variant.name), 1.0, speeds)
        total += one * (experiment.max_seeds or experiment.seeds)
    return total


def planned_run(
    experiment: Experiment, variant: Variant, data: Data, steps: int | None, share: float, speeds: Speeds
) -> RunCost:
    """Return the cost of one run that gets a share of the budget."""
    if experiment.budget == "seconds" and steps is None:  # not measured yet
        return RunCost(1, None, share * experiment.budget_amount / 3600)
    count = rung_steps(experiment, variant, data, steps, share) or full_steps(experiment, variant, data, steps)
    images = count * variant.settings.engine["train_batch_size"]
    return RunCost(1, images, speeds.hours(variant, images))
