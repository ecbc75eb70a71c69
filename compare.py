# PYTHON_ARGCOMPLETE_OK
"""Compare architectures: run the variants of an experiment file with several seeds each, and report the differences.

    python compare.py experiments/pairs.toml --dry-run         # the plan: variants, sizes, power, finished runs
    python compare.py experiments/pairs.toml                   # run what is missing, then report
    python compare.py experiments/pairs.toml --size full       # the same at another of its sizes
    python compare.py experiments/pairs.toml --shard 2/4       # a quarter of the runs, on the second of four machines

`comparison/experiment_file.py` describes experiment files, `comparison/search.py` those that search for settings.
Each run is a run folder `runs/<experiment>-<size>/<variant>-seed<k>` with its output next to it (`.log`). The report
is written to `results/<experiment>-<size>/`. The same command again reuses finished runs and resumes unfinished ones.
Of several shards, the one that finds all runs finished writes the report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.machine import visible_gpus
from common.output_files import check_new_folder
from common.paths import PROJECT, RUNS_OF_COMPARISON, near_path
from common.stop_signal import StopSignal
from comparison.arguments import parse_arguments
from comparison.experiment import Experiment
from comparison.experiment_file import read
from comparison.parallel_trial import fastest_count
from comparison.planned_run import PlannedRun
from comparison.planning import Data, data_of_runs, dataset_facts, plan, run_until_decided, share, steps_by_variant
from comparison.run_queue import check_existing_runs, device_slots, run_all
from comparison.run_queue import launch as launch_cold
from comparison.search import is_search
from comparison.tracker_options import tracker_words, with_trackers
from comparison.warm_process import launch
from config.command_line import run_cli
from config.own_parts import own_parts_of, published_word

if TYPE_CHECKING:
    from comparison.tuning_runs import Tuned
    from comparison.variant_costs import VariantCost

Tasks = dict[tuple[str, int], PlannedRun]  # by variant and seed


def main() -> int:
    args = parse_arguments()
    os.environ[RUNS_OF_COMPARISON] = str(args.runs_dir.absolute())
    if is_search(args.experiment):
        from comparison.search_command import run_search

        start, trackers = launch_cold if args.cold else launch, tracker_words(args, f"{args.experiment.stem}/search")
        return run_search(args, start, command(args), trackers)
    experiment = read(args.experiment, args.size, args.seeds, args.set, args.final)
    check_shard(experiment, args.shard)
    check_parallel(experiment, args.parallel)
    if not args.dry_run:
        check_new_folder(args.results_dir, "--results-dir")
        if not args.report_only:
            check_new_folder(args.runs_dir, "--runs-dir")
    runs = args.runs_dir.resolve() / experiment.name
    tuned = [list(values) for values in experiment.tuning.candidates] if experiment.tuning else []
    if own_parts_of([*(variant.settings.as_dict() for variant in experiment.variants), tuned]) and not args.report_only:
        from comparison.variant_costs import check_own_parts_of

        check_own_parts_of(experiment, args.data_dir)
    data = (
        data_of_runs(experiment, runs, args.data_dir)
        if args.report_only
        else dataset_facts(experiment, args.data_dir, args.dry_run)
    )
    # after the arguments, since these import PyTorch and SciPy
    from comparison.console import print_plan
    from comparison.matching import match_sizes
    from comparison.tuning_runs import check_candidates_fit
    from comparison.variant_costs import costs

    experiment = match_sizes(experiment, data.num_classes, data.image_side)
    check_candidates_fit(experiment, data.num_classes, data.image_side)
    counted = costs(experiment, data.num_classes, data.image_side)
    print_plan(experiment, counted, data, args.runs_dir.resolve(), args.results_dir)
    stop = StopSignal()
    done = make_runs(experiment, data, runs, stop, args)
    if args.dry_run:
        return 0
    if stop.number:
        print("stopped; start the same command again to resume")
        return EXIT_STOPPED
    if done.left:
        for name, reason in done.failures.items():
            print(f"missing: {name}: {reason}", file=sys.stderr)
        print(
            f"this shard is done; {done.left} run(s) of other shards are not. The last shard writes the report, "
            "or --report-only does"
        )
        return 1 if done.failures else 0
    return report(done, counted, data, args)


@dataclass
class Done:
    """The runs of a comparison: with tuned values first, if the file asks for them, then with its own values."""

    comparisons: list[tuple[Experiment, Tasks]]
    tuned: Tuned | None
    failures: dict[str, str]  # run -> why
    left: int = 0  # runs of other shards


def make_runs(experiment: Experiment, data: Data, runs: Path, stop: StopSignal, args: argparse.Namespace) -> Done:
    """Make the runs that are missing; a dry run prints them instead, and a report alone makes none."""
    from comparison.console import print_runs
    from comparison.run_budget import RunBudget
    from comparison.tuning_report import chosen_lines
    from comparison.tuning_runs import tune

    slots = device_slots(None if args.parallel == "auto" else args.parallel)
    budget = RunBudget(experiment, runs, stop)
    start = launch_cold if args.cold else launch
    known: dict[str, PlannedRun] = {}  # of tuning and of the comparison, which have one source for each variant

    def check(tasks: list[PlannedRun]) -> None:
        known.update({task.name: task for task in tasks})
        if not (args.dry_run or args.report_only):
            check_existing_runs(list(known.values()), args.redo_changed)

    def run(tasks: list[PlannedRun]) -> dict[str, str]:
        check(tasks)
        if not tasks or args.dry_run or args.report_only or not budget.allows(tasks):
            return {}
        at_once = slots
        if args.parallel == "auto":
            at_once = device_slots(fastest_count(tasks, budget, start))
        return run_all(with_trackers(tasks, args, experiment.name), at_once, budget, start, budget.set_active)

    steps, failures = steps_by_variant(experiment, data, runs, run)
    done = Done([], None, failures)
    if args.dry_run and not steps:
        print("the speed of each variant is measured first; its number of steps follows from that")
    comparisons = [(experiment, steps)]
    if experiment.tuning:
        if experiment.tuning.report_shared:
            known.update({task.name: task for task in plan(experiment, data, runs, steps).values()})
        tuned = done.tuned = tune(experiment, data, runs, steps, check, run, stop)
        failures |= tuned.failures
        for line in chosen_lines(tuned) if not stop.number else []:
            print(line)
        comparisons = [(tuned.experiment, tuned.steps(steps)), *comparisons * experiment.tuning.report_shared]
        if args.dry_run:
            print_runs(tuned.tasks)
    for one, own_steps in comparisons:
        if stop.number:
            break
        if one.max_seeds and not args.dry_run:
            one, tasks, failed = run_until_decided(one, data, runs, own_steps, run, stop)
        else:
            tasks = plan(one, data, runs, own_steps)
            mine = share(one, tasks, args.shard)
            failed = run(list(mine.values()))
            done.left = sum(key not in mine and task.is_left() for key, task in tasks.items())
            if args.dry_run:
                print_runs(list(mine.values()))
        failures |= failed
        done.comparisons.append((one, tasks))
    if budget.problem and not stop.number:
        print(f"{budget.problem}: no more runs are started, and the report has those that are finished")
    return done


def check_shard(experiment: Experiment, shard: tuple[int, int] | None) -> None:
    """Raise SettingsError for an experiment that one machine must run alone."""
    if shard and experiment.budget == "seconds":
        raise SettingsError(
            "a budget in seconds cannot be split into shards, since one machine must measure the speeds of all "
            "variants; leave out --shard"
        )
    if shard and experiment.max_seeds:
        raise SettingsError('until = "decided" needs the results of all runs after each round; leave out --shard')
    if shard and experiment.tuning:
        raise SettingsError("tune needs the results of all runs after each rung; leave out --shard")


def check_parallel(experiment: Experiment, parallel: int | str | None) -> None:
    """Raise SettingsError for a budget in seconds whose runs would share a device; `parallel` is that of --parallel."""
    if experiment.budget != "seconds" or parallel in (None, 1):
        return
    if isinstance(parallel, str) or parallel > max(1, len(visible_gpus())):
        raise SettingsError(
            "a budget in seconds needs runs that do not share a device, since the speed of each would depend on how "
            "many others are running; leave out --parallel"
        )


def report(done: Done, counted: list[VariantCost], data: Data, args: argparse.Namespace) -> int:
    """Write the report and print its answers. Returns the exit code: 1 if runs are missing from it.

    Args:
        counted: cost of every variant with the file's own values.

    Raises:
        RunError: no run is finished, or the runs of one variant were trained by different source code.
    """
    from comparison.report import write
    from comparison.results import check_one_source, variant_results
    from comparison.tuning_report import tuning_facts
    from comparison.variant_costs import costs

    tuned, missing, results = done.tuned, dict(done.failures), []
    for experiment, tasks in done.comparisons:
        is_resized = tuned and tuned.changes_network and experiment.variants == tuned.experiment.variants
        own = costs(experiment, data.num_classes, data.image_side) if is_resized else counted
        results.append(variant_results(experiment, own, tasks, args.final))
        finished = {(variant.name, run.seed) for variant in results[-1] for run in variant.runs}
        for one, seed in experiment.tasks():
            is_planned = (one.name, seed) in tasks or not (experiment.max_seeds or experiment.tuning)
            if is_planned and (one.name, seed) not in finished:
                task = tasks.get((one.name, seed))
                missing.setdefault(one.run_name(seed), task.why_missing() if task else "was not run")
    missing |= tuned.undecided if tuned else {}
    check_one_source(results, tuned.tasks if tuned else [])
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    if not any(variant.runs for variants in results for variant in variants):
        raise RunError("no run is finished, so there is nothing to report; each run's .log file says why")
    (experiment, _), *shared = done.comparisons
    path = write(
        experiment,
        results[0],
        missing,
        args.results_dir / experiment.name,
        args.final,
        command(args),
        tuning_facts(tuned) if tuned else None,
        (shared[0][0], results[1]) if shared else None,
    )
    text = path.read_text(encoding="utf-8").replace("**", "").replace("\\*", "*")
    for section in text.split("## Result")[1 : 1 + len(results)]:
        print(f"\n## Result{section[: section.index('|')].rstrip()}")
    print(f"\nreport    {near_path(path)}")
    update_index(args)
    return 1 if missing else 0


def update_index(args: argparse.Namespace) -> None:
    """Write the page of all runs; a problem with it is a warning, because the report is written."""
    from reports.index import write_index

    try:
        print(f"runs      {write_index(args.runs_dir, args.results_dir)}")
    except Exception as error:
        print(f"warning: the page of all runs was not written: {error}", file=sys.stderr)


def command(args: argparse.Namespace) -> str:
    """Return the command that makes this report, without the folders of one machine."""
    path = args.experiment.resolve()
    name = str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path.name)
    words = ["python", "compare.py", name]
    for flag in ("size", "seeds"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    words += [word for text in args.set for word in ("--set", published_word(text))]
    return shlex.join(words + (["--final"] if args.final else []))


if __name__ == "__main__":
    sys.exit(run_cli(main))
