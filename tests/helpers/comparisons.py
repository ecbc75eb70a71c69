"""Shared by the tests of compare.py: a small experiment, and invented runs, whose folders are written at once."""

from __future__ import annotations

import json
from pathlib import Path

from comparison.run_queue import PlannedRun
from records.provenance import digest_of
from records.run_folder import RunFolder

COMMON = 'question = "Is a gate better?"\npreset = "tiny.toml"\nsteps = 6\nseeds = 2\n'
VARIANTS = """
[[variants]]
name = "plain"
idea = "The reference."
[[variants]]
name = "gated"
idea = "A gate."
model.feed_forward = "geglu"
model.feed_forward_options.hidden = 32
"""  # 3 matrices of 32 have the parameters of the reference's 2 of 48

CODE = ("train.py", "models/feed_forward.py")


class Invented:
    """Replaces `launch`. `accuracy`, `facts`, `speed` and `fails` set the outcome, by run name or variant."""

    def __init__(self):
        self.started: list[str] = []
        self.accuracy, self.facts, self.speed, self.fails = {}, {}, {}, {}

    def __call__(self, task: PlannedRun, environment: dict[str, str]) -> Ended:
        self.started.append(task.name)
        for variant, message in self.fails.items():
            if task.name.startswith(variant):
                task.log.write_text(
                    f"run       here\nTraceback (most recent call last):\n{message}\nTraining failed (exit code 1).\n"
                )
                return Ended(1)
        write_run(
            task,
            self.accuracy.get(task.name, 0.5),
            self.speed.get(task.name.split("-")[-2], 1000.0),
            self.facts.get(task.name, {}),
        )
        return Ended(0)


class Ended:
    """A child process that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("no run should be stopped")


def write_run(task: PlannedRun, accuracy: float, images_per_second: float, changed: dict, done: bool = True) -> None:
    """Write the folder of a run on 300 images in batches of 64; 30 images are the validation split."""
    expected = task.expected
    batch = expected["settings"]["engine"]["train_batch_size"]
    steps = expected["max_steps"] or expected["settings"]["epochs"] * (270 // batch)
    facts = {
        **{key: expected[key] for key in ("settings", "seed", "max_steps", "hold_out")},
        "dataset": {
            "name": "shapes",
            "folder": "data/shapes",
            "fingerprint": expected["fingerprint"],
            "classes": list("abcdefghij"),
            "image_side": 32,
            "num_images": {"train": 270, "validation": 30, "test": 70},
        },
        "batch": {"total": batch},
        "steps_per_epoch": 270 // batch,
        "total_steps": steps,
        "commit": "abc",
        "uncommitted_changes": False,
        "code": {"fingerprint": "123", "files": {path: digest_of(path) for path in CODE}},
        "device": "CPU",
        "num_processes": 1,
        "versions": {"torch": "2"},
        **changed,
    }
    record = RunFolder(task.folder)
    record.create(facts)
    seconds = 0.5 + steps * batch / images_per_second
    line = {
        "epoch": 1,
        "step": steps,
        "training_seconds": seconds,
        "images_per_second": steps * batch / seconds,
        "validation_accuracy": accuracy,
        "validation_seen": 30,
        "test_accuracy": 0.123456,
        "test_seen": 70,
        "test_loss": 1.0,
    }
    record.append_metrics(line)
    (task.folder / "state" / f"step-{steps if done else 1:08d}").mkdir(parents=True)


def report(tmp_path: Path) -> tuple[str, dict]:
    folder = tmp_path / "results" / "gates"
    return (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
