"""What run.json holds of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from common.paths import PROJECT
from image_data.dataset import DEFAULT, Dataset
from parallel.engine import Engine
from records.provenance import provenance


def facts_of(args: Any, preset: str, dataset: Dataset, engine: Engine, source: str, steps_per_epoch: int, total_steps: int) -> dict[str, Any]:
    """What run.json holds of a run."""
    return {
        **provenance(),
        "settings": engine.settings.as_dict(),
        "preset": preset,
        "seed": args.seed,
        "max_steps": args.max_steps,
        "hold_out": args.hold_out,
        "patience": args.patience,
        "init_weights": args.init_weights.name if args.init_weights else None,
        "synthetic": args.synthetic,
        "deterministic": args.deterministic,
        "dataset": {
            "name": Path(args.data_dir).name if args.data_dir else args.dataset or DEFAULT,
            "folder": os.path.relpath(dataset.folder.resolve(), PROJECT),
            "fingerprint": dataset.fingerprint, "classes": dataset.classes, "image_side": dataset.image_side,
            "mean": dataset.mean, "std": dataset.std, "num_images": {name: len(split) for name, split in dataset.splits.items()},
        },
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "CPU",
        "precision": engine.precision,
        "num_parameters": engine.num_parameters,
        "num_processes": engine.data_shard[1],
        "source": source,
        "batch": vars(engine.batch_sizes),
        "steps_per_epoch": steps_per_epoch,
        "total_steps": total_steps,
    }
