"""Cost of a training step: images/s, shares of peak and memory floor, milliseconds by part; against baselines.

    python benchmarks/training_step.py                                  one process: the GPU, or the CPU
    python benchmarks/training_step.py --preset spt-lsa --precision bf16 --compile off,on --json step.json
    python benchmarks/training_step.py --strategies "zero 1" --baselines bare --steps 20 --synthetic    a short run

In: a prepared dataset. Out: tables on the screen, and in --json and --markdown. --json has the measurements of each
system as soon as it ends; peaks, shares and ratios follow at the end.

All systems (`step_systems.py`, `step_baselines.py`) train the same network on the same batches, each in its own
process: --warm-up steps once, then --rounds times --steps steps. With `--turns alternate` (default on a CPU) all
systems are in memory and take turns. With `--turns sequential` (default on a GPU) each one ends before the next starts,
so that only one has to fit. The baselines support AdamW only: it replaces the preset's optimizer unless --set
optimizer.type names one or there are no baselines. A ratio is taken round by round against the bare loop with the same
arithmetic.

FLOPs are the matrix products of a forward pass as PyTorch counts them, times three (the backward pass has two for
each). Elementwise work and recomputation do not count. MFU is the share of the data sheet's peak (`peak_flops.py`); the
share of a large matmul in the same run is next to it. The memory floor is the counted traffic of a step at the
bandwidth of a large copy in the same run (`memory_floor.py`): a step that is bound by memory cannot exceed 100 % of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import step_report
from benchmarks.lib.measured_system import System
from benchmarks.lib.options import add_data, add_reports, add_settings, keep, note, origin, some_of
from benchmarks.lib.peak_flops import measured_flops, peak_flops
from benchmarks.lib.process_groups import device_environment
from benchmarks.lib.timing import alternate, machine
from common.errors import DatasetError
from common.machine import visible_gpus
from common.text import type_and_first_line
from config.catalog import table_names
from config.command_line import Parser, at_least_one, run_cli
from image_data.dataset import Dataset
from image_data.preparation.decoding import available_cores

STRATEGIES = ("ddp", "zero 0", "zero 1", "zero 2", "zero 3", "fsdp")
MODES = ("off", "on", "reduce-overhead", "max-autotune")
PACKAGES = ("torch", "deepspeed", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
OTHER_PACKAGES = ("timm", "lightning", "pytorch-lightning")


def run(options: argparse.Namespace, context: Any) -> dict[str, Any]:
    """Measure all systems. Raises DatasetError without a dataset, SettingsError for an unknown setting."""
    import torch

    if not Dataset.is_prepared(options.data_dir):
        raise DatasetError(
            f"{options.data_dir} holds no prepared dataset. Run prepare_dataset.py, or choose another --data-dir"
        )
    device = torch.device("cuda" if visible_gpus() else "cpu")
    options.threads = options.threads or max(1, available_cores() // options.processes)
    options.pin = device.type == "cpu" and options.processes * options.threads <= available_cores()
    systems = [
        System(name, bf16, mode, options)
        for bf16 in options.precision
        for mode in options.compile
        for name in [*options.strategies, *options.baselines]
        if name != "bare, bf16 weights" or bf16
    ]
    systems[0].settings()
    groups = [systems] if options.turns == "alternate" else [[system] for system in systems]
    rows: list[dict[str, Any]] = []
    for group in groups:
        rows += measure_group(group, context)
        keep((options.json, json.dumps({**origin(), "rows": rows}, indent=1) + "\n"))
    torch.set_num_threads(options.threads)
    kept = ("set", "processes", "steps", "warm_up", "rounds", "turns", "threads", "pin", "synthetic")
    settings = {"preset": Path(options.preset).stem, **{key: getattr(options, key) for key in kept}}
    usable = [system for system in systems if not system.left_out] or systems[:1]
    report = {
        **origin(),
        "machine": machine(device, (*PACKAGES, *OTHER_PACKAGES)),
        "settings": settings,
        "peaks": peaks(device, options.precision),
        "memory": memory_traffic(usable, device),
        "flops_per_image": flops(usable[0]),
        "rows": rows,
    }
    step_report.complete(report)
    return report


def measure_group(systems: list[System], context: Any) -> list[dict[str, Any]]:
    """Measure systems that are in memory at the same time, in turns, and return their rows."""
    options = systems[0].options
    try:
        with device_of_children(options.threads):
            for system in systems:
                system.start(context)
        for system in systems:
            system.warm_up()
        alternate(
            {system.label: system.turn for system in systems if not system.left_out},
            options.rounds,
            lambda number, name, text: note(f"round {number + 1} of {options.rounds}: {name}: {text}"),
        )
        return [measured(system) for system in systems]
    finally:
        for system in systems:
            system.end()


def measured(system: System) -> dict[str, Any]:
    """Return the row of a system: all measurements of its turns and of its additional steps."""
    looks = system.ask("look", system.options.steps)
    row: dict[str, Any] = {
        "label": system.label,
        "name": system.name,
        "bf16": system.bf16,
        "compile": system.compile,
        "compiled": system.compile != "off",
        "left_out": system.left_out,
    }
    if system.left_out:
        return row
    batch = system.settings().engine["train_batch_size"]
    seconds = [turn["seconds"] for turn in system.turns]
    shares = {
        key: statistics.mean(look[key] for look in looks)
        for key in ("exposed_share", "under_way_share")
        if key in looks[0]
    }
    return {
        **row,
        **system.facts,
        **shares,
        "batch": batch,
        "seconds": seconds,
        "steps": system.options.steps,
        "images_per_second": [system.options.steps * batch / value for value in seconds],
        "data_seconds": [turn["data_seconds"] for turn in system.turns],
        "loss": system.turns[-1]["loss"],
        "memory_bytes": max(look["memory_bytes"] for look in looks),
        "parts": looks[0].get("parts"),
        "no_parts": looks[0].get("no_parts"),
    }


def flops(system: System) -> int:
    """Return the FLOPs of one image's forward pass."""
    from benchmarks.lib.workload import Subject
    from models.cost import count_flops

    subject = Subject(system.settings(), system.options.data_dir)
    return count_flops(subject.build().eval(), subject.side, "cpu")


