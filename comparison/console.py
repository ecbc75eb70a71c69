"""What compare.py prints before the first run: the plan, what is unequal, and the power of the planned seeds."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from comparison.experiment import Experiment
from comparison.planned_run import PlannedRun
from comparison.planning import Data, Steps
from comparison.power import spread_of, statement
from comparison.run_budget import check_max_runs
from comparison.run_costs import Speeds
from comparison.tuning_report import plan_lines
from comparison.tuning_runs import planned_comparison, planned_tuning
from comparison.variant_costs import VariantCost, unequal_costs
from records.provenance import commit_of_project


def print_plan(experiment: Experiment, costs: list[VariantCost], data: Data, runs_dir: Path, results_dir: Path) -> None:
    """Print variants, sizes, what is unequal, tuning and its cost, and the power of the planned seeds.

    Raises:
        SettingsError: `max_runs` does not allow the plan.
    """
    first = experiment.variants[0].settings
    split = f"validation split ({100 * experiment.hold_out:g} % of train)" if experiment.hold_out else "test split"
    print(f"question  {experiment.question}")
    seeds = f"{experiment.seeds} to {experiment.max_seeds}" if experiment.max_seeds else f"{experiment.seeds}"
    print(
        f"runs      {len(experiment.variants)} variants x {seeds} seeds, "
        f"{experiment.budget_text} each, preset {Path(experiment.preset).stem}, "
        f"batch {first.engine['train_batch_size']}; compared on the {split}"
    )
    unequal = unequal_costs(experiment, costs)
    width = max(len(variant.name) for variant in experiment.variants)
    for variant, cost in zip(experiment.variants, costs, strict=True):
        mark = "*" if unequal[variant.name] else " "
        print(
            f"{mark} {variant.name:{width}}  {cost.parameters:>12,} parameters  {cost.flops / 1e6:>9,.1f} MFLOPs  "
            f"{variant.idea}"
        )
    for variant in experiment.variants:
        if variant.left_out:
            print(
                f"note: variant '{variant.name}' names another part, so settings of the former one do not apply to it: "
                f"{', '.join(variant.left_out)}"
            )
    for name, texts in unequal.items():
        for text in texts:
            print(f"warning: {name} is not equal to {experiment.variants[0].name}: {text}")
    if experiment.match == "none" and any("parameters:" in text for texts in unequal.values() for text in texts):
        print('note: match = "parameters" in the experiment file resizes the option hidden of unequal variants')
    _print_costs(experiment, data, runs_dir)
    spread = spread_of(experiment, runs_dir, results_dir)
    print(f"power     {statement(experiment, spread)}")
    if spread is None:
        pilot = "" if experiment.max_seeds else "; a pilot with --seeds 2 does, and its runs are reused"
        print(f"note: no earlier run shows the spread between seeds{pilot}")
    commit, _, problem = commit_of_project()
    if commit is None:
        print(f"note: the commit of this project is unknown: {problem}")


def _print_costs(experiment: Experiment, data: Data, runs_dir: Path) -> None:
    count = int(experiment.budget_amount) if experiment.budget == "steps" else None
    steps: Steps = {} if experiment.budget == "seconds" else dict.fromkeys([v.name for v in experiment.variants], count)
    tuning_runs = 0
    if experiment.tuning:
        speeds = Speeds(experiment, runs_dir)
        tuning = planned_tuning(experiment, data, steps, speeds)
        tuning_runs = tuning.runs
        print("\n".join(plan_lines(experiment, tuning, planned_comparison(experiment, data, steps, speeds))))
    check_max_runs(experiment, tuning_runs)
    limits = [f"{experiment.max_runs} runs"] if experiment.max_runs else []
    limits += [f"{experiment.max_hours:g} hours of runs"] if experiment.max_hours else []
    if limits:
        print(f"limit     {' and '.join(limits)}, tuning included")


def print_runs(tasks: Sequence[PlannedRun]) -> None:
    """Print the runs of a dry run in their order, with their states, and the first one as a command."""
    for i, task in enumerate(tasks, 1):
        print(f"{i:4} {task.name}: {task.state()}")
    if tasks:
        words = shlex.join(tasks[0].arguments)
        print(f"the first run as a command: NUM_PROCS=1 ./launch_local_train.sh {words}")
