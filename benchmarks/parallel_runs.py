"""Several runs on one device at once: images per second of 1, 2, 4 and 8 processes, with and without NVIDIA's MPS.

    python benchmarks/parallel_runs.py --preset cpu
    python benchmarks/parallel_runs.py --preset spt-lsa --runs 1,2,4 --json parallel.json --markdown parallel.md

In: a preset; the images are random and on the device. Out: a table on the screen, and in --json, which is written after
each turn, and --markdown. A number of processes that fails is reported, and the others continue.

Every process trains a network of its own with strategy ddp. All warm up, start together and train for --seconds. The
numbers of processes take turns, round after round. Small networks leave most of a GPU idle, and `compare.py --parallel
auto` makes use of that. MPS (Multi-Process Service,
https://docs.nvidia.com/deploy/mps/index.html) lets kernels of several processes run at the same time; it is started for
its turns in a folder of its own and ended afterwards. On a CPU the processes share the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables
from benchmarks.lib.options import add_reports, add_settings, keep, origin, several, step_settings
from benchmarks.lib.timing import alternate, machine, ratios, spread
from common.errors import RunError
from common.paths import PROJECT
from common.text import last_error
from config.command_line import Parser, above_zero, at_least_one, run_cli
from image_data.preparation.decoding import available_cores

WORKER = PROJECT / "benchmarks/lib/parallel_worker.py"
LIMIT_SECONDS = 300.0  # of a turn, besides --seconds: imports, network, compilation
POLL_SECONDS = 0.02
MPS = "nvidia-cuda-mps-control"


def main() -> int:
    options = arguments()
    from parallel.process_group import pick_device

    device = pick_device()
    settings = step_settings(options.preset, [*options.set, "strategy=ddp"], strategy="ddp")
    no_mps = why_no_mps(device.type)
    modes = ["alone"] if no_mps else ["alone", "mps"]
    turns = {f"{count} {mode}": partial(turn, settings.as_dict(), count, mode, options)
             for mode in modes for count in options.runs if not (mode == "mps" and count == 1)}  # fmt: skip
    report = {
        **origin(),
        "machine": machine(device),
        "preset": options.preset,
        "batch": settings.engine["train_batch_size"],
        "seconds": options.seconds,
        "no_mps": no_mps,
        "images_per_second": {},
        "failed": {},
    }
    measure(turns, options, report)
    print(f"\n{tables.as_text(rows(report))}")
    if no_mps:
        print(f"MPS was left out: {no_mps}")
    keep((options.markdown, f"{tables.as_markdown(rows(report))}\n\n{tables.made_by(report)}\n"))
    return int(not report["images_per_second"])


def measure(turns: dict[str, Callable[[], float]], options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Take all turns, and write the report after each. A turn that fails is not repeated; the others continue."""

    def take(name: str) -> None:
        if name in report["failed"]:
            return
        try:
            rate = turns[name]()
        except (RunError, OSError, subprocess.SubprocessError) as error:  # the last two: of starting or ending MPS
            report["failed"][name] = str(error)
            report["images_per_second"].pop(name, None)
            print(f"{name} failed: {error}", flush=True)
        else:
            report["images_per_second"].setdefault(name, []).append(rate)
            print(f"{name}: {rate:,.0f} images/s", flush=True)
        keep((options.json, json.dumps(report, indent=2)))

    alternate({name: partial(take, name) for name in turns}, options.rounds)


def arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/parallel_runs.py",
        "Images per second of several runs on one device at once.",
        example="python benchmarks/parallel_runs.py --preset cpu --runs 1,2,4,8",
    )
    add_settings(parser, "cpu")
    measurement = parser.add_argument_group("measurement")
    measurement.add_argument(
        "--runs", type=several(int), default=[1, 2, 4, 8], metavar="N,N", help="runs at once (default: 1,2,4,8)"
    )
    measurement.add_argument(
        "--seconds", type=above_zero, default=10.0, metavar="S", help="length of a turn (default: %(default)s)"
    )
    measurement.add_argument(
        "--rounds", type=at_least_one, default=3, metavar="N", help="turns of each number (default: %(default)s)"
    )
    measurement.add_argument(
        "--side", type=at_least_one, default=32, metavar="N", help="image side (default: %(default)s)"
    )
    add_reports(parser)
    return parser.parse_args()


