"""Profile of a training step: time with the kernel of `conv_mlp` on and off in turns, then GPU time by kind of kernel.

    python benchmarks/step_profile.py --preset speedrun --json profile.json
    python benchmarks/step_profile.py --preset 100ep --source tensor --set compile=off

In: a prepared dataset. Out: a summary and the longest kernels on the screen, and in --json, which is written after each
turn and after the profile.

One engine trains the preset (strategy ddp unless --strategy names another). Compiled layers keep a version of both
paths, so both are compiled once, each just before its first turn, and then take turns. The profile is of the kernel on.
Next to the times are the counted memory floor of a step (`memory_floor.py`) and the host's time to launch one step on
an idle device (median): where it is as long as the step, the launches limit the speed. In a row of steps the host would
also wait for the device, because CUDA's launch queue fills. On a CPU the profile has the operations of the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables
from benchmarks.lib.options import add_data, add_settings, keep, origin, output_file, step_settings
from benchmarks.lib.timing import alternate, machine, spread, synchronize
from common.machine import visible_gpus
from common.text import type_and_first_line
from config.command_line import Parser, at_least_one, run_cli

# Kind of a kernel: the first pattern that its name matches.
KINDS = (
    ("compiled (Triton)", r"^triton_"),  # first: their names list what they fuse
    ("copies and casts", r"memcpy|memset|copy_kernel|aten::copy_"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("kernel of conv_mlp", r"_forward_kernel|_backward_kernel"),
    ("depthwise convolution", r"depthwise|(dgrad2d|wgrad2d|conv2d)_c1_k1|dw_"),
    ("convolution", r"conv|fprop|dgrad|wgrad|cudnn|nchwToNhwc|nhwcToNchw"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|splitK|matmul|aten::(add)?b?mm$"),
    ("optimizer", r"multi_tensor|foreach|FusedAdam|lerp"),
)
TOTAL_STEPS = 100_000  # of the learning-rate schedule: the rate is nearly constant during the measurement
HOST_STEPS = 5  # of a turn, to time the host
LONGEST = 45  # kernels in the report
SHOWN = 20  # of them on the screen


def kind_of(name: str) -> str:
    """Return the kind of a kernel."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "other")


def choices() -> dict[str, Any]:
    """Return what to do before a turn, by name: switch the kernel of conv_mlp."""
    from models import depthwise_kernel

    return {
        "kernel on": lambda: depthwise_kernel.set_enabled(True),
        "kernel off": lambda: depthwise_kernel.set_enabled(False),
    }


def measure(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Time the turns and profile some steps. The report is written after each turn."""
    from benchmarks.lib.memory_floor import copy_bandwidth
    from benchmarks.lib.workload import Subject, Workload

    settings = step_settings(options.preset, options.set, strategy=options.strategy)
    subject = Subject(settings, options.data_dir)
    work = Workload(subject, options.source, TOTAL_STEPS)
    device, sizes = work.engine.device, work.engine.batch_sizes
    report |= {
        "machine": machine(device),
        "engine": work.engine.describe(),
        "batch": sizes.total,
        "copy_bytes_per_second": copy_bandwidth(device),
        "turns": {},
    }
    turns = {}
    for name, choose in choices().items():
        found = warm_up(work, choose, options.warm_up, device)
        turns[name] = partial(turn, work, choose, options.steps, device, found)
        turns[name]()
        report["turns"][name] = found
        write(options, report)
    alternate(turns, options.rounds - 1, lambda *_: write(options, report))
    waits = [wait for found in report["turns"].values() for wait in found["data_wait_ms"]]
    report["data_wait_ms"] = statistics.mean(waits)
    report["bytes_per_step"], report["problem"] = memory_floor_bytes(work)
    next(iter(choices().values()))()
    report |= profile_steps(work, options.profiled_steps, device)
    work.close()


def write(options: argparse.Namespace, report: dict[str, Any]) -> None:
    keep((options.json, json.dumps(report, indent=1) + "\n"))


def memory_floor_bytes(work: Any) -> tuple[int | None, str]:
    """Return the bytes that a step must move, or None with the reason why they are not counted."""
    from benchmarks.lib.memory_floor import optimizer_bytes, pass_bytes

    subject, sizes, engine = work.subject, work.engine.batch_sizes, work.engine
    chosen = subject.settings.engine
    images = (sizes.micro, 3, subject.side, subject.side)
    try:
        one = pass_bytes(subject.build, images, bool(chosen["bf16"]["enabled"]), engine.device)
    except Exception as error:  # fake tensors do not support every operation that a network may use
        return None, f"memory floor not counted: {type_and_first_line(error)}"
    return sizes.accumulation * one + optimizer_bytes(engine.num_parameters, chosen["optimizer"]["type"]), ""


def warm_up(work: Any, choose: Any, count: int, device: Any) -> dict[str, Any]:
    """Train steps that compile and tune. Return their seconds, the peak memory and empty lists for the turns."""
    import torch

    choose()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    work.steps(count)
    synchronize(device)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    lists: dict[str, list[float]] = {"step_ms": [], "host_ms": [], "data_wait_ms": []}
    return {"warm_up_seconds": time.perf_counter() - began, "memory_bytes": memory, **lists}


def turn(work: Any, choose: Any, count: int, device: Any, found: dict[str, Any]) -> None:
    """Train `count` steps, and HOST_STEPS alone before. Add milliseconds per step of the device and of the host."""
    choose()
    found["host_ms"].append(statistics.median(launch_ms(work, device) for _ in range(HOST_STEPS)))
    synchronize(device)
    work.feed.batches.wait_seconds = 0.0
    began = time.perf_counter()
    work.steps(count)
    synchronize(device)
    found["data_wait_ms"].append(1e3 * work.feed.batches.wait_seconds / count)
    found["step_ms"].append(1e3 * (time.perf_counter() - began) / count)


def launch_ms(work: Any, device: Any) -> float:
    """Train one step on an idle device and return the milliseconds until the host has launched it."""
    synchronize(device)
    began = time.perf_counter()
    work.steps(1)
    return 1e3 * (time.perf_counter() - began)


def profile_steps(work: Any, count: int, device: Any) -> dict[str, Any]:
    """Profile `count` steps: kernels per step, their milliseconds by kind, and the longest of them."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        work.steps(count)
        synchronize(device)
    kinds: dict[str, float] = defaultdict(float)
    kernels, launches = [], 0.0
    for event in seen.key_averages():
        if on_gpu and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue  # an annotation spans kernels that are counted themselves
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / count / 1e3
        if spent:
            kinds[kind_of(event.key)] += spent
            kernels.append({"ms": spent, "count": event.count / count, "name": event.key[:110]})
            launches += event.count / count
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "kernels": launches,
        "kernel_ms": sum(kernel["ms"] for kernel in kernels),
        "kinds_ms": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "longest": kernels[:LONGEST],
    }


