"""Cost of checkpoints: seconds that training waits, seconds of background writing, share of training time.

    python benchmarks/checkpoint_cost.py --preset cpu --data-dir data/cifar100
    python benchmarks/checkpoint_cost.py --preset spt-lsa --steps 200 --out results/checkpoint_cost/gpu

Turns of --steps optimizer steps alternate: without a checkpoint, and with one in the middle, which is captured,
written, verified and renamed as in a run. A checkpoint costs at most the time that training waits for it plus the time
to write it alone, as if the writer thread took all its time from training. The difference between adjacent turns shows
the actual cost. The share is the cost divided by the time between two checkpoints of a run with default flags: ten
minutes, or one epoch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import add_data, add_settings, keep, output_file, output_folder, step_settings
from benchmarks.lib.tables import cell
from benchmarks.lib.timing import alternate, machine, spread, synchronize
from common.machine import visible_gpus
from config.command_line import Parser, at_least_one, run_cli
from optim.lr_schedule import Schedule
from records.checkpoint_store import Checkpoints, Interval
from records.provenance import commit_text, provenance
from records.run_folder import Progress, RunFolder

if TYPE_CHECKING:
    from dali_pipeline import Batches

GOAL = 0.02  # share of training time
DEFAULT_SECONDS = 600.0  # --checkpoint-every


def main() -> int:
    args = parse_arguments()
    from dali_pipeline import Batches, side_of  # after the arguments, so that --help answers at once
    from image_data.dataset import Dataset
    from model import build_model
    from parallel.strategies import engine_class
    from training.run_facts import RunOptions, facts_of

    settings = step_settings(args.preset, args.set, strategy=args.strategy)
    dataset = Dataset.open(args.data_dir)
    side = side_of(dataset, settings.image_side)
    engine = engine_class(settings.strategy)(
        lambda: build_model(settings.model, len(dataset.classes), side), settings, Schedule(settings.schedule, 10**9), 0
    )
    which, of_how_many = engine.data_shard
    training = Batches(
        dataset,
        "train",
        engine.batch_sizes.micro,
        which,
        of_how_many,
        augmentation=settings.augmentation,
        device=engine.device,
        image_side=settings.image_side,
    )
    steps_per_epoch = len(training) // engine.batch_sizes.accumulation
    options = RunOptions(
        args.preset,
        seed=0,
        max_steps=None,
        hold_out=None,
        patience=None,
        init_weights=None,
        synthetic=False,
        deterministic=False,
    )
    facts = facts_of(options, dataset, dataset.folder, engine, training.source, steps_per_epoch, total_steps=10**9)
    if args.runs_dir:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.runs_dir) as folder:
        record = RunFolder(Path(folder))
        record.create(facts)
        measured = measure(engine, training, record, args)
    training.close()
    engine.close()
    report(measured, steps_per_epoch, engine, args)
    return 0


def measure(engine: Any, training: Batches, record: RunFolder, args: argparse.Namespace) -> dict[str, Any]:
    """Return seconds of every turn and of the two parts of every checkpoint, and its size in bytes."""
    from training.checkpoint_writer import CheckpointWriter

    saver = CheckpointWriter(engine, Interval(), {}, record, Checkpoints(record.folder / "state", 2))
    stream = (batch for epoch in itertools.count() for batch in training.epoch(epoch))
    waited: list[float] = []

    def turn(saves: bool) -> float:
        synchronize(engine.device)
        began = time.perf_counter()
        for i in range(args.steps):
            engine.train_batch(stream)
            if saves and i == args.steps // 2:
                snapshot = saver.take_snapshot(Progress(), {"weights.safetensors": engine.weights})
                saver.write(snapshot, Progress())
                waited.append(snapshot.seconds)
        synchronize(engine.device)
        seconds = time.perf_counter() - began
        saver.wait()  # a checkpoint that is still being written must not slow down the next turn
        return seconds

    def write_alone() -> float:
        snapshot = saver.take_snapshot(Progress(), {"weights.safetensors": engine.weights})
        began = time.perf_counter()
        saver.write(snapshot, Progress())
        saver.wait()
        return time.perf_counter() - began

    turn(True)
    turn(False)
    waited.clear()
    turns = alternate({"plain": lambda: turn(False), "saving": lambda: turn(True)}, args.rounds)
    written = [write_alone() for _ in range(args.rounds)]
    size = sum(file.stat().st_size for file in record.newest_checkpoint().iterdir())
    return {"plain": turns["plain"], "saving": turns["saving"], "waited": waited, "written": written, "bytes": size}


def report(measured: dict[str, Any], steps_per_epoch: int, engine: Any, args: argparse.Namespace) -> None:
    """Print the table, and write it with the figures to --out."""
    step_seconds = spread([turn / args.steps for turn in measured["plain"]])
    costs = spread([saving - plain for saving, plain in zip(measured["saving"], measured["plain"], strict=True)])
    waited, written = spread(measured["waited"]), spread(measured["written"])
    between = min(DEFAULT_SECONDS, steps_per_epoch * step_seconds.median)
    share = (waited.median + written.median) / between
    lines = [
        f"# Checkpoint cost of `{args.preset}`, {engine.num_parameters:,} parameters",
        "",
        f"{engine.name}, {engine.describe()}, {measured['bytes'] / 1e6:.1f} MB per checkpoint; "
        f"{len(measured['plain'])} rounds of {args.steps} steps; median (min .. max). "
        f"Made with `benchmarks/checkpoint_cost.py`, commit {commit_text(provenance(), 7)}.",
        "",
        "| | seconds |",
        "|---|---:|",
        f"| one training step | {cell(step_seconds, '.4f')} |",
        f"| training waits for a checkpoint | {cell(waited, '.4f')} |",
        f"| writing, verifying and renaming it, in the background | {cell(written, '.4f')} |",
        f"| turn with a checkpoint minus adjacent turn without | {cell(costs, '.4f')} |",
        f"| between two checkpoints with default flags | {between:.1f} |",
        "",
        f"Share of training time: at most **{100 * share:.2f} %** "
        f"({'below' if share < GOAL else 'above'} the goal of {100 * GOAL:.0f} %).",
    ]
    text = "\n".join(lines)
    print(text)
    if args.out:
        facts = {
            "preset": args.preset,
            "share": share,
            **measured,
            "machine": machine(engine.device),
            "commit": provenance()["commit"],
        }
        keep(
            (args.out.with_suffix(".md"), text + "\n"),
            (args.out.with_suffix(".json"), json.dumps(facts, indent=1) + "\n"),
        )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/checkpoint_cost.py",
        "Measure the cost of checkpoints: seconds of waiting and writing, share of training time.",
        example="python benchmarks/checkpoint_cost.py --preset cpu --data-dir data/cifar100",
    )
    add_data(parser, source=False)
    settings = add_settings(parser, "spt-lsa" if visible_gpus() else "cpu")
    settings.add_argument("--strategy", metavar="NAME", help="parallelism strategy (default: the preset's, else zero)")
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--steps", type=at_least_one, default=20, metavar="N", help="optimizer steps per turn (default: %(default)s)"
    )
    how.add_argument(
        "--rounds",
        type=at_least_one,
        default=10,
        metavar="N",
        help="number of turns with and without a checkpoint (default: %(default)s)",
    )
    how.add_argument(
        "--runs-dir",
        type=output_folder,
        metavar="DIR",
        help="folder on the disk to measure (default: the system's temporary folder)",
    )
    kept = parser.add_argument_group("output")
    kept.add_argument("--out", type=output_file, metavar="PATH", help="write PATH.json and PATH.md (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
