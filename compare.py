# PYTHON_ARGCOMPLETE_OK
"""Compare architectures: run the variants of an experiment file with several seeds each, and report the differences.

    python compare.py experiments/pairs.toml --dry-run         # the plan: variants, sizes, power, finished runs
    python compare.py experiments/pairs.toml                   # run what is missing, then report
    python compare.py experiments/pairs.toml --size full       # the same at another of its sizes
    python compare.py experiments/pairs.toml --shard 2/4       # a quarter of the runs, on the second of four machines

`comparison/experiment.py` describes experiment files. Each run is a run folder
`runs/<experiment>-<size>/<variant>-seed<k>` with its output next to it (`.log`). The report is written to
`results/<experiment>-<size>/`. The same command again reuses finished runs and resumes unfinished ones. Of several
shards, the one that finds all runs finished writes the report.
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
from comparison.run_queue import PlannedRun, check_existing_runs, device_slots, launch, mixed_sources, run_all
from comparison.time_budget import calibrate
from config.command_line import Parser, at_least_one, run_cli
from records.run_folder import RunFolder

if TYPE_CHECKING:
    from comparison.variant_costs import VariantCost


@dataclass(frozen=True)
class Data:
    """What planning needs to know about the dataset."""

    folder: Path
    num_train: int  # training images, without the validation split
    num_classes: int
    image_side: int
    fingerprint: str | None  # None if the dataset is not prepared yet


def main() -> int:
    args = parse_arguments()
    experiment = read(args.experiment, args.size, args.seeds, args.set, args.final)
    if args.shard and experiment.budget == "seconds":
        raise SettingsError(
            "a budget in seconds cannot be split into shards, since one machine must measure the speeds of all "
            "variants; leave out --shard"
        )
    runs = args.runs_dir.resolve() / experiment.name
    data = data_of_runs(runs, args) if args.report_only else dataset_facts(experiment, args)
    # after the arguments, since these import PyTorch and SciPy
    from comparison.console import print_plan, print_runs
    from comparison.matching import match_sizes
    from comparison.variant_costs import costs

    experiment = match_sizes(experiment, data.num_classes, data.image_side)
    counted = costs(experiment, data.num_classes, data.image_side)
    print_plan(experiment, counted, args.runs_dir.resolve(), args.results_dir)
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
        print("stopped; start the same command again to resume")
        return EXIT_STOPPED
    if left := [task for key, task in tasks.items() if key not in mine and task.state() != "finished"]:
        for name, reason in failures.items():
            print(f"missing: {name}: {reason}", file=sys.stderr)
        print(
            f"this shard is done; {len(left)} run(s) of other shards are not. The last shard writes the report, "
            "or --report-only does"
        )
        return 1 if failures else 0
    return report(experiment, counted, tasks, failures, args)


def dataset_facts(experiment: Experiment, args: argparse.Namespace) -> Data:
    """Return the facts of the experiment's dataset, which is prepared first if necessary (not for a dry run)."""
    from image_data.dataset import Dataset
    from image_data.preparation.prepare import prepare

    folder = (args.data_dir or DATA / experiment.dataset).resolve()
    if not Dataset.is_prepared(folder):
        if args.dry_run:
            print(f"note: {os.path.relpath(folder)} is not prepared yet; the plan assumes a dataset of CIFAR's size")
            num_train = round(50_000 * (1 - experiment.hold_out))
            return Data(folder, num_train, 100 if experiment.dataset == "cifar100" else 10, 32, None)
        prepare(folder, dataset=experiment.dataset)
    dataset = Dataset.open(folder)
    if experiment.hold_out:
        dataset = dataset.hold_out(experiment.hold_out)
    return Data(
        folder, len(dataset.splits["train"]), len(dataset.classes), dataset.image_side or 0, dataset.fingerprint
    )


