"""Training step of one preset under several settings, in turns: time, launch time of the host, memory, kernels.

    python benchmarks/step_settings.py --preset speedrun --variant compile=reduce-overhead
    python benchmarks/step_settings.py --preset 100ep --variant "bf16.enabled=masters compile=reduce-overhead"

In: a prepared dataset. Out: a table and, with --json, all measurements, written after each start, turn and profile.

The baseline is the preset with --set; each --variant adds settings, separated by spaces. Every variant has an engine of
its own (strategy ddp unless --strategy names another), all of them in one process on the same device, and they take
turns. A ratio is taken between two turns of one round. A variant that fails is reported and the others continue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables
from benchmarks.lib.options import add_data, add_settings, origin, step_settings
from benchmarks.lib.timing import alternate, machine, ratios, spread
from benchmarks.step_profile import (
    TOTAL_STEPS,
    add_measurement,
    memory_floor_bytes,
    profile_steps,
    turn,
    warm_up,
    write,
)
from common.machine import visible_gpus
from common.text import type_and_first_line
from config.command_line import Parser, run_cli

BASELINE = "baseline"


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Start all variants, time their turns, then profile some steps of each. The report is written after each of these.

    Raises whatever the baseline raises; another variant that fails is reported, and has no further turns.
    """
    from benchmarks.lib.memory_floor import copy_bandwidth
    from benchmarks.lib.workload import Subject, Workload
    from parallel import process_group

    device = process_group.pick_device()
    report |= {"machine": machine(device), "copy_bytes_per_second": copy_bandwidth(device), "variants": {}}
    works: dict[str, Workload] = {}

    def start(name: str, found: dict[str, Any]) -> None:
        began, before = time.perf_counter(), allocated_bytes(device)
        settings = step_settings(options.preset, [*options.set, *found["settings"]], strategy=options.strategy)
        works[name] = Workload(Subject(settings, options.data_dir), options.source, TOTAL_STEPS)
        found |= warm_up(works[name], lambda: None, options.warm_up, device)
        if found["memory_bytes"]:
            found["memory_bytes"] -= before
        found |= {"engine": works[name].engine.describe(), "batch": works[name].engine.batch_sizes.total}
        found["start_seconds"] = time.perf_counter() - began
        if name == BASELINE:
            report["bytes_per_step"], report["problem"] = memory_floor_bytes(works[name])
        print(f"ready: {name} in {found['start_seconds']:.1f} s", flush=True)

    def take_turn(name: str, found: dict[str, Any]) -> None:
        turn(works[name], lambda: None, options.steps, device, found)

    def take_profile(name: str, found: dict[str, Any]) -> None:
        found |= profile_steps(works[name], options.profiled_steps, device)

    def attempt(work: Callable[[str, dict[str, Any]], None], name: str) -> None:
        """Do a piece of work of a variant, unless an earlier one failed."""
        found = report["variants"][name]
        if "failed" in found:
            return
        try:
            work(name, found)
        except Exception as error:  # of any of the settings; the other variants are worth their time
            if name == BASELINE:
                raise
            found["failed"] = type_and_first_line(error)
            if failed := works.pop(name, None):
                failed.feed.batches.close()  # not the engine, whose process group the others use
        write(options, report)

    for name in (BASELINE, *options.variant):
        report["variants"][name] = {"settings": [] if name == BASELINE else name.split()}
        attempt(start, name)
    alternate({name: partial(attempt, take_turn, name) for name in report["variants"]}, options.rounds)
    for name in report["variants"]:
        attempt(take_profile, name)
    for work in works.values():
        work.close()


def allocated_bytes(device: Any) -> int:
    """Return what the engines so far hold on a GPU."""
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text for the screen."""
    rows = [["settings", "ms per step", "ratio", "host ms", "kernels", "kernel ms", "memory GiB", "start s"]]
    variants = report["variants"]
    for name, found in variants.items():
        if "failed" in found:
            rows.append([name, f"failed: {found['failed']}", *[""] * 6])
            continue
        against = spread(ratios(found["step_ms"], variants[BASELINE]["step_ms"]))
        rows.append(
            [
                name,
                tables.cell(spread(found["step_ms"])),
                tables.cell(against),
                f"{statistics.median(found['host_ms']):.2f}",
                f"{found['kernels']:.0f}",
                f"{found['kernel_ms']:.2f}",
                f"{found['memory_bytes'] / 2**30:.1f}" if found["memory_bytes"] else "-",
                f"{found['start_seconds']:.1f}",
            ]
        )
    floor = report["bytes_per_step"] and 1e3 * report["bytes_per_step"] / report["copy_bytes_per_second"]
    lines = [
        f"{report['preset']}: {variants[BASELINE]['engine']}; global batch size {variants[BASELINE]['batch']}; "
        f"{report['machine']['gpu'] or report['machine']['cpu']}",
        tables.as_text(rows),
        f"memory floor of the baseline: {floor:.2f} ms" if floor else report["problem"],
    ]
    for name, found in variants.items():
        if "kinds_ms" in found:
            kinds = ", ".join(f"{kind} {ms:.2f}" for kind, ms in found["kinds_ms"].items())
            lines.append(f"{name}: {kinds} (ms per step)")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = bool(visible_gpus())
    parser = Parser(
        "python benchmarks/step_settings.py",
        "Time the training step of one preset under several settings, in turns.",
        example="python benchmarks/step_settings.py --preset speedrun --variant compile=reduce-overhead",
    )
    add_data(parser)
    settings = add_settings(parser, "spt-lsa" if gpu else "cpu")
    settings.add_argument("--strategy", default="ddp", metavar="NAME", help="parallelism strategy (default: ddp)")
    settings.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="settings of one variant, PATH=VALUE separated by spaces; may be repeated (default: the baseline alone)",
    )
    add_measurement(parser, gpu, "rounds of all variants")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure_and_report(options))


def measure_and_report(options: argparse.Namespace) -> None:
    """Measure, print and write the report."""
    report: dict[str, Any] = {**origin(), "preset": Path(options.preset).stem, "set": options.set}
    measure(options, report)
    write(options, report)
    print(as_text(report))


if __name__ == "__main__":
    sys.exit(main())