def peaks(device: Any, precisions: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """Return, by precision, FLOP/s of the data sheet and of a large matrix product just now."""
    result = {}
    for bf16 in precisions:
        paper, source = peak_flops(device, bf16)
        result["bf16" if bf16 else "fp32"] = {
            "data_sheet": paper,
            "source": source,
            "measured": measured_flops(device, bf16),
        }
    return result


def memory_traffic(systems: list[System], device: Any) -> dict[str, Any]:
    """Return the bandwidth of a large copy, and the bytes of a step of one process by precision (None: not counted)."""
    from benchmarks.lib.memory_floor import copy_bandwidth, optimizer_bytes, pass_bytes
    from benchmarks.lib.workload import Subject
    from models.cost import count_parameters
    from parallel.batch_sizes import BatchSizes

    counted: dict[str, int | None] = {}
    problem = None
    processes = systems[0].options.processes
    for system in {system.bf16: system for system in systems}.values():
        settings = system.settings()
        subject, sizes = Subject(settings, system.options.data_dir), BatchSizes.derive(settings.engine, processes)
        images = (sizes.micro, 3, subject.side, subject.side)
        precision = "bf16" if system.bf16 else "fp32"
        try:
            passes = sizes.accumulation * pass_bytes(subject.build, images, system.bf16, device)
            update = optimizer_bytes(count_parameters(subject.build()), settings.engine["optimizer"]["type"])
            counted[precision] = passes + update // processes
        except Exception as error:  # fake tensors do not support every operation that a network may use
            counted[precision], problem = None, type_and_first_line(error)
    return {"copy_bytes_per_second": copy_bandwidth(device), "bytes_per_step": counted, "problem": problem}


@contextmanager
def device_of_children(threads: int) -> Any:
    """Set the environment for processes that are started inside the block."""
    before, words = dict(os.environ), device_environment(threads)
    os.environ.update(words)
    try:
        yield
    finally:
        for name in words:
            os.environ.pop(name)
        os.environ.update(before)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpus = len(visible_gpus())
    baselines = [name for name in table_names("benchmarks/lib/step_baselines.py", "BASELINES") if "," not in name]
    parser = Parser(
        "python benchmarks/training_step.py",
        "Measure the cost of a training step against a bare PyTorch loop, timm and Lightning.",
        example="python benchmarks/training_step.py --preset spt-lsa --precision fp32,bf16 --compile off,on\n"
        'python benchmarks/training_step.py --strategies "zero 1" --baselines bare --steps 20 --synthetic',
    )
    data = add_data(parser)
    data.add_argument("--synthetic", action="store_true", help="train on a fixed random batch on the device")
    settings = add_settings(parser, "spt-lsa" if gpus else "cpu")
    settings.add_argument("--batch", type=at_least_one, metavar="N", help="global batch size (default: the preset's)")
    add_systems(parser, baselines, gpus)
    add_measurement(parser, gpus)
    add_reports(parser)
    options = parser.parse_args(arguments)
    if not options.strategies + options.baselines:
        parser.error("nothing to measure: --strategies and --baselines are both none")
    if "bare" in options.baselines:
        options.baselines.insert(options.baselines.index("bare") + 1, "bare, bf16 weights")
    options.precision = [name == "bf16" for name in options.precision]
    if "both" in options.compile:
        options.compile = [mode for mode in MODES if mode in ("off", "on", *options.compile)]
    if options.batch:
        options.set.append(f"train_batch_size={options.batch}")
    if options.baselines and not any(override.startswith("optimizer.type") for override in options.set):
        options.set.insert(0, "optimizer.type=AdamW")
    return options


def add_systems(parser: Parser, baselines: list[str], gpus: int) -> None:
    """Add the options for the compared systems."""
    what = parser.add_argument_group("systems")
    what.add_argument(
        "--strategies",
        type=some_of("strategy", STRATEGIES, none=True),
        default="ddp,zero 1",
        metavar="A,B",
        help=f"strategies of ours: {', '.join(STRATEGIES)}, or none (default: %(default)s)",
    )
    what.add_argument(
        "--baselines",
        "--peers",
        type=some_of("baseline", baselines, none=True),
        default=",".join(baselines),
        metavar="A,B",
        help=f"baselines: {', '.join(baselines)}, or none; bare includes its form with bf16 weights (default: all)",
    )
    what.add_argument(
        "--precision",
        type=some_of("precision", ("fp32", "bf16")),
        default="bf16" if gpus else "fp32",
        metavar="A,B",
        help="precisions to measure: fp32, bf16 or fp32,bf16 (default: bf16 on a GPU, else fp32)",
    )
    what.add_argument(
        "--compile",
        type=some_of("mode", (*MODES, "both")),
        default="off",
        metavar="A,B",
        help=f"torch.compile modes: {', '.join(MODES)}; both means off,on (default: off)",
    )


def add_measurement(parser: Parser, gpus: int) -> None:
    """Add the options for the measurement."""
    how = parser.add_argument_group("measurement")
    how.add_argument("--processes", type=at_least_one, default=1, metavar="N", help="processes per system (default: 1)")
    how.add_argument(
        "--steps",
        type=at_least_one,
        default=50 if gpus else 10,
        metavar="N",
        help="steps per turn (default: 50 on a GPU, else 10)",
    )
    how.add_argument(
        "--warm-up",
        type=at_least_one,
        default=20 if gpus else 3,
        metavar="N",
        help="warm-up steps of each system (default: 20 on a GPU, else 3)",
    )
    how.add_argument(
        "--rounds",
        type=at_least_one,
        default=7 if gpus else 5,
        metavar="N",
        help="turns of each system (default: 7 on a GPU, else 5)",
    )
    how.add_argument(
        "--turns",
        choices=list(step_report.TURNS),
        default="sequential" if gpus else "alternate",
        help="order of the turns: alternate keeps all systems in memory, sequential one at a time "
        "(default: sequential on a GPU, else alternate)",
    )
    how.add_argument(
        "--threads", type=at_least_one, metavar="N", help="threads per process on a CPU (default: cores / processes)"
    )
    how.add_argument(
        "--limit-seconds",
        type=float,
        default=300,
        metavar="S",
        help="time limit of a turn or a warm-up in seconds (default: 300)",
    )


def main(arguments: Sequence[str] | None = None, context: Any = None) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options, context or multiprocessing.get_context("spawn")))


def measure_and_report(options: argparse.Namespace, context: Any) -> int:
    """Measure, print and write the report. Returns the exit code: 1 if no system could run."""
    report = run(options, context)
    print(step_report.as_text(report))
    keep((options.json, json.dumps(report, indent=1) + "\n"), (options.markdown, step_report.as_markdown(report)))
    return int(all(row["left_out"] for row in report["rows"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that running processes are ended
    sys.exit(main())
