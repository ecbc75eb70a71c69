"""The line of metrics.jsonl that an epoch gets."""

from __future__ import annotations

import resource
from typing import Any

import torch

from parallel.batch_sizes import EvalCounts
from parallel.engine import Engine
from records.run_folder import Progress


def epoch_line(
    engine: Engine,
    progress: Progress,
    results: dict[str, tuple[EvalCounts, float]],
    tracking_seconds: float,
    ended_early: bool,
) -> dict[str, Any]:
    """Everything that is known of an epoch before its checkpoint is taken. Collective.

    Args:
        results: exact counts and seconds of each evaluation, by the name of its split.
        tracking_seconds: what logging has cost since the last line.
    """
    line: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": engine.step,
        "learning_rate": engine.settings.engine["optimizer"]["params"]["lr"] * engine.schedule(engine.step - 1),
        "train_loss": engine.mean(torch.tensor(progress.loss_sum / max(1, progress.num_losses), dtype=torch.float64)),
        "skipped_steps": progress.skipped_steps,
        "images_per_second": round(progress.timed_images / progress.training_seconds, 1)
        if progress.training_seconds
        else 0.0,
        "training_seconds": round(progress.training_seconds, 3),
        "warmup_seconds": round(progress.warmup_seconds, 3),
        "data_wait_seconds": round(progress.data_wait_seconds, 3),
        "memory_gib": round(peak_memory_gib(engine.device), 3),
        "tracking_seconds": round(tracking_seconds, 3),
    }
    for name, (counts, seconds) in results.items():
        line |= {f"{name}_{key}": value for key, value in counts.facts().items()} | {
            f"{name}_seconds": round(seconds, 3)
        }
    return line | engine.epoch_facts() | ({"ended_early": True} if ended_early else {})


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this process has held: on the GPU where it has one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
