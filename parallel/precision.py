"""Precision of a run, from the setting `bf16.enabled`.

    false      fp32 throughout
    true       bf16 of the strategy: zero and pipeline also have bf16 weights, the others use torch.autocast
    autocast   fp32 weights and torch.autocast, with every strategy but pipeline
    masters    bf16 weights beside the fp32 ones that the optimizer updates, with ddp; zero and pipeline: see true
    auto       autocast where the device multiplies bf16 faster than fp32, otherwise false

The choice of auto depends on the device alone, never on its load. `run.json` records it as `precision`, and a run that
resumes in another precision needs --allow-inexact-resume.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from common.errors import SettingsError

FLAGS = ("amx_bf16", "avx512_bf16")  # CPU flags: matrix products are two to four times faster in bf16


def choose(
    setting: bool | str, autocast_refusal: str | None, masters_refusal: str | None, device: torch.device
) -> tuple[bool | str, str | None]:
    """Return the precision for `bf16.enabled` (never auto), and a sentence for the screen under auto.

    Args:
        autocast_refusal: why the strategy has no autocast; None where it has.
        masters_refusal: the same for the setting masters.

    Raises:
        SettingsError: autocast or masters, for a strategy without it.
    """
    for name, refusal in (("autocast", autocast_refusal), ("masters", masters_refusal)):
        if setting == name and refusal:
            raise SettingsError(f"bf16.enabled={name}: {refusal}")
    if setting != "auto":
        return setting, None
    reason = None if autocast_refusal else fast_bf16(device)
    if reason:
        return "autocast", f"bf16, because there is {reason} (--set bf16.enabled=false chooses fp32)"
    why = autocast_refusal or "the device is not faster in bf16"
    return False, f"fp32, because {why} (--set bf16.enabled=true chooses bf16)"


def fast_bf16(device: torch.device) -> str | None:
    """Return what makes bf16 faster than fp32 on a device; None where nothing does."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported is true of GPUs that emulate it, too.
        return "a GPU with bf16 support" if torch.cuda.get_device_capability(device)[0] >= 8 else None
    return next((f"{flag} in the processor" for flag in FLAGS if flag in cpu_flags()), None)


@cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags of this machine's CPU; empty where the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
