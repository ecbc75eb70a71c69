"""Start-up of the runs of a comparison: forked from one warm process, against a new process for each run.

    python benchmarks/warm_runs.py --data-dir data/cifar100
    python benchmarks/warm_runs.py --preset cpu --runs 5 --out results/warm_runs/cpu

Warm and cold runs of the same settings alternate. Start-up is the time from the request until run.json is written,
when imports, dataset, network, optimizer and process group are ready. The rest of a run's overhead is what it records
neither as training nor as evaluation. The first warm run pays for the imports and is listed apart. CPU seconds count
less than the clock on a machine with other work, which the load average shows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import add_data, add_settings, keep, origin, output_file
from benchmarks.lib.timing import machine
from common.errors import RunError
from common.machine import visible_gpus
from common.text import last_error
from comparison.planned_run import PlannedRun
from comparison.run_queue import device_slots
from comparison.run_queue import launch as launch_cold
from comparison.warm_process import WarmProcesses, WarmRun
from config.command_line import Parser, at_least_one, run_cli
from config.settings import resolve
from records.provenance import commit_text
from records.run_folder import RunFolder

GOAL_SECONDS = 1.0  # start-up between two runs
POLL_SECONDS = 0.01
RECORDED = ("training_seconds", "warmup_seconds", "checkpoint_seconds", "validation_seconds", "test_seconds")
MEASURED = {
    "startup": "start-up until training can begin",
    "startup_cpu": "CPU seconds of the start-up",
    "overhead": "all that is neither training nor evaluation",
    "cpu": "CPU seconds of the whole run",
}


def main() -> int:
    args = parse_arguments()
    (environment,) = device_slots(1)[:1]
    with tempfile.TemporaryDirectory() as folder:
        processes = WarmProcesses()
        measure_with = Runs(Path(folder), args)
        first = measure_with.one("first", lambda task: processes.start(task, environment))
        measured: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}
        for number in range(args.runs):
            measured["warm"].append(measure_with.one(f"warm-{number}", lambda task: processes.start(task, environment)))
            measured["cold"].append(measure_with.one(f"cold-{number}", lambda task: launch_cold(task, environment)))
        processes.close()
    report(first, measured, args)
    return 0


class Runs:
    """Makes the measured runs, one after the other."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.args = folder, args
        self.settings = resolve(args.preset, args.set, epochs=1).as_dict()

    def one(self, name: str, start: Callable[[PlannedRun], Any]) -> dict[str, float]:
        """Run train.py once and return its seconds, by the keys of MEASURED. Raises RunError where it fails."""
        words = ["--preset", self.args.preset, "--data-dir", str(self.args.data_dir.resolve()), "--epochs", "1"]
        words += ["--max-steps", str(self.args.steps), "--runs-dir", str(self.folder), "--name", name]
        words += [word for text in self.args.set for word in ("--set", text)]
        task = PlannedRun(name, self.folder / name, words, {"settings": self.settings})
        used, began, startup_cpu = _cpu_of_children(), time.time(), 0.0
        run = start(task)
        while (code := run.poll()) is None:
            if not startup_cpu and run.pid and (task.folder / "run.json").exists():
                startup_cpu = _cpu_of_tree(run.pid)
            time.sleep(POLL_SECONDS)
        seconds = time.time() - began
        if code:
            raise RunError(f"{name} failed: {last_error(task.log.read_text())}")
        cpu = _cpu_of_children() - used
        if isinstance(run, WarmRun) and run.cold is None:
            cpu = run.server.cpu_seconds[run.number]  # its parent is the warm process
        record = RunFolder(task.folder)
        recorded = sum(line.get(key, 0.0) for line in record.metrics() for key in RECORDED)
        startup = (task.folder / "run.json").stat().st_mtime - began
        print(
            f"{name:10} start-up {startup:6.2f} s ({startup_cpu:.2f} s of CPU)   "
            f"whole run {seconds:6.2f} s ({cpu:.2f} s of CPU)",
            flush=True,
        )
        return {"startup": startup, "startup_cpu": startup_cpu, "overhead": seconds - recorded, "cpu": cpu}


def _cpu_of_tree(pid: int) -> float:
    """Return the CPU seconds so far of a process, its ended children, and its descendants."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")  # utime stime cutime cstime
    return own + sum(_cpu_of_tree(int(child)) for child in children)


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(first: dict[str, float], measured: dict[str, list[dict[str, float]]], args: argparse.Namespace) -> None:
    """Print the table, and write it with the figures to --out."""
    medians = {
        kind: {key: statistics.median(run[key] for run in runs) for key in MEASURED} for kind, runs in measured.items()
    }
    startup = medians["warm"]["startup"]
    facts = origin()
    lines = [
        f"# Start-up of runs of `{Path(args.preset).stem}`, warm against cold",
        "",
        f"{args.runs} runs of {args.steps} steps of each kind, alternating; medians in seconds. Load average at the "
        f"end: {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores. Made with `benchmarks/warm_runs.py`, "
        f"commit {commit_text(facts, 7)}.",
        "",
        "| seconds | warm | cold | cold / warm | first warm run |",
        "|---|---:|---:|---:|---:|",
    ]
    for key, name in MEASURED.items():
        warm, cold = medians["warm"][key], medians["cold"][key]
        lines.append(f"| {name} | {warm:.2f} | {cold:.2f} | {cold / warm:.1f} | {first[key]:.2f} |")
    goal = "below" if startup < GOAL_SECONDS else "above"
    lines += ["", f"Start-up between two warm runs: **{startup:.2f} s**, {goal} the goal of {GOAL_SECONDS:.0f} s."]
    text = "\n".join(lines)
    print(text)
    if args.out:
        found = {"first": first, **measured, "load_average": os.getloadavg(), "machine": machine(), **facts}
        keep(
            (args.out.with_suffix(".md"), text + "\n"),
            (args.out.with_suffix(".json"), json.dumps(found, indent=1) + "\n"),
        )


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/warm_runs.py",
        "Measure the start-up of the runs of a comparison: from one warm process, and each in a process of its own.",
        example="python benchmarks/warm_runs.py --data-dir data/cifar100 --runs 5",
    )
    add_data(parser, source=False)
    add_settings(parser, "spt-lsa" if visible_gpus() else "cpu")
    how = parser.add_argument_group("measurement")
    how.add_argument(
        "--runs", type=at_least_one, default=3, metavar="N", help="runs of each kind (default: %(default)s)"
    )
    how.add_argument(
        "--steps", type=at_least_one, default=2, metavar="N", help="optimizer steps of a run (default: %(default)s)"
    )
    kept = parser.add_argument_group("output")
    kept.add_argument("--out", type=output_file, metavar="PATH", help="write PATH.json and PATH.md (default: none)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