def why_no_mps(device_type: str) -> str | None:
    """Return why there are no turns with MPS; None where MPS can be tried."""
    if device_type != "cuda":
        return "there is no GPU"
    return None if shutil.which(MPS) else f"the program {MPS} is not installed"


def turn(settings: dict[str, Any], count: int, mode: str, options: argparse.Namespace) -> float:
    """Return the images/s of `count` processes together.

    Raises:
        RunError: a process failed, or did not get ready in time.
    """
    with tempfile.TemporaryDirectory() as name, mps(mode == "mps", Path(name)) as variables:
        folder = Path(name)
        (folder / "settings.json").write_text(json.dumps(settings))
        threads = max(1, available_cores() // count)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **variables}
        words = [
            sys.executable,
            str(WORKER),
            str(folder),
            "--seconds",
            str(options.seconds),
            "--side",
            str(options.side),
        ]
        workers = []
        try:
            for number in range(count):
                with (folder / f"log-{number}").open("w") as log:
                    command = [*words, "--number", str(number)]
                    workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
            wait_for(folder, "ready", workers, LIMIT_SECONDS)
            (folder / "go").touch()
            wait_for(folder, "rate", workers, LIMIT_SECONDS + options.seconds)
            return sum(json.loads((folder / f"rate-{number}").read_text()) for number in range(count))
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()


def wait_for(folder: Path, kind: str, workers: list[subprocess.Popen], limit_seconds: float) -> None:
    """Wait until every worker has written its file of this kind.

    Raises:
        RunError: a worker ended before, or the time is over.
    """
    deadline = time.monotonic() + limit_seconds
    while missing := [number for number in range(len(workers)) if not (folder / f"{kind}-{number}").exists()]:
        for number in missing:
            if workers[number].poll() and not (folder / f"{kind}-{number}").exists():
                reason = last_error((folder / f"log-{number}").read_text())
                raise RunError(f"process {number + 1} of {len(workers)} failed: {reason}")
        if time.monotonic() > deadline:
            raise RunError(f"{len(missing)} of {len(workers)} processes were not ready after {limit_seconds:.0f} s")
        time.sleep(POLL_SECONDS)


@contextmanager
def mps(wanted: bool, folder: Path) -> Iterator[dict[str, str]]:
    """Run the MPS daemon while `wanted`; yield the variables by which CUDA programs find it."""
    if not wanted:
        yield {}
        return
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    for path in variables.values():
        os.mkdir(path)
    environment = {**os.environ, **variables}
    started = subprocess.run(
        [MPS, "-d"], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    if started.returncode:
        raise RunError(f"{MPS} -d failed: {(started.stderr or started.stdout).strip()}")
    try:
        yield variables
    finally:
        subprocess.run([MPS], input="quit\n", env=environment, capture_output=True, text=True, timeout=60)


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table: images/s of all runs and of each, and the ratio to the first row."""
    lines = [["runs at once", "MPS", "images/s of all", "of each", "ratio"]]
    baseline = next(iter(report["images_per_second"].values()), [])
    for name, rates in report["images_per_second"].items():
        count, mode = name.split()
        lines.append(
            [
                count,
                "on" if mode == "mps" else "off",
                tables.cell(spread(rates), ",.0f"),
                f"{spread(rates).median / int(count):,.0f}",
                tables.cell(spread(ratios(rates, baseline))),
            ]
        )
    for name, reason in report["failed"].items():
        count, mode = name.split()
        lines.append([count, "on" if mode == "mps" else "off", f"failed: {reason}", "", ""])
    return lines


if __name__ == "__main__":
    sys.exit(run_cli(main))
