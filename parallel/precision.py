"""In which precision a run computes, where `bf16.enabled` leaves that to the machine.

    false      fp32 throughout
    true       as the strategy has it: zero and pipeline have weights in bf16 too, the others torch.autocast
    autocast   fp32 weights and torch.autocast, with every strategy but pipeline
    auto       autocast where the device multiplies bf16 faster than fp32, else false

What auto comes to depends on the device alone, never on how busy it is, and stands in `run.json` as `precision`: a run
that goes on computes as it began, or is refused.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from common.errors import SettingsError

FLAGS = ("amx_bf16", "avx512_bf16")  # of processors that multiply matrices two to four times faster in bf16


def choose(setting: bool | str, autocast_refusal: str | None, device: torch.device) -> tuple[bool | str, str | None]:
    """What `bf16.enabled` comes to: false, true or autocast; and a sentence for the screen, None where it was clear.

    Args:
        autocast_refusal: why the strategy has no autocast, None where it does.

    Raises:
        SettingsError: autocast, for a strategy that has none.
    """
    if setting == "autocast" and autocast_refusal:
        raise SettingsError(f"bf16.enabled=autocast: {autocast_refusal}")
    if setting != "auto":
        return setting, None
    reason = None if autocast_refusal else fast_bf16(device)
    if reason:
        return "autocast", f"bf16, because there is {reason} (--set bf16.enabled=false chooses fp32)"
    why = autocast_refusal or "the device is not faster in bf16"
    return False, f"fp32, because {why} (--set bf16.enabled=true chooses bf16)"


def fast_bf16(device: torch.device) -> str | None:
    """What makes bf16 faster than fp32 on a device; None where nothing does."""
    if device.type == "cuda":
        return "a GPU that multiplies it" if torch.cuda.is_bf16_supported() else None
    return next((f"{flag} in the processor" for flag in FLAGS if flag in cpu_flags()), None)


@cache
def cpu_flags() -> frozenset[str]:
    """What this machine's processor says it can do; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
