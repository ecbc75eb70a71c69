"""The line that an epoch gets in metrics.jsonl."""

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
    """Return everything that is known of an epoch before its checkpoint is taken. Collective.

    Args:
        results: exact counts and seconds of each evaluation, by the name of its split.
        tracking_seconds: logging overhead since the last line.
    """
    seconds = progress.training_seconds
    line: dict[str, Any] = {
        "epoch": progress.epoch + 1,
        "step": engine.step,
        # of the last step made: `engine.step` counts steps, so it is the index of the next one
        "learning_rate": engine.settings.engine["optimizer"]["params"]["lr"] * engine.schedule(engine.step - 1),
        "skipped_steps": progress.skipped_steps,
        "images_per_second": round(progress.timed_images / seconds, 1) if seconds else 0.0,
        "training_seconds": round(seconds, 3),
        "warmup_seconds": round(progress.warmup_seconds, 3),
        "data_wait_seconds": round(progress.data_wait_seconds, 3),
        "memory_gib": round(peak_memory_gib(engine.device), 3),
        "tracking_seconds": round(tracking_seconds, 3),
    }
    if progress.num_losses:  # none where every step was skipped, on all processes
        line["train_loss"] = engine.mean(torch.tensor(progress.loss_sum / progress.num_losses, dtype=torch.float64))
    for name, (counts, evaluation_seconds) in results.items():
        line |= {f"{name}_{key}": value for key, value in counts.facts().items()}
        line[f"{name}_seconds"] = round(evaluation_seconds, 3)
    return line | engine.epoch_facts() | ({"ended_early": True} if ended_early else {})


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: on its GPU, or in RAM without a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
