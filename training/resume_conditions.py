"""Conditions that may change between a run and its resumption, and the effect of each change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from common.machine import cpu_name
from parallel.engine import Engine

# What must be the same for a run to resume ...
MUST_MATCH = ("settings", "seed", "max_steps", "max_minutes", "hold_out", "patience", "init_weights", "synthetic")

# ... except how the work is distributed: the state is the same (an engine that cannot load another's state rejects it).
# The texts of these differences begin so: a group without a space, a single setting with one.
MAY_DIFFER = (
    "settings.strategy ",
    "settings.compile ",
    "settings.parallel.stages ",
    "settings.parallel.partition ",
    "settings.parallel.patience_seconds ",
    "settings.engine.zero_optimization",
    "settings.engine.gradient_accumulation_steps ",
    "settings.model.checkpoint_blocks ",
)


@dataclass(frozen=True)
class Change:
    """Effect of resuming under another condition; one that is not `accepted` needs --allow-inexact-resume."""

    words: str
    why: str
    accepted: bool


ROUNDING = "same sums, rounded in another order"
CHANGES = {  # by the key of `conditions`
    "processes": Change("processes", f"{ROUNDING}; other dropout masks", True),
    "micro_batch": Change(
        "micro-batch size", f"{ROUNDING}; other dropout masks, other MixUp and CutMix partners", True
    ),
    "strategy": Change("strategy", ROUNDING, True),
    "stage": Change("ZeRO stage", ROUNDING, True),
    "offload": Change("device of the optimizer", "its kernels round differently", True),
    "cuts": Change("first layers of the pipeline's stages", f"{ROUNDING}; other dropout masks", True),
    "threads": Change("CPU threads", ROUNDING, True),
    "device_name": Change("device", ROUNDING, True),
    "torch": Change("PyTorch", "kernels may round differently", True),
    "commit": Change("commit of this project", "the code may compute something else", True),
    "device": Change("device type", "other arithmetic and other dropout masks", False),
    "precision": Change("precision", "other arithmetic", False),
    "compile": Change("torch.compile", "compiled kernels round differently", True),
    "deterministic": Change("--deterministic", "other kernels", False),
    "source": Change("image source", "pixels differ by roundings of one level", False),
}

# Conditions that change together with another one and need no sentence of their own.
IMPLIED_CHANGES = {"device": ("threads", "device_name"), "strategy": ("stage", "offload", "cuts")}
BATCH_NORM = Change("micro-batch size", "BatchNorm computes its statistics per micro-batch", False)


def conditions(engine: Engine, source: str, commit: str | None) -> dict[str, Any]:
    """Return the conditions of this process, under which a resumed run has the same bits (docs/resume.md)."""
    on_gpu = engine.device.type == "cuda"
    zero = engine.settings.engine["zero_optimization"] if engine.uses_full_ds_config else None
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "micro_batch": engine.batch_sizes.micro,
        "strategy": engine.name,
        "stage": zero and zero["stage"],
        "offload": zero and zero["offload_optimizer"]["device"],
        "cuts": engine.cuts,
        "threads": None if on_gpu else torch.get_num_threads(),
        "device": "GPU" if on_gpu else "CPU",
        "device_name": torch.cuda.get_device_name(engine.device) if on_gpu else cpu_name(),
        "precision": engine.precision,
        "compile": engine.compiled.mode,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "source": source,
        "torch": torch.__version__,
        "commit": commit,
    }


def compare(old: dict[str, Any], new: dict[str, Any], batch_norm: bool) -> tuple[list[str], list[str]]:
    """Return sentences for the accepted changes of conditions, and for the rejected ones."""
    accepted: list[str] = []
    refused: list[str] = []
    changed = {key for key in CHANGES if key in old and old[key] != new[key]}
    for key in (
        key for key in CHANGES if key in changed.difference(*(IMPLIED_CHANGES.get(cause, ()) for cause in changed))
    ):
        change = BATCH_NORM if key == "micro_batch" and batch_norm else CHANGES[key]
        (accepted if change.accepted else refused).append(
            f"{change.words}: {old[key]} before, {new[key]} now ({change.why})"
        )
    return accepted, refused
