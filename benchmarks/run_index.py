"""Time and size of the page of all runs (`report.py --index`) for made-up runs.

    python benchmarks/run_index.py
    python benchmarks/run_index.py --runs 2000 --epochs 100 --out results/run_index/2000-runs.json

It writes run folders into a temporary folder: run.json with all settings and 100 class names, metrics.jsonl with
--epochs lines, steps.jsonl with 1,000 losses. A third of them are runs of comparisons, with three seeds per setting.
It then times the whole command as a user starts it, Python's start included: cold (no cache), warm (nothing changed),
and after one more epoch of one run. Processor seconds (`cpu`) stand next to wall-clock seconds (`wall`), because the
latter grow on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import output_file
from common.files import write_atomically
from common.machine import cpu_name
from common.paths import PROJECT
from config.command_line import Parser, at_least_one, run_cli
from config.settings import resolve
from records.provenance import provenance

GOAL_SECONDS, GOAL_MEGABYTES = 2.0, 8.0
FEED_FORWARDS = ("mlp", "geglu", "fff", "moe", "kan")
STEPS_PER_EPOCH = 390


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        write_runs(runs, args.runs, args.epochs, args.losses)
        cold = seconds_of(runs, "--index")
        warm = [seconds_of(runs, "--index") for _ in range(args.repeats)]
        add_epoch(next(runs.rglob("run.json")).parent)
        changed = seconds_of(runs, "--index")
        listed = seconds_of(runs, "--list", "--sort", "test_accuracy")
        sizes = {name: (runs / name).stat().st_size / 1e6 for name in ("index.html", ".index-cache.json")}
    result: dict[str, Any] = {
        "runs": args.runs,
        "epochs": args.epochs,
        "seconds": {
            "cold": cold,
            "warm_median": {kind: statistics.median(one[kind] for one in warm) for kind in ("wall", "cpu")},
            "warm": warm,
            "one_run_changed": changed,
            "list": listed,
        },
        "megabytes": {name: round(size, 2) for name, size in sizes.items()},
        "goals": {"warm_seconds": GOAL_SECONDS, "megabytes": GOAL_MEGABYTES},
        "cpu": cpu_name(),
        **{key: value for key, value in provenance().items() if key in ("commit", "uncommitted_changes", "versions")},
    }
    for what, one in result["seconds"].items():
        if isinstance(one, dict):
            print(f"{what.replace('_', ' '):16} {one['wall']:7.2f} s, {one['cpu']:.2f} s of processor time")
    print("  ".join(f"{name} {size:.2f} MB" for name, size in sizes.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, json.dumps(result, indent=2) + "\n")
    is_met = result["seconds"]["warm_median"]["wall"] < GOAL_SECONDS and sizes["index.html"] < GOAL_MEGABYTES
    print(f"goals ({GOAL_SECONDS:g} s warm, {GOAL_MEGABYTES:g} MB) {'met' if is_met else 'missed'}")
    return 0 if is_met else 1


def write_runs(runs: Path, count: int, epochs: int, losses: int) -> None:
    """Write made-up run folders: settings, results and dates differ as in a search by hand."""
    chance = random.Random(0)
    base = resolve("cpu", []).as_dict()
    classes = [f"class {i}" for i in range(100)]
    for i in range(count):
        is_compared = i % 3 == 0
        group = i // 9
        drawn = random.Random(group if is_compared else i)
        settings = json.loads(json.dumps(base))
        settings["epochs"] = epochs
        settings["model"]["feed_forward"] = drawn.choice(FEED_FORWARDS)
        settings["model"]["width"] = drawn.choice((96, 128, 192))
        settings["model"]["dropout"] = drawn.choice((0.0, 0.1))
        settings["engine"]["optimizer"]["params"]["lr"] = round(10 ** drawn.uniform(-4, -2), 6)
        settings["engine"]["train_batch_size"] = drawn.choice((128, 256))
        settings["augmentation"]["mixup"] = drawn.choice((0.0, 0.2, 0.8))
        seed = i // 3 % 3 if is_compared else chance.randrange(5)
        name = f"made-up-{group // 20}/setting-{group}-seed{seed}" if is_compared else f"run-{i:04}"
        best = 0.4 + 0.3 * drawn.random()
        write_run(runs / name, settings, seed, classes, best + chance.gauss(0, 0.004), epochs, losses, chance)


def write_run(
    folder: Path,
    settings: dict[str, Any],
    seed: int,
    classes: list[str],
    best: float,
    epochs: int,
    losses: int,
    chance: random.Random,
) -> None:
    """Write one made-up run folder whose test accuracy approaches `best`."""
    folder.mkdir(parents=True)
    facts = {
        "command": ["train.py"],
        "commit": "0" * 40,
        "uncommitted_changes": False,
        "started": f"2026-{1 + chance.randrange(11):02}-{1 + chance.randrange(28):02}T12:00:00+00:00",
        "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "settings": settings,
        "preset": "cpu",
        "seed": seed,
        "hold_out": None,
        "max_steps": None,
        "dataset": {"name": "cifar100", "fingerprint": "sha256:0", "classes": classes, "image_side": 32},
        "device": "CPU",
        "precision": "fp32",
        "num_parameters": 500_000 + 1000 * settings["model"]["width"],
        "num_processes": 1,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "total_steps": STEPS_PER_EPOCH * epochs,
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=2))
    lines = [metrics_line(epoch, epochs, best, chance) for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    every = STEPS_PER_EPOCH * epochs / losses
    steps = [
        {"step": round((i + 1) * every), "steps": round(every), "step_loss": 1.5 + 3 * math.exp(-i / 200)}
        for i in range(losses)
    ]
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))


def metrics_line(epoch: int, epochs: int, best: float, chance: random.Random) -> dict[str, Any]:
    """Return a made-up line of metrics.jsonl."""
    progress = 1 - math.exp(-4 * epoch / epochs)
    accuracy = round(best * progress + chance.gauss(0, 0.003), 4)
    return {
        "epoch": epoch,
        "step": STEPS_PER_EPOCH * epoch,
        "learning_rate": 0.005 * (1 - epoch / epochs),
        "train_loss": 4.6 - 2.8 * progress + chance.gauss(0, 0.01),
        "skipped_steps": 0,
        "images_per_second": 440 + chance.gauss(0, 5),
        "training_seconds": 113 + chance.gauss(0, 1),
        "memory_gib": 1.56,
        "tracking_seconds": 0.18,
        "test_loss": 4.6 - 3 * progress + chance.gauss(0, 0.01),
        "test_accuracy": accuracy,
        "test_top5_accuracy": min(1.0, accuracy + 0.25),
    }


def add_epoch(folder: Path) -> None:
    """Append one line to a run, as a training does."""
    path = folder / "metrics.jsonl"
    last = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps({**last, "epoch": last["epoch"] + 1, "step": last["step"] + STEPS_PER_EPOCH}) + "\n")


def seconds_of(runs: Path, *options: str) -> dict[str, float]:
    """Return the wall-clock and processor seconds of report.py with these options."""
    words = [sys.executable, PROJECT / "report.py", *options, "--runs-dir", runs, "--results-dir", runs]
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, check=True, capture_output=True)
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": round(wall, 2), "cpu": round(now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, 2)}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/run_index.py",
        "Time and size of the page of all runs (report.py --index) for made-up runs.",
        example="python benchmarks/run_index.py --runs 200",
        notes="exit code: 1 where a rebuild with a warm cache takes 2 s or more, or the page has 8 MB or more",
    )
    parser.add_argument("--runs", type=at_least_one, default=2000, metavar="N", help="made-up runs (default: 2000)")
    parser.add_argument("--epochs", type=at_least_one, default=100, metavar="N", help="epochs of each (default: 100)")
    parser.add_argument(
        "--losses", type=at_least_one, default=1000, metavar="N", help="lines of steps.jsonl of each (default: 1000)"
    )
    parser.add_argument(
        "--repeats", type=at_least_one, default=5, metavar="N", help="rebuilds with a warm cache (default: 5)"
    )
    parser.add_argument(
        "--out", type=output_file, metavar="FILE", help="also write the result to this JSON file (default: none)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