def data_of_runs(runs: Path, args: argparse.Namespace) -> Data:
    """Return the same facts from the existing runs, since a report needs no dataset.

    Raises:
        RunError: there is no run.
    """
    for path in sorted(runs.glob("*/run.json")):
        facts = RunFolder(path.parent).facts()["dataset"]
        folder = (args.data_dir or PROJECT / facts["folder"]).resolve()
        return Data(
            folder, facts["num_images"]["train"], len(facts["classes"]), facts["image_side"] or 0, facts["fingerprint"]
        )
    raise RunError(f"{os.path.relpath(runs)} has no run to report on; leave out --report-only")


def plan(
    experiment: Experiment, data: Data, runs: Path, run: Callable[[list[PlannedRun]], dict[str, str]]
) -> tuple[dict[tuple[str, int], PlannedRun], dict[str, str]]:
    """Plan all runs.

    Args:
        run: makes the calibration runs that a budget in seconds needs.

    Returns:
        The runs by variant and seed, in the random order in which they are made, and the calibration runs that failed.
    """
    steps: dict[str, int | None]
    failures: dict[str, str] = {}
    if experiment.budget == "seconds":
        steps, failures = calibrate(
            experiment, lambda variant, name, count: make_task(experiment, variant, 0, data, runs / name, count), run
        )
    else:
        count = int(experiment.budget_amount) if experiment.budget == "steps" else None
        steps = dict.fromkeys([variant.name for variant in experiment.variants], count)
    order = experiment.tasks()
    random.Random(experiment.name).shuffle(order)
    return {
        (one.name, seed): make_task(experiment, one, seed, data, runs / f"{one.name}-seed{seed}", steps[one.name])
        for one, seed in order
        if one.name in steps
    }, failures


def share(
    experiment: Experiment, tasks: dict[tuple[str, int], PlannedRun], shard: tuple[int, int] | None
) -> dict[tuple[str, int], PlannedRun]:
    """Return the runs of shard I of N; None is all of them.

    Runs are dealt seed by seed, so that all shards have nearly the same number. The deal starts one variant later with
    each seed; otherwise one machine could make all runs of a variant, and speeds are compared as well.
    """
    number, count = shard or (1, 1)
    variants = [variant.name for variant in experiment.variants]

    def place(variant: str, seed: int) -> int:
        return seed * len(variants) + (variants.index(variant) + seed) % len(variants)

    return {key: task for key, task in tasks.items() if place(*key) % count == number - 1}


def make_task(
    experiment: Experiment, variant: Variant, seed: int, data: Data, folder: Path, steps: int | None
) -> PlannedRun:
    """Plan one run of train.py. With `steps` None, the budget is in epochs."""
    batch = variant.settings.engine["train_batch_size"]
    if data.num_train < batch:
        raise SettingsError(
            f"variant '{variant.name}': train_batch_size={batch} is more than the {data.num_train} training images; "
            "choose a smaller batch"
        )
    epochs = -(-steps // (data.num_train // batch)) if steps else int(experiment.budget_amount)
    hold_out = experiment.hold_out or None
    expected = {
        "settings": replace(variant.settings, epochs=epochs).as_dict(),
        "seed": seed,
        "max_steps": steps,
        "hold_out": hold_out,
        "fingerprint": data.fingerprint,
    }
    words = ["--preset", experiment.preset, "--data-dir", data.folder, "--runs-dir", folder.parent]
    words += ["--name", folder.name, "--seed", seed, "--epochs", epochs]
    words += ["--max-steps", steps] if steps else []
    words += ["--hold-out", hold_out] if hold_out else []
    words += [word for text in variant.overrides for word in ("--set", text)]
    group = folder.name if folder.name.startswith("calibration-") else variant.name
    return PlannedRun(folder.name, folder, [str(word) for word in words], expected, group)


def report(
    experiment: Experiment,
    costs: list[VariantCost],
    tasks: dict[tuple[str, int], PlannedRun],
    failures: dict[str, str],
    args: argparse.Namespace,
) -> int:
    """Write the report and print its answers. Returns the exit code: 1 if runs are missing from it.

    Raises:
        RunError: no run is finished, or the runs of one variant were trained by different source code.
    """
    from comparison.report import variant_results, write

    results = variant_results(experiment, costs, tasks, args.final)
    for variant in results:
        codes = {f"{variant.name}-seed{run.seed}": run.facts.get("code") for run in variant.runs}
        if problem := mixed_sources(codes):
            raise RunError(
                f"variant '{variant.name}' mixes two versions of the source code: {problem}. Run compare.py with "
                "--redo-changed to run the outdated ones again"
            )
    finished = {(variant.name, run.seed) for variant in results for run in variant.runs}
    missing = dict(failures)
    for variant, seed in experiment.tasks():
        if (variant.name, seed) not in finished:
            missing.setdefault(f"{variant.name}-seed{seed}", "is not finished")
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}", file=sys.stderr)
    if not finished:
        raise RunError("no run is finished, so there is nothing to report; each run's .log file says why")
    path = write(experiment, results, missing, args.results_dir / experiment.name, args.final, command(args))
    text = path.read_text(encoding="utf-8")
    answers = text[text.index("## Result") : text.index("\n|")].replace("**", "").replace("\\*", "*")
    print(f"\n{answers}\nreport    {os.path.relpath(path)}")
    return 1 if missing else 0


