"""What a device can do at most, to say how much of it training uses: from the maker's data sheet, and as a large product of matrices finds it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.lib.timing import synchronise

if TYPE_CHECKING:
    import torch


class Peak(NamedTuple):
    """10^12 floating-point operations a second, dense (data sheets like to print twice as much, for sparse matrices)."""

    bf16: float | None  # matrix units, fp32 sums; None: the device has no bf16 there
    tf32: float | None
    fp32: float
    source: str


_HOPPER = "NVIDIA H100/H200 data sheets (2024), half of the sparse figures"
_AMPERE = "NVIDIA data sheet of the card (2021), dense"
_ADA = "NVIDIA Ada architecture white paper v2.1 (2023), dense, fp32 accumulate"

# Part of the name that torch.cuda.get_device_name() gives; of several that fit, the longest.
PEAKS = {
    "B200": Peak(2250, 1125, 75, "NVIDIA HGX B200 data sheet (2024), an eighth of the board's, dense"),
    "H200": Peak(989, 494, 67, _HOPPER),
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
    "T4": Peak(None, None, 8.1, "NVIDIA T4 data sheet (2019); its matrix units know fp16 only"),
    "V100": Peak(None, None, 15.7, "NVIDIA V100 data sheet (2020), SXM2; its matrix units know fp16 only"),
    "V100-PCIE": Peak(None, None, 14, "NVIDIA V100 data sheet (2020), PCIe; its matrix units know fp16 only"),
}


def data_sheet(device_name: str) -> Peak | None:
    """The entry for a device; None for one that the table does not have."""
    words = device_name.upper()
    fitting = [name for name in PEAKS if all(part.upper() in words for part in name.split())]
    fitting = [name for name in fitting if not _inside_another_number(name.split()[-1].upper(), words)]
    return PEAKS[max(fitting, key=len)] if fitting else None


def _inside_another_number(part: str, words: str) -> bool:
    """Whether `L4` was found in `L40S`, or `A10` in `A100`, only."""
    found = [i for i in range(len(words)) if words.startswith(part, i)]
    return all(
        (words[i + len(part) : i + len(part) + 1] or " ").isalnum() or (words[i - 1 : i] or " ").isalnum()
        for i in found
    )


def peak_flops(device: torch.device, bf16: bool) -> tuple[float | None, str]:
    """Operations a second that the arithmetic of a run could reach on paper, and where that is written."""
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
    """Operations a second of the best of several products of large square matrices, in about so many seconds."""
    import torch

    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    a @ b
    while time.perf_counter() < deadline:
        synchronise(device)
        began = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best
