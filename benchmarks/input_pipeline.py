"""Images/s and CPU time per image of our input pipeline and of baselines, in turns on the same machine.

    python benchmarks/input_pipeline.py                                        all loaders, both jobs: 10 minutes
    python benchmarks/input_pipeline.py --loaders tensor,resident,memory --images 10240 --rounds 3       a short run
    python benchmarks/input_pipeline.py --ffcv-python ffcv/bin/python --json input.json --markdown input.md

Two jobs: crop 4 + flip + normalize, and the same with RandAugment(2, 9). `loaders.py` holds the loaders. All of them
yield normalized float32 images (B, 3, S, S) and int64 labels on the device, in full shuffled epochs with the remainder
dropped. The first epoch of each loader does not count. Then every loader has one turn per round, of one epoch or of as
many as fill --turn-seconds. The wall clock of a turn starts after its first 8 batches and stops when the device has the
last one. CPU time covers the full turn, with all threads and worker processes. A ratio is ours divided by the
baseline's in the same round: above 1, our speed is higher; below 1, our CPU time is lower. --json has each turn as soon
as it ends, and the ratios at the end.

FFCV needs a compiler and libraries: apt install g++ pkg-config libopencv-dev libturbojpeg0-dev, and then pip install
ffcv, in this environment or in another one that --ffcv-python names.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import input_report
from benchmarks.lib.loader_tasks import BASELINES, JOBS, OPTIONAL, OURS, Task, Unavailable
from benchmarks.lib.options import add_data, add_reports, keep, note, origin, some_of
from benchmarks.lib.timing import SETTLE_SECONDS, alternate, cpu_seconds, machine, ratios
from common.errors import DatasetError, UserError
from common.machine import visible_gpus
from config.command_line import Parser, above_zero, at_least_one, run_cli
from image_data.dataset import Dataset
from image_data.preparation.decoding import available_cores

# Largest difference between mean (and standard deviation) of two loaders' output, for a job without RandAugment.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Turn:
    """One loader's measurement in one round."""

    images: int
    images_per_second: float
    cpu_us_per_image: float


