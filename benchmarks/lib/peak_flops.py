"""Peak throughput of a device, the reference for utilization.

It is taken from the vendor's data sheet, and measured as a large matrix product and a large copy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.lib.timing import synchronize

if TYPE_CHECKING:
    import torch


class Peak(NamedTuple):
    """Dense TFLOP/s of a device (data sheets like to print twice as much, for sparse matrices)."""

    bf16: float | None  # matrix units with fp32 accumulation; None: they do not support bf16
    tf32: float | None
    fp32: float
    source: str


_HOPPER = "NVIDIA H100/H200 data sheets (2024), half of the sparse figures"
_AMPERE = "NVIDIA data sheet of the card (2021), dense"
_ADA = "NVIDIA Ada architecture white paper v2.1 (2023), dense, fp32 accumulate"

# Key: words of torch.cuda.get_device_name(); the longest matching key wins.
PEAKS = {
    "B200": Peak(2250, 1125, 75, "NVIDIA HGX B200 data sheet (2024), an eighth of the board's, dense"),
    "H200": Peak(989, 494, 67, _HOPPER),
    "H200 NVL": Peak(835, 417, 60, _HOPPER),
    "H100": Peak(989, 494, 67, _HOPPER),
    "H100 PCIe": Peak(756, 378, 51, _HOPPER),
    "H100 NVL": Peak(835, 417, 60, _HOPPER),
    "A100": Peak(312, 156, 19.5, _AMPERE),
    "A40": Peak(149.7, 74.8, 37.4, _AMPERE),
    "A30": Peak(165, 82, 10.3, _AMPERE),
    "A10": Peak(125, 62.5, 31.2, _AMPERE),
    "RTX A6000": Peak(154.8, 77.4, 38.7, _AMPERE),
    "RTX 6000 Ada": Peak(364, 182, 91.1, _ADA),
    "L40S": Peak(362, 183, 91.6, "NVIDIA L40S data sheet (2023), dense"),
    "L40": Peak(181, 90.5, 90.5, "NVIDIA L40 data sheet (2023), dense"),
    "L4": Peak(121, 60, 30.3, "NVIDIA L4 data sheet (2023), dense"),
    "RTX 4090": Peak(165.2, 82.6, 82.6, _ADA),
    "RTX 4080": Peak(97.5, 48.7, 48.7, _ADA),
    "RTX 3090": Peak(71, 35.6, 35.6, "NVIDIA Ampere GA102 white paper v2 (2021), dense, fp32 accumulate"),
    "RTX 3080": Peak(59.5, 29.8, 29.8, "NVIDIA Ampere GA102 white paper v2 (2021), dense, fp32 accumulate"),
    "T4": Peak(None, None, 8.1, "NVIDIA T4 data sheet (2019); its matrix units support fp16 only"),
    "V100": Peak(None, None, 15.7, "NVIDIA V100 data sheet (2020), SXM2; its matrix units support fp16 only"),
    "V100-PCIE": Peak(None, None, 14, "NVIDIA V100 data sheet (2020), PCIe; its matrix units support fp16 only"),
}


def data_sheet(device_name: str) -> Peak | None:
    """Return the entry for a device; None if the table does not have it."""
    words = device_name.upper()
    fitting = [name for name in PEAKS if all(part.upper() in words for part in name.split())]
    fitting = [name for name in fitting if not _inside_another_number(name.split()[-1].upper(), words)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def _inside_another_number(part: str, words: str) -> bool:
    """Return whether every occurrence is part of a longer name, as `L4` in `L40S` or `A10` in `A100`."""
    found = [i for i in range(len(words)) if words.startswith(part, i)]
    return all(
        (words[i + len(part) : i + len(part) + 1] or " ").isalnum() or (words[i - 1 : i] or " ").isalnum()
        for i in found
    )


def peak_flops(device: torch.device, bf16: bool) -> tuple[float | None, str]:
    """Return the data sheet's FLOP/s for the arithmetic of a run, and its source."""
    import torch

    if device.type != "cuda":
        return None, "no data sheet for a CPU"
    entry = data_sheet(torch.cuda.get_device_name(device))
    if entry is None:
        return None, f"{torch.cuda.get_device_name(device)} is not in benchmarks/lib/peak_flops.py"
    tf32 = torch.get_float32_matmul_precision() != "highest"
    kind = "bf16" if bf16 else "tf32" if tf32 and entry.tf32 else "fp32"
    value = getattr(entry, kind)
    return (1e12 * value if value else None), f"{kind}: {entry.source}"


def measured_flops(device: torch.device, bf16: bool, seconds: float = 1.0) -> float:
    """Return FLOP/s of the fastest of several products of large square matrices, measured for about `seconds`."""
    import torch

    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    a @ b
    best, deadline = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:  # one product in bf16 may take longer on a CPU
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
