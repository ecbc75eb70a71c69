"""What the tests of checkpoints and run folders share: a state, facts of a run, and the files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from records.checkpoint_store import Checkpoints
from records.run_folder import RunFolder
from training import resume

STATE = {
    "weights/a": torch.arange(6.0).reshape(2, 3),
    "weights/b": torch.tensor(float("nan")),
    "scalars/step": torch.tensor(3),
}
FACTS = {
    "settings": {"a": 1},
    "seed": 0,
    "max_steps": None,
    "hold_out": None,
    "preset": "x/tiny.toml",
    "total_steps": 8,
    "dataset": {"name": "shapes", "fingerprint": "f"},
}


def texts(step: int, finished: bool = False) -> dict[str, str]:
    return {
        "engine.json": json.dumps({"step": step}),
        "progress.json": json.dumps({"epoch": step, "finished": finished}),
        "run.json": json.dumps(FACTS),
        "metrics.jsonl": "",
    }


def store(record: RunFolder, keep: int = 2) -> Checkpoints:
    return Checkpoints(record.folder / "state", keep)


def choice(runs_dir: Path, facts: dict = FACTS, name: str | None = None, fresh: bool = False) -> RunFolder:
    return resume.choose_folder(runs_dir, name, fresh, facts)[0]
