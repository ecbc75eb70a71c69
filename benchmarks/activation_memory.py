"""Memory and time of activation checkpointing: a forward and backward pass with model.checkpoint_blocks off and on.

    python benchmarks/activation_memory.py --presets cpu,spt-lsa --batch 32
    python benchmarks/activation_memory.py --presets 100ep --json memory.json --markdown memory.md

In: presets; the images are random. Out: a table on the screen, and in --json and --markdown.

Memory is the peak of what PyTorch allocates during the pass beyond the weights: activations, gradients and workspace.
Off and on take turns. On a CPU the time is CPU time, which other programs disturb less; on a GPU it is wall time.
Before measuring, the gradients of both are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib import tables
from benchmarks.lib.options import add_reports, keep, origin
from benchmarks.lib.timing import machine, spread, synchronize
from common.errors import RunError
from config.command_line import Parser, at_least_one, run_cli
from config.settings import resolve

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_SIDE = 32
SEED = 0
EXAMPLE = "python benchmarks/activation_memory.py --presets 100ep --batch 64"


def main() -> int:
    options = arguments()
    import torch

    from parallel.process_group import pick_device

    device = pick_device()
    images = torch.randn(options.batch, 3, options.side, options.side, device=device)
    presets = options.presets.split(",")
    report: dict[str, Any] = {
        **origin(),
        "machine": machine(device),
        "batch": options.batch,
        "side": options.side,
        "rounds": options.rounds,
        "precision": "bf16 autocast" if options.bf16 else "fp32",
        "presets": {name: measure(name, images, options) for name in presets},
    }
    text = tables.as_text(rows(report))
    print(text)
    markdown = f"{tables.as_markdown(rows(report))}\n\n{tables.made_by(report)}\n"
    keep((options.json, json.dumps(report, indent=2)), (options.markdown, markdown))
    return 0


def arguments() -> argparse.Namespace:
    parser = Parser("python benchmarks/activation_memory.py", "Memory and time of activation checkpointing.", EXAMPLE)
    parser.add_argument("--presets", default="cpu,spt-lsa", metavar="NAMES", help="presets (default: %(default)s)")
    parser.add_argument(
        "--batch", type=at_least_one, default=32, metavar="N", help="images per pass (default: %(default)s)"
    )
    parser.add_argument(
        "--side", type=at_least_one, default=DEFAULT_SIDE, metavar="N", help="image side (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least_one, default=5, metavar="N", help="turns of each (default: %(default)s)"
    )
    parser.add_argument("--bf16", action="store_true", help="compute by autocast in bf16 (default: fp32)")
    add_reports(parser)
    return parser.parse_args()


def measure(preset: str, images: Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """Return memory in MiB and seconds of a pass, off and on.

    Raises:
        RunError: the gradients differ.
    """
    import torch

    from model import build_model
    from models.cost import count_parameters

    def network(is_on: bool) -> nn.Module:
        settings = resolve(preset, []).model
        torch.manual_seed(SEED)
        return build_model(replace(settings, checkpoint_blocks=is_on), 100, options.side).to(images.device).train()

    networks = {"off": network(False), "on": network(True)}
    found: dict[str, Any] = {"parameters": count_parameters(networks["off"])}
    for name, one in networks.items():  # also the warm-up
        found[name] = {"peak_mib": peak_mib(one, images, options.bf16), "seconds": []}
    gradients = [[p.grad for p in one.parameters()] for one in networks.values()]
    if not all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True)):
        raise RunError(f"preset {preset}: the gradients with and without checkpointing differ")
    for _ in range(options.rounds):
        for name, one in networks.items():
            found[name]["seconds"].append(seconds(one, images, options.bf16))
    return found


def forward_and_backward(network: nn.Module, images: Tensor, bf16: bool) -> None:
    import torch

    network.zero_grad()
    torch.manual_seed(SEED)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        scores = network(images)
    scores.float().square().mean().backward()


def seconds(network: nn.Module, images: Tensor, bf16: bool) -> float:
    """Return the time of a pass: wall time on a GPU, CPU time without."""
    clock = time.perf_counter if images.is_cuda else time.process_time
    synchronize(images.device)
    began = clock()
    forward_and_backward(network, images, bf16)
    synchronize(images.device)
    return clock() - began


def peak_mib(network: nn.Module, images: Tensor, bf16: bool) -> float:
    """Return the peak of allocated memory during a pass, beyond what was allocated before it, in MiB."""
    import torch

    forward_and_backward(network, images, bf16)
    network.zero_grad()
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_and_backward(network, images, bf16)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return _peak_on_cpu(network, images, bf16) / 2**20


def _peak_on_cpu(network: nn.Module, images: Tensor, bf16: bool) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports an error on a machine without a GPU

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        forward_and_backward(network, images, bf16)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def rows(report: dict[str, Any]) -> list[list[str]]:
    """Return the table: memory and time off and on, and their ratios of the medians."""
    lines = [["preset", "parameters", "MiB off", "MiB on", "ratio", "s off", "s on", "ratio"]]
    for name, found in report["presets"].items():
        off, on = (spread(found[key]["seconds"]) for key in ("off", "on"))
        memory = [found[key]["peak_mib"] for key in ("off", "on")]
        lines.append(
            [
                name,
                f"{found['parameters']:,}",
                *(f"{mib:,.0f}" for mib in memory),
                f"{memory[1] / memory[0]:.2f}",
                tables.cell(off, ".3f"),
                tables.cell(on, ".3f"),
                f"{on.median / off.median:.2f}",
            ]
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_cli(main))
