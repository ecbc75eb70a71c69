# PYTHON_ARGCOMPLETE_OK
"""Is my idea better? Runs the arms of an experiment file with several seeds each, and writes a report.

    python compare.py experiments/pairs.toml --dry-run         # the plan: arms, sizes, what is done already
    python compare.py experiments/pairs.toml                   # run what is missing, then report
    python compare.py experiments/pairs.toml --size full       # at another of its sizes
    python compare.py experiments/pairs.toml --shard 2/4       # a quarter of the runs, for the second of four machines on one disk

An experiment file: `comparison/experiment.py`. Each run is a run folder `runs/<question>-<size>/<arm>-seed<k>` with its output beside it
(`.log`); the report goes to `results/<question>-<size>/`. Started again, it reuses finished runs and goes on with unfinished ones.
Of several shards, the one that finds all runs finished writes the report.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.paths import DATA, PROJECT, RESULTS, RUNS
from common.stop_signal import StopSignal
from comparison.experiment import Experiment, Variant, read
from comparison.run_queue import PlannedRun, check_existing_runs, device_slots, launch, run_all
from comparison.significance import power_note
from comparison.time_budget import calibrate
from config.command_line import Parser, at_least_one, run_cli
from records.run_folder import RunFolder

if TYPE_CHECKING:
    from models.cost import Cost


@dataclass(frozen=True)
class Data:
    """What must be known of the dataset to plan runs."""

    folder: Path
    num_train: int  # what is left after holding out
    num_classes: int
    image_side: int
    fingerprint: str | None  # None where it is not prepared yet


def main() -> int:
    args = parse_arguments()
    experiment = read(args.experiment, args.size, args.seeds, args.set, args.final)
    if args.shard and experiment.budget == "seconds":
        raise SettingsError(
            "a budget in seconds cannot be shared out: the arms' speeds must be measured in a row on one machine; leave out --shard"
        )
    runs = args.runs_dir.resolve() / experiment.name
    data = data_of_runs(runs, args) if args.report_only else dataset_facts(experiment, args)
    from comparison.variant_costs import costs  # after the arguments: it imports PyTorch

    costs = costs(experiment, data.num_classes, data.image_side)
    print_plan(experiment, costs)
    stop = StopSignal()

    def run(tasks: list[PlannedRun]) -> dict[str, str]:
        if args.dry_run or args.report_only:
            return {}
        check_existing_runs(tasks, args.redo_changed)
        return run_all(tasks, device_slots(args.parallel), stop, launch)

    tasks, failures = plan(experiment, data, runs, run)
    mine = share(experiment, tasks, args.shard)
    if args.dry_run:
        print_runs(mine)
        return 0
    failures |= run(list(mine.values()))
    if stop.number:
        print("stopped; start the same comparison again to go on")
        return EXIT_STOPPED
    if left := [task for key, task in tasks.items() if key not in mine and task.state() != "finished"]:
        for name, reason in failures.items():
            print(f"missing: {name}: {reason}", file=sys.stderr)
        print(f"this shard is done; {len(left)} run(s) of others are not: the last shard reports, or --report-only")
        return 1 if failures else 0
    return report(experiment, costs, tasks, failures, args)


def dataset_facts(experiment: Experiment, args: argparse.Namespace) -> Data:
    """The dataset of the experiment, prepared if need be (not for a plan alone)."""
    from image_data.dataset import Dataset
    from image_data.preparation.prepare import prepare

    folder = (args.data_dir or DATA / experiment.dataset).resolve()
    if not Dataset.is_prepared(folder):
        if args.dry_run:
            print(f"note: {os.path.relpath(folder)} is not prepared yet; the plan is for a dataset of CIFAR's size")
            return Data(
                folder,
                round(50_000 * (1 - experiment.hold_out)),
                100 if experiment.dataset == "cifar100" else 10,
                32,
                None,
            )
        prepare(folder, dataset=experiment.dataset)
    dataset = Dataset.open(folder)
    if experiment.hold_out:
        dataset = dataset.hold_out(experiment.hold_out)
    return Data(
        folder, len(dataset.splits["train"]), len(dataset.classes), dataset.image_side or 0, dataset.fingerprint
    )


def data_of_runs(runs: Path, args: argparse.Namespace) -> Data:
    """The same from the runs themselves: a report needs no dataset. Raises RunError when there is no run."""
    for path in sorted(runs.glob("*/run.json")):
        facts = RunFolder(path.parent).facts()["dataset"]
        folder = (args.data_dir or PROJECT / facts["folder"]).resolve()
        return Data(
            folder, facts["num_images"]["train"], len(facts["classes"]), facts["image_side"] or 0, facts["fingerprint"]
        )
    raise RunError(f"there is no run in {os.path.relpath(runs)} to report on; leave out --report-only")


def plan(
    experiment: Experiment, data: Data, runs: Path, run: Callable[[list[PlannedRun]], dict[str, str]]
) -> tuple[dict[tuple[str, int], PlannedRun], dict[str, str]]:
    """The runs, by arm and seed, in the random order they are made in; and what failed on the way to know their lengths.

    `run` makes the calibration runs that a budget in seconds needs.
    """
    steps: dict[str, int | None]
    failures: dict[str, str] = {}
    if experiment.budget == "seconds":
        steps, failures = calibrate(
            experiment, lambda arm, name, count: make_task(experiment, arm, 0, data, runs / name, count), run
        )
    else:
        steps = dict.fromkeys(
            [arm.name for arm in experiment.variants],
            int(experiment.budget_amount) if experiment.budget == "steps" else None,
        )
    order = experiment.tasks()
    random.Random(experiment.name).shuffle(order)
    return {
        (arm.name, seed): make_task(experiment, arm, seed, data, runs / f"{arm.name}-seed{seed}", steps[arm.name])
        for arm, seed in order
        if arm.name in steps
    }, failures


def share(
    experiment: Experiment, tasks: dict[tuple[str, int], PlannedRun], shard: tuple[int, int] | None
) -> dict[tuple[str, int], PlannedRun]:
    """The I-th of N shares of the runs: dealt out seed by seed, nearly equally many to each, and every run to exactly one.

    The deal begins one arm later with each seed, lest one machine make all runs of an arm: speeds are compared as well.
    """
    number, count = shard or (1, 1)
    arms = [arm.name for arm in experiment.variants]

    def place(arm: str, seed: int) -> int:
        return seed * len(arms) + (arms.index(arm) + seed) % len(arms)

    return {key: task for key, task in tasks.items() if place(*key) % count == number - 1}


def make_task(
    experiment: Experiment, arm: Variant, seed: int, data: Data, folder: Path, steps: int | None
) -> PlannedRun:
    """One run of train.py. `steps` None: the budget is in epochs."""
    batch = arm.settings.engine["train_batch_size"]
    if data.num_train < batch:
        raise SettingsError(
            f"arm '{arm.name}': train_batch_size={batch} is more than the {data.num_train} training images"
        )
    epochs = -(-steps // (data.num_train // batch)) if steps else int(experiment.budget_amount)
    settings = replace(arm.settings, epochs=epochs)
    hold_out = experiment.hold_out or None
    expected = {
        "settings": settings.as_dict(),
        "seed": seed,
        "max_steps": steps,
        "hold_out": hold_out,
        "fingerprint": data.fingerprint,
    }
    words = [
        "--preset",
        experiment.preset,
        "--data-dir",
        data.folder,
        "--runs-dir",
        folder.parent,
        "--name",
        folder.name,
        "--seed",
        seed,
        "--epochs",
        epochs,
    ]
    words += ["--max-steps", steps] if steps else []
    words += ["--hold-out", hold_out] if hold_out else []
    words += [word for text in arm.overrides for word in ("--set", text)]
    return PlannedRun(folder.name, folder, [str(word) for word in words], expected)


def report(
    experiment: Experiment,
    costs: list[Cost],
    tasks: dict[tuple[str, int], PlannedRun],
    failures: dict[str, str],
    args: argparse.Namespace,
) -> int:
    """Write the report and say the answers. Returns the exit code: 1 when runs are missing from it."""
    from comparison.report import variant_results, write

    results = variant_results(experiment, costs, tasks, args.final)
    finished = {(arm.name, run.seed) for arm in results for run in arm.runs}
    missing = dict(failures)
    for arm, seed in experiment.tasks():
        if (arm.name, seed) not in finished:
            missing.setdefault(f"{arm.name}-seed{seed}", "is not finished")
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    if not finished:
        raise RunError("no run is finished, so there is nothing to report")
    path = write(experiment, results, missing, args.results_dir / experiment.name, args.final, command(args))
    text = path.read_text()
    print(
        "\n"
        + text[text.index("## Answer") : text.index("\n|")].replace("**", "").replace("\\*", "*")
        + f"\nreport    {os.path.relpath(path)}"
    )
    return 1 if missing else 0


def command(args: argparse.Namespace) -> str:
    """What to type for this report, without the folders of one machine."""
    experiment = args.experiment.resolve()
    words = [
        "python",
        "compare.py",
        str(experiment.relative_to(PROJECT) if experiment.is_relative_to(PROJECT) else experiment.name),
    ]
    words += [
        word
        for flag in ("size", "seeds")
        if getattr(args, flag) is not None
        for word in (f"--{flag}", str(getattr(args, flag)))
    ]
    words += [word for text in args.set for word in ("--set", text)]
    return shlex.join(words + (["--final"] if args.final else []))


def print_plan(experiment: Experiment, costs: list[Cost]) -> None:
    first = experiment.variants[0].settings
    print(f"question  {experiment.question}")
    print(
        f"runs      {len(experiment.variants)} arms x {experiment.seeds} seeds, {experiment.budget_amount:g} {experiment.budget} each, "
        f"preset {Path(experiment.preset).stem}, batch {first.engine['train_batch_size']}; compared on "
        + (f"{100 * experiment.hold_out:g}% of train, held out" if experiment.hold_out else "the test split")
    )
    width = max(len(arm.name) for arm in experiment.variants)
    for arm, cost in zip(experiment.variants, costs, strict=True):
        print(f"  {arm.name:{width}}  {cost.parameters:>12,} parameters  {cost.flops / 1e6:>9,.1f} MFLOPs  {arm.idea}")
    if note := power_note(experiment.seeds, len(experiment.variants)):
        print(f"note: {note}")


def print_runs(tasks: dict[tuple[str, int], PlannedRun]) -> None:
    """For a dry run: the order, what is there already, and one command."""
    for i, task in enumerate(tasks.values(), 1):
        print(f"{i:4} {task.name}: {task.state()}")
    if tasks:
        print(
            "the first as a command: NUM_PROCS=1 ./launch_local_train.sh "
            + shlex.join(next(iter(tasks.values())).arguments)
        )
    else:
        print("each arm's speed is measured first, then its steps are known")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python compare.py experiment",
        "Compare architectures: run every arm of an experiment file with several seeds, and report what that shows.",
        example="python compare.py experiments/eight-ideas.toml --size small --dry-run",
        notes="exit code: 0 all runs are in the report, 1 some are missing (each is named), "
        f"{EXIT_STOPPED} stopped and saved: start again to go on",
    )
    parser.add_argument("experiment", type=Path, help="a file of experiments/")
    asked = parser.add_argument_group("the question")
    asked.add_argument("--size", help="one of the file's sizes: small or full in experiments/ (default: small)")
    asked.add_argument(
        "--seeds",
        type=at_least_one,
        metavar="N",
        help="in place of the file's; runs that exist are reused (default: its number)",
    )
    asked.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting of all arms; repeat for more",
    )
    asked.add_argument(
        "--final", action="store_true", help="report the test split too: once, when all choices are made"
    )
    what = parser.add_argument_group("what is run")
    what.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    what.add_argument("--report-only", action="store_true", help="run nothing, report on the runs that are there")
    what.add_argument(
        "--redo-changed", action="store_true", help="set aside existing runs of other settings, and make them anew"
    )
    what.add_argument(
        "--parallel",
        type=at_least_one,
        metavar="N",
        help="runs at once (default: one a GPU; one on the CPU, with all its cores)",
    )
    what.add_argument(
        "--shard",
        type=one_of_many,
        metavar="I/N",
        help="make the I-th of N shares of the runs, for machines that share a disk (default: all)",
    )
    where = parser.add_argument_group("folders")
    where.add_argument("--data-dir", type=Path, metavar="DIR", help="of the prepared dataset (default: data/<dataset>)")
    where.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where run folders live (default: runs)"
    )
    where.add_argument(
        "--results-dir", type=Path, default=RESULTS, metavar="DIR", help="where reports go (default: results)"
    )
    args = parser.parse_args()
    if args.shard and args.report_only:
        parser.error("a report is of all runs: give --report-only without --shard")
    return args


def one_of_many(text: str) -> tuple[int, int]:
    """`2/4` -> (2, 4)."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 2/4, not '{text}'")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(run_cli(main))
