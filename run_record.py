"""The run folder `runs/<name>/`: what was run, how it went, and what is needed to go on.

    run.json             command, settings, dataset, commit, versions, device: written once, read by resume and evaluate
    metrics.jsonl        one line an epoch
    curves.png           loss and accuracy over the epochs
    state/step-00000780/ a complete checkpoint; the newest one is where a resumed run goes on
    weights.safetensors  the weights after the last epoch, plain fp32; best.safetensors where a held-out part chose one
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RUNS = HERE / "runs"
KEEP_CHECKPOINTS = 2
# How the work is spread over processes may differ between a run and its resumption: the state is the same for all (an
# engine that cannot go on from another's refuses it by name).
SPREAD = ("settings.strategy", "settings.parallel", "settings.engine.zero_optimization")


class RunError(ValueError):
    """The run cannot go on, or its folder cannot be used as asked; the message says why and what to do."""


@dataclass
class Progress:
    """Where a run stands, counted in optimiser steps; everything else follows from it and the settings."""

    epoch: int = 0  # being trained, or next when step_in_epoch is 0
    step_in_epoch: int = 0
    loss_sum: float = 0.0  # over the steps of this epoch, mean of the processes
    training_seconds: float = 0.0  # of this epoch
    data_wait_seconds: float = 0.0  # part of training_seconds
    timed_images: int = 0  # trained in training_seconds
    num_metrics: int = 0  # lines of metrics.jsonl
    best_accuracy: float = -1.0  # on the held-out part


class RunRecord:
    """One run folder, written by the main process only."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    @property
    def exists(self) -> bool:
        return (self.folder / "run.json").is_file()

    def facts(self) -> dict[str, Any]:
        """The content of run.json. Raises RunError when there is none or it cannot be read."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except FileNotFoundError:
            raise RunError(f"{self.folder} is not a run folder (no run.json); runs live in {RUNS.name}/<name>") from None
        except ValueError as error:
            raise RunError(f"{self.folder}/run.json is damaged: {error}") from None

    def create(self, facts: dict[str, Any]) -> None:
        """Make the folder and write run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(facts, indent=2))

    def set_aside(self) -> Path:
        """Rename the folder to make room for a fresh run; nothing is deleted. Returns the new name."""
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{number}")).exists():
            number += 1
        self.folder.rename(aside)
        return aside

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a torn last line (power cut) is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().split("\n") if path.is_file() else []
        return [json.loads(line) for line in lines[:-1] if line]

    def append_metrics(self, line: dict[str, Any]) -> None:
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def keep_metrics(self, count: int) -> None:
        """Forget what follows the first `count` lines: epochs that a resumed run will train again, or a torn line."""
        lines = self.metrics()[:count]
        if (self.folder / "metrics.jsonl").exists():
            write_atomically(self.folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def newest_checkpoint(self) -> Path | None:
        """The folder of the newest complete checkpoint."""
        complete = sorted((self.folder / "state").glob("step-*"))
        return complete[-1] if complete else None

    @contextmanager
    def new_checkpoint(self, step: int):
        """A folder to write a checkpoint into; it appears under its name when it is whole, then old ones are removed."""
        state = self.folder / "state"
        unfinished = state / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():
            _flush_to_disk(file)
        final = state / f"step-{step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        _flush_to_disk(state)
        for old in sorted(state.glob("step-*"))[:-KEEP_CHECKPOINTS]:
            shutil.rmtree(old)

    @staticmethod
    def write_progress(folder: Path, progress: Progress) -> None:
        (folder / "progress.json").write_text(json.dumps(asdict(progress)))

    @staticmethod
    def read_progress(folder: Path) -> Progress:
        return Progress(**json.loads((folder / "progress.json").read_text()))


def choose_folder(args: Any, facts: dict[str, Any]) -> RunRecord:
    """The folder of this run: the one that is to go on, or a new one.

    A name that was given must be new, or hold a run of the same settings. Without a name, the first of `base`, `base-2`,
    ... that is new or holds an unfinished run of the same settings. Only the strategy may change (see SPREAD).

    Raises:
        RunError: the named folder holds another run, or a finished one.
    """
    same = ("settings", "seed", "max_steps", "hold_out", "init_weights", "synthetic")
    number = 1
    while True:
        base = args.name or f"{Path(facts['preset']).stem}-{facts['dataset']['name']}-seed{args.seed}"
        record = RunRecord(args.runs_dir / (base if number == 1 else f"{base}-{number}"))
        if not record.exists or (args.fresh and number == 1):
            if record.exists:
                print(f"the run that was there is now {record.set_aside().name}")
            return record
        old = record.facts()
        changed = [text for key in same for text in differences(old.get(key), facts.get(key), key) if not text.startswith(SPREAD)]
        changed += differences(old["dataset"]["fingerprint"], facts["dataset"]["fingerprint"], "the dataset's fingerprint")
        checkpoint = record.newest_checkpoint()
        finished = checkpoint is not None and int(checkpoint.name.removeprefix("step-")) >= facts["total_steps"]
        if not changed and not finished:
            return record
        where = os.path.relpath(record.folder)
        if args.name and changed:
            raise RunError(f"{where} holds a run of other settings ({'; '.join(changed)}); choose another --name, or --fresh to start over")
        if args.name:
            raise RunError(f"{where} is finished; evaluate it with python evaluate.py {where}, choose another --name, "
                           "or --fresh to start over")
        number += 1


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file so that a reader, or a machine that loses power, sees the old content or the new, nothing between."""
    temporary = path.with_name(path.name + ".unfinished")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _flush_to_disk(temporary)
    os.replace(temporary, path)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def newest_run(runs: Path) -> Path:
    """The run folder in `runs` whose metrics or start are the most recent. Raises RunError when there is none."""
    found = [path.parent for path in runs.glob("*/run.json")]
    if not found:
        raise RunError(f"there is no run in {runs} yet; start one with ./launch_local_train.sh")
    return max(found, key=lambda folder: max(file.stat().st_mtime for file in folder.glob("*.json*")))


def provenance() -> dict[str, Any]:
    """Command, commit and versions: what a reader needs to run this again."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True).stdout.strip()

    packages = ("torch", "torchvision", "deepspeed", "numpy", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "nvidia-dali-cuda110")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "versions": versions,
    }


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two trees of settings, one readable text a leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [text for key in sorted(old.keys() | new.keys())
                for text in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