def measure(
    dataset: Dataset,
    task: Task,
    makers: dict[str, Callable],
    rounds: int,
    turn_seconds: float,
    write: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure one job: every loader in every round, and the reason for each skipped loader.

    `write` gets the turns so far after each turn.
    """
    turns, measured, skipped = {}, {}, {}

    def add(number: int, name: str, turn: Turn) -> None:
        measured[name]["images_per_second"].append(turn.images_per_second)
        measured[name]["cpu_us_per_image"].append(turn.cpu_us_per_image)
        note(
            f"{task.job}: round {number + 1} of {rounds}, {name}: {turn.images_per_second:,.0f} images/s, "
            f"{turn.cpu_us_per_image:.1f} us of CPU per image"
        )
        write({"loaders": {name: facts for name, facts in measured.items() if facts["images_per_second"]}})

    with ExitStack() as closing:
        for name in makers:
            try:
                loader = makers[name](dataset, task)
                closing.callback(loader.close)
                note(f"{task.job}: warming up {name}")
                window, mean, std = loader.warm_up()
            except (Unavailable, UserError, ImportError, OSError) as reason:  # of a package, or of the dataset's files
                skipped[name] = str(reason)
                note(f"{task.job}: skipping {name}: {reason}")
                continue
            epochs = max(1, math.ceil(turn_seconds * window.rate / window.images))
            turns[name] = partial(take_turn, loader, epochs)
            measured[name] = {
                "images_per_epoch": window.images,
                "epochs_per_turn": epochs,
                "output_mean": mean,
                "output_std": std,
                "versions": loader.versions,
                "images_per_second": [],
                "cpu_us_per_image": [],
            }
        alternate(turns, rounds, add)
    return {
        "loaders": measured,
        "skipped": skipped,
        "ratios": compare(measured, "images_per_second"),
        "cpu_ratios": compare(measured, "cpu_us_per_image"),
    }


def take_turn(loader: Any, epochs: int) -> Turn:
    before = cpu_seconds()
    window = loader.turn(epochs)
    time.sleep(SETTLE_SECONDS)
    return Turn(window.images, window.rate, 1e6 * (cpu_seconds() - before) / window.images)


def compare(measured: dict[str, Any], figure: str) -> dict[str, dict[str, list[float]]]:
    """Return ours divided by each baseline, round by round."""
    return {
        ours: {
            other: ratios(measured[ours][figure], measured[other][figure]) for other in measured if other not in OURS
        }
        for ours in measured
        if ours in OURS
    }


def unlike(job: dict[str, Any]) -> list[str]:
    """Return the loaders whose output differs in mean or standard deviation from the first one's."""
    outputs = {name: (facts["output_mean"], facts["output_std"]) for name, facts in job["loaders"].items()}
    first = next(iter(outputs.values()), None)
    return [
        name
        for name, output in outputs.items()
        if any(abs(a - b) > TOLERANCE for a, b in zip(output, first, strict=True))
    ]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    names = [*OURS, *BASELINES, *OPTIONAL]
    parser = Parser(
        "python benchmarks/input_pipeline.py",
        "Measure images/s and CPU time per image of our input pipeline and of baselines.",
        example="python benchmarks/input_pipeline.py\n"
        "python benchmarks/input_pipeline.py --loaders tensor,resident,memory --images 10240 --rounds 3",
        notes="jobs:\n" + "\n".join(f"  {name:14} {job}" for name, job in JOBS.items()),
    )
    data = add_data(parser, source=False)
    data.add_argument(
        "--images", type=at_least_one, metavar="N", help="maximum number of images per epoch (default: all)"
    )
    data.add_argument(
        "--batch-size", type=at_least_one, default=512, metavar="N", help="batch size (default: %(default)s)"
    )
    what = parser.add_argument_group("systems")
    what.add_argument(
        "--loaders",
        type=some_of("loader", names),
        default=",".join([*OURS, *BASELINES]),
        metavar="A,B",
        help=f"loaders to compare: {', '.join(names)} (default: all but the last)",
    )
    what.add_argument(
        "--jobs",
        type=some_of("job", JOBS),
        default=",".join(JOBS),
        metavar="A,B",
        help="jobs to measure, see below (default: both)",
    )
    what.add_argument("--ffcv-python", metavar="FILE", help="Python interpreter with FFCV (default: this one)")
    how = parser.add_argument_group("measurement")
    devices = ["cuda", "cpu"] if visible_gpus() else ["cpu"]
    how.add_argument(
        "--device", default=devices[0], choices=devices, help="device of the batches (default: cuda if there is a GPU)"
    )
    how.add_argument(
        "--threads",
        type=at_least_one,
        default=available_cores(),
        metavar="N",
        help="threads or workers per loader (default: number of cores, here %(default)s)",
    )
    how.add_argument(
        "--rounds", type=at_least_one, default=5, metavar="N", help="number of turns per loader (default: %(default)s)"
    )
    how.add_argument(
        "--turn-seconds",
        type=above_zero,
        default=1.0,
        metavar="S",
        help="minimum seconds per turn (default: %(default)s)",
    )
    add_reports(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements. Raises DatasetError if the dataset does not allow them."""
    import torch

    from benchmarks.lib.loaders import loaders

    dataset, device = Dataset.open(options.data_dir), torch.device(options.device)
    if dataset.image_side is None:
        raise DatasetError(
            f"the images of {dataset.folder} differ in size; the baselines need one size. Choose another --data-dir"
        )
    num_images = min(len(dataset.splits["train"]), options.images or sys.maxsize)
    if num_images < options.batch_size:
        raise DatasetError(
            f"{num_images} images are fewer than one batch of {options.batch_size}. Choose a smaller --batch-size"
        )
    num_batches = num_images // options.batch_size
    torch.set_num_threads(options.threads)
    makers = {name: maker for name, maker in loaders(options.ffcv_python).items() if name in options.loaders}
    begin, jobs = origin(), {}
    for job in options.jobs:
        task = Task(job, options.batch_size, num_batches, options.threads, device)

        def write(part: dict[str, Any], job: str = job) -> None:
            keep((options.json, json.dumps({**begin, "jobs": {**jobs, job: part}, "goals": []}, indent=2) + "\n"))

        jobs[job] = measure(dataset, task, makers, options.rounds, options.turn_seconds, write)
        jobs[job]["unlike"] = unlike(jobs[job]) if job == "crop" else []
    where = machine(device)
    for facts in (facts for job in jobs.values() for facts in job["loaders"].values()):
        where["versions"].update(facts["versions"])
    settings = {
        "batch_size": options.batch_size,
        "images_per_epoch": num_batches * options.batch_size,
        "side": dataset.image_side,
        "rounds": options.rounds,
        "threads": options.threads,
        "device": str(device),
        "turn_seconds": options.turn_seconds,
    }
    report = {**begin, "machine": where, "settings": settings, "jobs": jobs}
    report["goals"] = [verdict for goal in input_report.GOALS if (verdict := input_report.judge(goal, report))]
    return report


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options))


def measure_and_report(options: argparse.Namespace) -> None:
    report = run(options)
    print(input_report.as_text(report))
    keep((options.json, json.dumps(report, indent=2) + "\n"), (options.markdown, input_report.as_markdown(report)))


if __name__ == "__main__":
    sys.exit(main())
