"""In which precision a run computes, where `bf16.enabled` leaves that to the machine.

    false      fp32 throughout
    true       as the strategy has it: zero and pipeline have weights in bf16 too, the others torch.autocast
    autocast   fp32 weights and torch.autocast, with every strategy but pipeline
    auto       autocast where the device multiplies bf16 faster than fp32, else false

What auto comes to depends on the device alone, never on how busy it is: a run that goes on computes as it began.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from settings import Settings, SettingsError

if TYPE_CHECKING:
    from parallel.engine import Engine

FLAGS = ("amx_bf16", "avx512_bf16")  # of processors whose matrix products in bf16 take two to four times less time than in fp32


def settle(settings: Settings, engine_type: type[Engine], device: torch.device) -> str | None:
    """Put what auto comes to in its place. Returns the sentence for the screen, None where nothing was left open.

    Raises:
        SettingsError: autocast, for a strategy that has none.
    """
    enabled = settings.engine["bf16"]["enabled"]
    if enabled == "autocast" and engine_type.no_autocast:
        raise SettingsError(f"bf16.enabled=autocast: {engine_type.no_autocast}")
    if enabled != "auto":
        return None
    reason = None if engine_type.no_autocast else fast_bf16(device)
    settings.engine["bf16"]["enabled"] = "autocast" if reason else False
    if reason:
        return f"bf16, because there is {reason} (--set bf16.enabled=false chooses fp32)"
    return f"fp32, because {engine_type.no_autocast or 'the device is not faster in bf16'} (--set bf16.enabled=true chooses bf16)"


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
