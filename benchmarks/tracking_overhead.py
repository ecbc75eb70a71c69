"""What it costs to watch a run: TensorBoard, losses by step, samples of utilisation, curves.png, report.html.

    python benchmarks/tracking_overhead.py                                # CPU time of each piece, in a process of its own
    python benchmarks/tracking_overhead.py --run runs/mine                # and the share of that run's time
    python benchmarks/tracking_overhead.py --epochs 100 --epoch-seconds 3.5     # what that comes to in a run of this length

CPU time, because other programs disturb it far less than the wall clock. Everything but the samples happens in the main process
between steps or epochs. Out: a table on the screen; --json FILE writes the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import keep, origin  # noqa: E402
from benchmarks.lib.timing import machine  # noqa: E402
from common.text import duration
from config.command_line import Parser, at_least_one, run_cli  # noqa: E402
from config.settings import resolve  # noqa: E402
from records.run_data import RunData  # noqa: E402
from records.run_folder import RunFolder  # noqa: E402
from reports.page import write_page  # noqa: E402
from training.trackers import REDRAW_FACTOR, REDRAW_SECONDS, STEP_POINTS, Pictures, StepLosses, TensorBoard, Tracking  # noqa: E402
from training.utilization import EVERY_SECONDS, Sampler  # noqa: E402

ROUNDS = 20
STEPS_PER_EPOCH = 97  # CIFAR in batches of 512
SAMPLED_SECONDS = 2.0
EVERY = 0.01  # seconds between the samples that are timed


def main() -> None:
    args = parse_arguments()
    import torch  # noqa: F401  a run has it in memory already, so its import is not what TensorBoard costs

    with tempfile.TemporaryDirectory() as folder:
        pieces = measure(Path(folder), args.epochs)
    times = how_often(args.epochs, args.epochs * args.epoch_seconds, pieces["curves.png"])
    total = sum(times[name] * seconds for name, seconds in pieces.items())
    share = total / (args.epochs * args.epoch_seconds)
    for name, seconds in pieces.items():
        print(f"{name:28} {1000 * seconds:9.3f} ms  x {times[name]:6.0f} = {times[name] * seconds:7.3f} s")
    print(f"a run of {duration(args.epochs * args.epoch_seconds)}, {args.epochs} epochs: {total:.2f} s, {100 * share:.2f}%")
    found = {**origin(), "machine": machine(), "seconds": pieces, "times": times, "epochs": args.epochs, "epoch_seconds": args.epoch_seconds,
             "share": share}
    if args.run:
        found["share_of_run"] = share_of(RunFolder(args.run).metrics())
        print(f"{args.run.name}: {100 * found['share_of_run']:.2f}% of its training and evaluation, by its own tracking_seconds")
    keep((args.json, json.dumps(found, indent=1) + "\n"))


def parse_arguments() -> argparse.Namespace:
    parser = Parser("python benchmarks/tracking_overhead.py", "What it costs to watch a run: CPU time of each piece, and its share.",
                    example="python benchmarks/tracking_overhead.py --epochs 100 --epoch-seconds 3.5")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run folder: the share of its time that watching took (default: none)")
    parser.add_argument("--epochs", type=at_least_one, default=100, metavar="N", help="of the run that is reckoned (default: 100)")
    parser.add_argument("--epoch-seconds", type=float, default=10.0, metavar="S", help="seconds that an epoch of it takes (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here (default: nowhere)")
    return parser.parse_args()


def measure(folder: Path, epochs: int) -> dict[str, float]:
    """Seconds of CPU time of each piece, medians of ROUNDS, on a made-up run of so many epochs."""
    record, facts, lines = made_up(folder, epochs)
    began = time.thread_time()
    board = TensorBoard(folder, facts, 0)
    pieces = {"TensorBoard: start": time.thread_time() - began}
    pieces["TensorBoard: first batch"] = cost(lambda: board.batch(np.zeros((8, 8, 32, 32, 3), dtype=np.uint8)))
    pieces["TensorBoard: an epoch"] = cost(lambda: board.epoch(lines[-1]))
    tracking = Tracking([board, StepLosses(folder, 0)])
    pieces["a loss by step"] = cost(lambda: tracking.losses([(1, 1.0)]))
    pictures = Pictures(folder)
    began = time.thread_time()
    pictures.epoch(lines[-1])
    pieces["curves.png: the first"] = time.thread_time() - began
    pieces["curves.png"] = cost(lambda: redraw(pictures, lines[-1]))
    pieces["report.html"] = cost(lambda: write_page(RunData.read(folder)), rounds=3)
    sampler = Sampler(folder, every_seconds=EVERY)
    sampler.start()
    time.sleep(SAMPLED_SECONDS)
    sampler.stop()
    pieces["a sample of utilisation"] = sampler.seconds / max(1, len(RunData.read(folder).samples))
    board.close(failed=False)
    return pieces


def made_up(folder: Path, epochs: int) -> tuple[RunFolder, dict, list[dict]]:
    """A run folder with the numbers that such a run has."""
    record = RunFolder(folder)
    facts = {"settings": {**resolve("cpu", []).as_dict(), "epochs": epochs},
             "steps_per_epoch": STEPS_PER_EPOCH, "total_steps": epochs * STEPS_PER_EPOCH,
             "dataset": {"name": "made up", "classes": [f"class {i}" for i in range(100)], "fingerprint": "none", "num_images": {"train": 50_000}},
             "preset": "cpu", "seed": 0, "command": ["train.py"], "commit": "none", "uncommitted_changes": False, "versions": {}, "device": "none",
             "precision": "fp32", "num_processes": 1, "batch": {"total": 512}}
    record.create(facts)
    measured = ("learning_rate", "train_loss", "images_per_second", "training_seconds", "data_wait_seconds", "memory_gib", "tracking_seconds",
                "test_loss", "test_accuracy", "test_top5_accuracy", "test_correct", "test_seen", "test_seconds")
    lines = [{"epoch": i, "step": i * STEPS_PER_EPOCH, **dict.fromkeys(measured, 1 / i)} for i in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return record, facts, lines


def cost(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU time of this thread, median."""
    seconds = []
    for _ in range(rounds):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return median(seconds)


def redraw(pictures: Pictures, line: dict) -> None:
    pictures.not_before = 0.0
    pictures.epoch(line)


def how_often(epochs: int, seconds: float, curves_seconds: float) -> dict[str, float]:
    """How many times each piece happens in a run."""
    return {
        "TensorBoard: start": 1, "TensorBoard: first batch": 1, "TensorBoard: an epoch": epochs,
        "a loss by step": min(STEP_POINTS, epochs * STEPS_PER_EPOCH), "curves.png: the first": 1,
        "curves.png": min(epochs, 1 + seconds // max(REDRAW_SECONDS, REDRAW_FACTOR * curves_seconds)), "report.html": 1,
        "a sample of utilisation": seconds / EVERY_SECONDS,
    }


def share_of(metrics: list[dict]) -> float:
    """What watching took of a run, the pictures at its end left out."""
    spent = sum(value for line in metrics for name, value in line.items() if name.endswith("_seconds") and name != "data_wait_seconds")
    return sum(line["tracking_seconds"] for line in metrics) / spent


if __name__ == "__main__":
    sys.exit(run_cli(main))
