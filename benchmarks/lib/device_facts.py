"""Device, driver and measured throughput of this machine, as one small JSON file.

python benchmarks/lib/device_facts.py device.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.lib.options import keep, output_file
from benchmarks.lib.peak_flops import data_sheet, measured_flops
from benchmarks.lib.timing import machine
from config.command_line import Parser

if TYPE_CHECKING:
    import torch

COPY_BYTES = 2**28  # of one copy from the host to the device


def gpu_facts() -> dict[str, Any]:
    """Return name, memory, versions and measured throughput of GPU 0."""
    import torch

    from benchmarks.lib.memory_floor import copy_bandwidth
    from parallel.precision import fast_bf16

    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    bf16 = fast_bf16(device) is not None
    facts = {
        "GPU": f"{torch.cuda.device_count()} x {properties.name}",
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": driver(),
        "CUDA of PyTorch": torch.version.cuda,
        "bf16": "yes" if bf16 else "no: train in fp32 on this device",
    }
    entry = data_sheet(properties.name)
    for kind in ("bf16", "fp32") if bf16 else ("fp32",):
        reached = measured_flops(device, kind == "bf16") / 1e12
        on_paper = getattr(entry, kind) if entry else None
        facts[f"matrix products, {kind}"] = f"{reached:,.0f} TFLOP/s" + (
            f", {100 * reached / on_paper:.0f} % of the data sheet" if on_paper else ""
        )
    facts["large copy"] = f"{copy_bandwidth(device) / 1e9:,.0f} GB/s on the device, read plus written"
    facts["host to device"] = f"{copy_rate(device) / 1e9:.1f} GB/s from pinned memory"
    return facts


def driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def copy_rate(device: torch.device) -> float:
    """Return bytes/s from pinned host memory to the device, the best of five copies."""
    import torch

    source = torch.empty(COPY_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return COPY_BYTES / best


def main() -> None:
    parser = Parser(
        "python benchmarks/lib/device_facts.py FILE",
        "Device, driver and measured throughput of this machine, as one small JSON file.",
        example="python benchmarks/lib/device_facts.py device.json",
    )
    parser.add_argument("file", type=output_file, metavar="FILE", help="output file")
    args = parser.parse_args()
    import torch  # after the arguments, so that --help answers at once

    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
    where = machine()
    facts: dict[str, Any] = {"visible to PyTorch": gpus, "CPU": f"{where['cpu']}, {where['cores']} cores"}
    if gpus:
        facts = {**facts, **gpu_facts()}
    else:
        facts["matrix products, fp32"] = f"{measured_flops(torch.device('cpu'), bf16=False) / 1e12:.3g} TFLOP/s"
    keep((args.file, json.dumps(facts, indent=1) + "\n"))


if __name__ == "__main__":
    main()
