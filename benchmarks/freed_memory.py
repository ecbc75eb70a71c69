"""Training on a CPU with and without malloc keeping freed memory: images/s, page faults, CPU time in the kernel.

    python benchmarks/freed_memory.py --preset cpu-quick --set compile=off --json freed.json --markdown freed.md

In: a preset; the images are random. Out: a table on the screen, and in --json and --markdown.

The baseline is glibc's default, which returns large blocks to the kernel (KEEP_FREED_MEMORY=off). Each turn is a
process of its own, with strategy ddp, that warms up and then trains some steps; the two take turns. common/memory.py
explains the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables
from benchmarks.lib.options import add_reports, add_settings, keep, origin, step_settings
from benchmarks.lib.timing import alternate, machine, ratios, spread
from common.errors import RunError
from common.memory import SWITCH
from common.paths import PROJECT
from common.text import last_error
from config.command_line import Parser, at_least_one, run_cli

BASELINE, OURS = "returned to the kernel", "kept"
PROGRAM = PROJECT / "benchmarks/freed_memory.py"
LIMIT_SECONDS = 900.0  # of a turn


def main() -> int:
    options = arguments()
    step_settings(options.preset, [*options.set, "strategy=ddp"], strategy="ddp")  # mistakes are named at once
    found = alternate(
        {name: partial(turn, name, options) for name in (BASELINE, OURS)},
        options.rounds,
        lambda number, name, facts: print(f"{name}: {facts['images_per_second']:.0f} images/s", flush=True),
    )
    report = {**origin(), "machine": machine(), "preset": Path(options.preset).stem, "steps": options.steps}
    report |= {"threads": options.threads, "turns": found}
    text = tables.as_text(rows(report))
    print(text)
    markdown = f"{tables.as_markdown(rows(report))}\n\n{tables.made_by(report)}\n"
    keep((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, markdown))
    return 0


def turn(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in a new process and return what it measured. Raises RunError if it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= {SWITCH: "off" if name == BASELINE else "on", "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": str(options.threads)}
    words = [word for override in options.set for word in ("--set", override)]
    command = [sys.executable, str(PROGRAM), "--worker", "--preset", options.preset, *words]
    command += ["--steps", str(options.steps), "--warm-up", str(options.warm_up)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RunError(
            f"the process with memory {name} was still running after {LIMIT_SECONDS:g} s. Choose a smaller --steps"
        ) from None
    if done.returncode:
        raise RunError(f"the process with memory {name} failed: {last_error(done.stderr) or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def work(options: argparse.Namespace) -> None:
    """Train in this process, and print what was measured as one line of JSON."""
    import torch

    from model import build_model
    from optim.lr_schedule import Schedule
    from parallel.strategies import engine_class

    settings = step_settings(options.preset, [*options.set, "strategy=ddp"], strategy="ddp")
    engine = engine_class("ddp")(
        lambda: build_model(settings.model, 100, 32), settings, Schedule(settings.schedule, 10**6), 0
    )
    images, labels = torch.randn(engine.batch_sizes.micro, 3, 32, 32), torch.arange(engine.batch_sizes.micro) % 100
    for step in range(options.warm_up + options.steps):
        if step == options.warm_up:
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        engine.train_batch(iter([(images, labels)] * engine.batch_sizes.accumulation))
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "images_per_second": options.steps * engine.batch_sizes.total / seconds,
        "page_faults_per_step": (after.ru_minflt - before.ru_minflt) / options.steps,
        "kernel_seconds_per_step": (after.ru_stime - before.ru_stime) / options.steps,
        "peak_memory_mib": after.ru_maxrss / 1024,
    }
    engine.close()
    print(json.dumps(facts))


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table."""
    table = [["freed memory", "images/s", "ratio", "page faults per step", "kernel ms per step", "peak memory MiB"]]
    base = [facts["images_per_second"] for facts in report["turns"][BASELINE]]
    for name, turns in report["turns"].items():
        values = {key: spread([facts[key] for facts in turns]) for key in turns[0]}
        against = ratios([facts["images_per_second"] for facts in turns], base)
        table.append(
            [
                name,
                tables.cell(values["images_per_second"]),
                tables.cell(spread(against)),
                f"{values['page_faults_per_step'].median:,.0f}",
                f"{1e3 * values['kernel_seconds_per_step'].median:.1f}",
                f"{values['peak_memory_mib'].median:,.0f}",
            ]
        )
    return table


def arguments() -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/freed_memory.py",
        "Time training on a CPU with and without malloc keeping freed memory, in turns.",
        example="python benchmarks/freed_memory.py --preset cpu-quick --set compile=off",
    )
    add_settings(parser, "cpu-quick")
    how = parser.add_argument_group("measurement")
    for name, count, text in (
        ("--steps", 20, "timed steps per turn"),
        ("--warm-up", 5, "steps before them"),
        ("--rounds", 3, "turns of each"),
        ("--threads", 1, "threads of the process"),
    ):
        how.add_argument(name, type=at_least_one, default=count, metavar="N", help=f"{text} (default: {count})")
    how.add_argument("--worker", action="store_true", help="be the process of one turn, and print its JSON")
    add_reports(parser)
    return parser.parse_args()


def run() -> int:
    options = arguments()
    if options.worker:
        work(options)
        return 0
    return main()


if __name__ == "__main__":
    sys.exit(run_cli(run))