def command(args: argparse.Namespace) -> str:
    """Return the command that makes this report, without the folders of one machine."""
    path = args.experiment.resolve()
    name = str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path.name)
    words = ["python", "compare.py", name]
    for flag in ("size", "seeds"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    words += [word for text in args.set for word in ("--set", text)]
    return shlex.join(words + (["--final"] if args.final else []))


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python compare.py experiment",
        "Compare architectures: run every variant of an experiment with several seeds, and report the differences.",
        example="python compare.py experiments/eight-ideas.toml --size small --dry-run",
        notes="exit code: 0 all runs are in the report, 1 some are missing (each is named), "
        f"{EXIT_STOPPED} stopped and saved: start the same command again to resume",
    )
    parser.add_argument("experiment", type=Path, help="experiment file, such as experiments/pairs.toml")
    asked = parser.add_argument_group("experiment")
    asked.add_argument("--size", help="size defined in the file: small or full in experiments/ (default: small)")
    asked.add_argument(
        "--seeds",
        type=at_least_one,
        metavar="N",
        help="number of seeds; existing runs are reused (default: the number in the file)",
    )
    asked.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="setting to override in all variants; repeat for more",
    )
    asked.add_argument(
        "--final", action="store_true", help="also report the test split; use it once, after all choices are made"
    )
    what = parser.add_argument_group("runs")
    what.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    what.add_argument("--report-only", action="store_true", help="report on the existing runs and run nothing")
    what.add_argument(
        "--redo-changed",
        action="store_true",
        help="rename existing runs of other settings or other source code aside, and run them again",
    )
    what.add_argument(
        "--parallel",
        type=at_least_one,
        metavar="N",
        help="number of runs at once (default: one per GPU; one on the CPU, with all its cores)",
    )
    what.add_argument(
        "--shard",
        type=one_of_many,
        metavar="I/N",
        help="make shard I of N of the runs, for machines that share a disk (default: all)",
    )
    where = parser.add_argument_group("folders")
    where.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the prepared dataset (default: data/<dataset>)"
    )
    where.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="folder for run folders (default: runs)"
    )
    where.add_argument(
        "--results-dir", type=Path, default=RESULTS, metavar="DIR", help="folder for reports (default: results)"
    )
    args = parser.parse_args()
    for name in ("experiment", "data_dir", "runs_dir", "results_dir"):
        if path := getattr(args, name):
            setattr(args, name, Path(os.path.expanduser(path)))
    if args.shard and args.report_only:
        parser.error("--report-only reports on all runs; leave out --shard")
    if args.dry_run and args.report_only:
        parser.error("--dry-run and --report-only exclude each other; give one of them")
    return args


def one_of_many(text: str) -> tuple[int, int]:
    """Parse a shard: `2/4` -> (2, 4)."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 2/4, not '{text}'")
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    sys.exit(run_cli(main))
