"""What checkpoints cost: seconds that training waits for one, seconds that a thread writes it, and the share of training time.

    python benchmarks/checkpoint_cost.py --preset cpu --data-dir data/cifar100
    python benchmarks/checkpoint_cost.py --preset spt-lsa --steps 200 --out results/checkpoint_cost/gpu

Turns of --steps optimiser steps alternate: without a checkpoint, and with one in their middle, which is taken, written, proved
and renamed as in a run. One costs at most the time that training waits for it and the time that writing it alone takes, as if
the writing thread took all of its time from training; what neighbouring turns differ by shows whether that is all. The share
is that cost by the time between two checkpoints of a run with default flags: ten minutes, or an epoch.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import add_data, add_settings, keep
from benchmarks.lib.timing import alternate, machine, spread, synchronise
from common.machine import visible_gpus
from config.command_line import Parser, at_least_one, run_cli
from config.settings import resolve
from optim.lr_schedule import Schedule
from records.checkpoint_store import Checkpoints, Interval
from records.provenance import provenance
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

    settings = resolve(args.preset, args.set, strategy=args.strategy)
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
    with tempfile.TemporaryDirectory(dir=args.runs_dir) as folder:
        record = RunFolder(Path(folder))
        record.create(facts)
        measured = measure(engine, training, record, args)
    training.close()
    engine.close()
    report(measured, steps_per_epoch, engine, args)
    return 0


def measure(engine: Any, training: Batches, record: RunFolder, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every turn, of every checkpoint's two parts, and the size of one."""
    from training.checkpoint_writer import CheckpointWriter

    saver = CheckpointWriter(engine, Interval(), {}, record, Checkpoints(record.folder / "state", 2))
    stream = endless(training)
    waited: list[float] = []

    def turn(saves: bool) -> float:
        synchronise(engine.device)
        began = time.perf_counter()
        for i in range(args.steps):
            engine.train_batch(stream)
            if saves and i == args.steps // 2:
                snapshot = saver.take_snapshot(Progress(), {"weights.safetensors": engine.weights})
                saver.write(snapshot, Progress())
                waited.append(snapshot.seconds)
        synchronise(engine.device)
        return time.perf_counter() - began

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


def endless(training: Batches):
    epoch = 0
    while True:
        yield from training.epoch(epoch)
        epoch += 1


def report(measured: dict[str, Any], steps_per_epoch: int, engine: Any, args: argparse.Namespace) -> None:
    step_seconds = spread([turn / args.steps for turn in measured["plain"]])
    costs = spread([saving - plain for saving, plain in zip(measured["saving"], measured["plain"], strict=True)])
    waited, written = spread(measured["waited"]), spread(measured["written"])
    between = min(DEFAULT_SECONDS, steps_per_epoch * step_seconds.median)
    share = (waited.median + written.median) / between
    lines = [
        f"# Checkpoints of `{args.preset}`, {engine.num_parameters:,} parameters",
        "",
        f"{engine.name}, {engine.describe()}, {measured['bytes'] / 1e6:.1f} MB a checkpoint; {len(measured['plain'])} rounds of {args.steps} steps; "
        f"median (minimum .. maximum). Made with `benchmarks/checkpoint_cost.py`, commit {provenance()['commit'][:7]}.",
        "",
        "| | seconds |",
        "|---|---:|",
        f"| one training step | {words(step_seconds)} |",
        f"| training waits for a checkpoint | {words(waited)} |",
        f"| writing, proving and renaming it, in the background | {words(written)} |",
        f"| what a turn with a checkpoint takes longer than its neighbour without | {words(costs)} |",
        f"| between two checkpoints with default flags | {between:.1f} |",
        "",
        f"Share of training time, at most: **{100 * share:.2f} %** ({'under' if share < GOAL else 'over'} the goal of {100 * GOAL:.0f} %).",
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


def words(of: Any) -> str:
    return f"{of.median:.4f} ({of.minimum:.4f} .. {of.maximum:.4f})"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/checkpoint_cost.py",
        "What checkpoints cost: seconds of waiting and of writing, share of the time.",
        example="python benchmarks/checkpoint_cost.py --preset cpu --data-dir data/cifar100",
    )
    add_data(parser, source=False)
    settings = add_settings(parser, "spt-lsa" if visible_gpus() else "cpu")
    settings.add_argument(
        "--strategy", metavar="NAME", help="how processes share the work (default: the preset's, else zero)"
    )
    how = parser.add_argument_group("how it is measured")
    how.add_argument(
        "--steps", type=at_least_one, default=20, metavar="N", help="optimiser steps of a turn (default: %(default)s)"
    )
    how.add_argument(
        "--rounds", type=at_least_one, default=10, metavar="N", help="turns of each kind (default: %(default)s)"
    )
    how.add_argument(
        "--runs-dir",
        type=Path,
        metavar="DIR",
        help="a folder on the disk to measure (default: the system's for temporary files)",
    )
    kept = parser.add_argument_group("what is kept")
    kept.add_argument("--out", type=Path, metavar="PATH", help="write PATH.json and PATH.md (default: nowhere)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