def floor_ms(report: dict[str, Any]) -> float | None:
    """Return the memory floor of a step in milliseconds; None if the bytes were not counted."""
    counted = report.get("bytes_per_step")
    return 1e3 * counted / report["copy_bytes_per_second"] if counted else None


def as_text(report: dict[str, Any]) -> str:
    """Return the report as text for the screen."""
    rows = [["turns", "ms per step", "host ms", "images/s", "memory GiB", "first steps s"]]
    for name, found in report["turns"].items():
        step = spread(found["step_ms"])
        rows.append(
            [
                name,
                tables.cell(step),
                f"{statistics.median(found['host_ms']):.2f}",
                f"{1e3 * report['batch'] / step.median:,.0f}",
                f"{found['memory_bytes'] / 2**30:.1f}" if found["memory_bytes"] else "-",
                f"{found['warm_up_seconds']:.1f}",
            ]
        )
    floor = floor_ms(report)
    lines = [
        f"{report['preset']}: {report['engine']}; global batch size {report['batch']}; "
        f"{report['machine']['gpu'] or report['machine']['cpu']}",
        tables.as_text(rows),
        f"memory floor: {floor:.2f} ms ({report['bytes_per_step'] / 1e9:.2f} GB per step at "
        f"{report['copy_bytes_per_second'] / 1e9:,.0f} GB/s of a large copy)"
        if floor
        else report["problem"],
        f"dataloader wait: {report['data_wait_ms']:.2f} ms per step",
        f"profile: {report['kernels']:.0f} kernels in {report['kernel_ms']:.2f} ms per step",
        *(f"{ms:10.3f} ms  {kind}" for kind, ms in report["kinds_ms"].items()),
        *(f"{one['ms']:10.3f} ms x{one['count']:<6.1f} {one['name']}" for one in report["longest"][:SHOWN]),
    ]
    return "\n".join(lines)


def add_measurement(parser: Parser, gpu: bool, rounds: str) -> None:
    """Add the options for the lengths of a measurement and its file; `rounds` describes --rounds."""
    how = parser.add_argument_group("measurement")
    for name, count, text in (
        ("--steps", 15 if gpu else 1, "steps per turn"),
        ("--rounds", 5 if gpu else 2, rounds),
        ("--warm-up", 8 if gpu else 2, "warm-up steps of each"),
        ("--profiled-steps", 5 if gpu else 1, "steps under the profiler"),
    ):
        how.add_argument(name, type=at_least_one, default=count, metavar="N", help=f"{text} (default: {count})")
    parser.add_argument_group("output").add_argument(
        "--json", type=output_file, metavar="FILE", help="write all measurements to this JSON file (default: none)"
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = bool(visible_gpus())
    parser = Parser(
        "python benchmarks/step_profile.py",
        "Profile a training step: kernel of conv_mlp on and off in turns, GPU time by kind of kernel.",
        example="python benchmarks/step_profile.py --preset speedrun --json profile.json",
    )
    add_data(parser)
    settings = add_settings(parser, "spt-lsa" if gpu else "cpu")
    settings.add_argument("--strategy", default="ddp", metavar="NAME", help="parallelism strategy (default: ddp)")
    add_measurement(parser, gpu, "turns of the kernel on and off")
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
