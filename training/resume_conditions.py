"""What may change between a run and its resumption, and what each change means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from common.errors import SettingsError
from common.machine import cpu_name
from config.settings import Settings
from parallel.engine import Engine

# What must be the same for a run to go on ...
MUST_MATCH = ("settings", "seed", "max_steps", "hold_out", "patience", "init_weights", "synthetic")


# ... but for how the work is spread: the state is the same for all (an engine that cannot go on from another's refuses it by name).
MAY_DIFFER = (
    "settings.strategy",
    "settings.parallel",
    "settings.engine.zero_optimization",
    "settings.engine.gradient_accumulation_steps",
)


@dataclass(frozen=True)
class Change:
    """What it means when a run goes on under another condition; one that is not `accepted` needs --allow-inexact-resume."""

    words: str
    why: str
    accepted: bool


ROUNDING = "the same sums, rounded in another order"
CHANGES = {  # by the key of `conditions`
    "processes": Change("processes", f"{ROUNDING}; dropout draws other masks", True),
    "micro_batch": Change(
        "images a micro-batch", f"{ROUNDING}; dropout draws other masks, MixUp and CutMix other partners", True
    ),
    "strategy": Change("strategy", ROUNDING, True),
    "stage": Change("ZeRO stage", ROUNDING, True),
    "threads": Change("CPU threads", ROUNDING, True),
    "device_name": Change("device", ROUNDING, True),
    "torch": Change("PyTorch", "its kernels may round differently", True),
    "commit": Change("commit of this project", "the code may compute something else", True),
    "device": Change("kind of device", "another arithmetic, and dropout draws other masks", False),
    "precision": Change("precision", "another arithmetic", False),
    "compile": Change("torch.compile", "compiled kernels round differently", True),
    "deterministic": Change("--deterministic", "other kernels", False),
    "source": Change("source of the images", "pixels differ by roundings of one level", False),
}


IMPLIED_CHANGES = {
    "device": ("threads", "device_name"),
    "strategy": ("stage",),
}  # change with these, and need no sentence of their own
BATCH_NORM = Change("images a micro-batch", "BatchNorm takes its statistics of each micro-batch", False)


def conditions(engine: Engine, source: str, commit: str) -> dict[str, Any]:
    """Under which conditions this process trains: a run that goes on under the same ones gives the same bits (on a GPU if deterministic)."""
    on_gpu = engine.device.type == "cuda"
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "micro_batch": engine.batch_sizes.micro,
        "strategy": engine.name,
        "stage": engine.settings.engine["zero_optimization"]["stage"] if engine.uses_full_ds_config else None,
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
    """Sentences for the changes of conditions that are accepted, and for those that are not."""
    accepted, refused = [], []
    changed = {key for key in CHANGES if key in old and old[key] != new[key]}
    for key in (
        key for key in CHANGES if key in changed.difference(*(IMPLIED_CHANGES.get(cause, ()) for cause in changed))
    ):
        change = BATCH_NORM if key == "micro_batch" and batch_norm else CHANGES[key]
        (accepted if change.accepted else refused).append(
            f"{change.words}: {old[key]} before, {new[key]} now ({change.why})"
        )
    return accepted, refused


def comparable(facts: dict[str, Any], key: str) -> Any:
    """A fact of run.json; a run made before a setting existed had that setting's default."""
    if key == "settings":
        try:
            return Settings.from_dict(facts["settings"]).as_dict()
        except (SettingsError, TypeError, KeyError):
            pass
    return facts.get(key)
