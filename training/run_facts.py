"""The content of run.json: options, settings, dataset and machine of a run."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from common.machine import cpu_name
from common.paths import PROJECT, name_of
from image_data.dataset import Dataset
from parallel.engine import Engine
from records.own_part_files import copies_of, own_files
from records.provenance import provenance


@dataclass(frozen=True)
class RunOptions:
    """Options of a run besides its settings; run.json records each under its name."""

    preset: str
    seed: int
    max_steps: int | None
    hold_out: float | None  # fraction of the training split that becomes the validation split
    patience: int | None  # early stopping: epochs without better validation accuracy
    init_weights: str | None  # file name, or name on the Hugging Face Hub
    synthetic: bool
    deterministic: bool
    evaluate_every: str = "1epochs"
    max_minutes: float | None = None  # training time that the number of steps is planned for
    only_shortens: bool = False  # max_minutes may make the run shorter than its epochs or max_steps, but not longer


def facts_of(
    options: RunOptions,
    dataset: Dataset,
    folder: Path,
    engine: Engine,
    source: str,
    steps_per_epoch: int,
    total_steps: int,
) -> dict[str, Any]:
    """Return the content of run.json.

    Args:
        folder: of the prepared dataset as the user gave it; `dataset` may be a copy of it on a local disk.
    """
    settings = engine.settings.as_dict()
    copies = copies_of(settings)
    return {
        **provenance(own_files(settings)),
        "settings": settings,
        **({"own_parts": copies} if copies else {}),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        **asdict(options),
        "dataset": {
            "name": name_of(folder),
            "folder": os.path.relpath(folder.resolve(), PROJECT),
            "fingerprint": dataset.fingerprint,
            "classes": dataset.classes,
            "image_side": dataset.image_side,
            "mean": dataset.mean,
            "std": dataset.std,
            "num_images": {name: len(split) for name, split in dataset.splits.items()},
        },
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU",
        "processor": {"name": cpu_name(), "cores": len(os.sched_getaffinity(0))},
        "precision": engine.precision,
        "num_parameters": engine.num_parameters,
        "num_processes": dist.get_world_size(),
        "source": source,
        "batch": vars(engine.batch_sizes),
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,  # an estimate until "plan" is there, where max_minutes is given
    }
