"""Start-up time: from a command until it answers, trains its first step, or has evaluated a run.

    python benchmarks/start_up.py
    python benchmarks/start_up.py --baseline ../older-checkout --rounds 5 --markdown results/start_up/cpu.md

The commands take turns: each round runs every command once, for this checkout and for the baseline, in both orders.
`first step` is the time until train.py prints the line `engine`, after which it only trains: the network is built and
the input pipeline runs. The dataset is random pixels and prepared. CPU seconds include all child processes; unlike
seconds they hardly depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.noise_dataset import write
from benchmarks.lib.options import add_reports, keep, origin
from benchmarks.lib.tables import as_markdown, cell, made_by
from benchmarks.lib.timing import machine, ratios, spread
from common.errors import SettingsError
from common.paths import PROJECT
from config.command_line import Parser, at_least_one, run_cli
from records.provenance import commit_of_project

READY = "engine "  # train.py prints this line before the first step
SMALL = ("--preset", "spt-lsa", "--set", "train_batch_size=8", "--max-steps", "1", "--no-tensorboard")


def commands(which: str, project: Path, folder: Path) -> dict[str, tuple[list[str], str | None]]:
    """Return the measured commands by name, each with the start of the line that ends its measurement (None: its end).

    `train.py` makes the run that `evaluate.py` then evaluates, so the order matters.
    """
    train = ["--data-dir", str(folder / "data"), "--runs-dir", str(folder / which), "--name", "run", "--fresh"]
    python = [sys.executable, str(project / "train.py")]
    return {
        "train.py --help": ([*python, "--help"], None),
        "train.py, first step, strategy zero": ([*python, *SMALL, *train, "--strategy", "zero"], READY),
        "train.py, first step, strategy ddp": ([*python, *SMALL, *train, "--strategy", "ddp"], READY),
        "launch_local_train.sh, first step": ([str(project / "launch_local_train.sh"), *SMALL, *train], READY),
        "evaluate.py": ([sys.executable, str(project / "evaluate.py"), str(folder / which / "run")], None),
    }


def measure(command: list[str], until: str | None, environment: dict[str, str]) -> dict[str, float]:
    """Run a command to its end; return its seconds until the line that starts with `until`, and its CPU seconds.

    Raises:
        SettingsError: the command failed or never printed the line.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seconds, output = None, []
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        if until and seconds is None and line.startswith(until):
            seconds = time.perf_counter() - start
    if process.wait() != 0 or until and seconds is None:
        raise SettingsError(f"{' '.join(command)} failed:\n{''.join(output[-20:])}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start if seconds is None else seconds, "cpu_seconds": cpu}


def alternate(projects: dict[str, Path], rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Return the measurements by command and checkout; the order of the checkouts is reversed in every other round."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder / "data", num_train=640)
        for turn in range(rounds + 1):  # the first round warms the disk cache and is not counted
            for which in list(projects) if turn % 2 else list(projects)[::-1]:
                for title, (command, until) in commands(which, projects[which], folder).items():
                    measured = measure(command, until, environment)
                    if turn:
                        results.setdefault(title, {}).setdefault(which, []).append(measured)
                        print(f"{turn}/{rounds}  {which:9} {title}: {measured['seconds']:.2f} s", file=sys.stderr)
    return results


def table(results: dict[str, dict[str, list[dict[str, float]]]]) -> list[list[str]]:
    """Return median (min .. max) by command; with a baseline also the CPU seconds divided by its CPU seconds."""
    names = list(next(iter(results.values())))
    rows = [["command", *(f"{name}, {unit}" for name in names for unit in ("s", "CPU s"))]]
    if len(names) == 2:
        rows[0].append("CPU s / baseline")
    for title, by_checkout in results.items():
        columns = {
            (name, key): [turn[key] for turn in turns]
            for name, turns in by_checkout.items()
            for key in ("seconds", "cpu_seconds")
        }
        row = [title, *(cell(spread(values)) for values in columns.values())]
        if len(names) == 2:
            row.append(cell(spread(ratios(*(columns[name, "cpu_seconds"] for name in names)))))
        rows.append(row)
    return rows


def main() -> int:
    args = parse_arguments()
    projects = {"this": PROJECT}
    if args.baseline:
        if not (args.baseline / "train.py").is_file():
            raise SettingsError(f"--baseline {args.baseline} is not a checkout of this project: it has no train.py")
        projects["baseline"] = args.baseline.resolve()
    results = alternate(projects, args.rounds)
    facts: dict[str, Any] = {"machine": machine(), "rounds": args.rounds}
    if args.baseline:
        facts["baseline"] = commit_of_project(projects["baseline"])[0]
    report = {**origin(), **facts, "results": results}
    place = f"{facts['machine']['cpu']}, {facts['machine']['cores']} cores."
    text = f"{as_markdown(table(results))}\n\n{place} {made_by(report)}"
    if args.baseline:
        text += f" Baseline: commit {facts['baseline'][:10]}."
    print(text)
    keep((args.json, json.dumps(report, indent=1) + "\n"), (args.markdown, text + "\n"))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/start_up.py",
        "Measure start-up times: --help, the first step of training, and the evaluation of a run.",
        example="python benchmarks/start_up.py --rounds 3",
    )
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--baseline", type=Path, metavar="DIR", help="another checkout of this project to compare with (default: none)"
    )
    group.add_argument(
        "--rounds", type=at_least_one, default=3, metavar="N", help="rounds that count (default: %(default)s)"
    )
    add_reports(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_cli(main))
