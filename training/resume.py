"""How a run begins or goes on: its folder, the checkpoint it goes on from, and whether what follows is the same to the bit.

docs/resume.md has the table of what may change between a run and its resumption, and what each change means.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RunError
from common.files import gigabytes, room_left, write_atomically
from config.differences import differences
from image_data.dataset import Dataset
from parallel.engine import Engine
from records.checkpoint_store import ENGINE, STATE, Checkpoints, disk_space_needed, find_damage, read_facts, step_of
from records.run_folder import Progress, RunFolder
from training.resume_conditions import MAY_DIFFER, MUST_MATCH, comparable, compare


@dataclass
class ResumePoint:
    """Where a run starts, on the main process: its folder, and the checkpoint it goes on from, if there is one."""

    record: RunFolder
    checkpoint: Path | None
    progress: Progress
    messages: list[str]  # for the screen: what was damaged, what will not be the same to the bit
    changed: list[str] = field(default_factory=list)  # conditions that are other ones than those of the checkpoint

    def save_changes(self) -> None:
        """Write into run.json what is not the same from here on, for whoever reads the run's figures."""
        if self.changed:
            facts = self.record.facts()
            facts.setdefault("changes", []).append({"after_step": step_of(self.checkpoint), "what": self.changed})
            self.record.create(facts)


@dataclass(frozen=True)
class FolderOptions:
    """Where a run writes, and what it may find there."""

    runs_dir: Path
    name: str | None
    fresh: bool
    keep_checkpoints: int
    allow_inexact_resume: bool


def find_resume_point(
    options: FolderOptions, facts: dict[str, Any], new: dict[str, Any], state_values: int
) -> ResumePoint:
    """Find or make the run folder, and say where the run resumes. For the main process.

    Args:
        facts: what run.json is to hold.
        new: the conditions of now.
        state_values: numbers that a checkpoint holds, to see whether the disk has room for them.

    Raises:
        RunError: the folder cannot be used as asked, its checkpoints are lost, or going on would not be the same training.
    """
    record, messages = choose_folder(options.runs_dir, options.name, options.fresh, facts)
    if not record.exists:
        check_room(record.folder, disk_space_needed(state_values, options.keep_checkpoints), options)
        record.lock()
        record.create(facts)
        return ResumePoint(record, None, Progress(), messages)
    record.lock()
    checkpoint, damaged = Checkpoints(record.folder / "state", options.keep_checkpoints).newest_intact()
    messages += damaged
    if checkpoint is None:
        epochs = len(record.metrics())
        if epochs > 1:  # more than the first, whose line is written before its checkpoint
            lost = "; ".join(
                [
                    f"{os.path.relpath(record.folder)} has {epochs} finished epochs, but no checkpoint that is whole",
                    *damaged,
                ]
            )
            raise RunError(
                f"{lost}. Start over with --fresh (the folder is renamed, nothing is deleted), or from its weights with --init-weights"
            )
        record.write_metrics("")  # of a run that was killed before its first checkpoint
        return ResumePoint(record, None, Progress(), messages)
    check_room(record.folder, sum(file.stat().st_size for file in checkpoint.iterdir()) * 3 // 2, options)
    changed = check_conditions(record, checkpoint, new, options.allow_inexact_resume)
    messages += [
        f"from step {step_of(checkpoint):,} on not the same to the bit as an unbroken run: {text}" for text in changed
    ]
    record.write_metrics((checkpoint / "metrics.jsonl").read_text())
    return ResumePoint(record, checkpoint, RunFolder.read_progress(checkpoint), messages, changed)


def start_or_resume(
    engine: Engine, options: FolderOptions, facts: dict[str, Any], new: dict[str, Any], dataset: Dataset
) -> ResumePoint | None:
    """Find or make the run folder and load its newest checkpoint if it has one; None in all but the main process. Collective.

    Raises:
        RunError: as `find_resume_point`; the other processes end.
    """
    point = problem = None
    if engine.is_main:
        try:
            point = find_resume_point(options, facts, new, engine.state_values())
            keep_validation_list(point.record.folder, dataset)
        except (RunError, OSError) as error:
            problem = str(error)
    raise_on_all_ranks(engine, problem)
    if engine.broadcast_object(point is not None and point.checkpoint is not None):
        engine.load(point.checkpoint if point else Path())
    if point:
        point.save_changes()
    return point


def raise_on_all_ranks(engine: Engine, problem: str | None) -> None:
    """Where the main process has a problem, end all of them; it says what the problem is. Collective."""
    if problem := engine.broadcast_object(problem):
        raise RunError(problem) if engine.is_main else SystemExit(1)


def check_conditions(record: RunFolder, checkpoint: Path, new: dict[str, Any], allowed: bool) -> list[str]:
    """What will not be the same to the bit from here on. Raises RunError where it would be another training, unless `allowed`."""
    from safetensors import safe_open

    with safe_open(checkpoint / STATE, "pt") as file:
        batch_norm = any(key.endswith("running_mean") for key in file.keys())  # noqa: SIM118
    accepted, refused = compare(read_facts(checkpoint, ENGINE).get("conditions", {}), new, batch_norm)
    if refused and not allowed:
        raise RunError(
            f"{os.path.relpath(record.folder)} would not go on as the same training: {'; '.join(refused)}. "
            "Start it as before, or go on all the same with --allow-inexact-resume"
        )
    return [*accepted, *refused]


def check_room(folder: Path, needed: int, options: FolderOptions) -> None:
    """Raises RunError when the disk of the run folder cannot take what will be written."""
    left = room_left(folder)
    if left < needed:
        raise RunError(
            f"the run needs about {gigabytes(needed)} for its checkpoints and weights, and the disk of {os.path.relpath(options.runs_dir)} "
            f"has {gigabytes(left)} left; make room, choose another --runs-dir, or keep fewer than --keep-checkpoints "
            f"{options.keep_checkpoints}"
        )


def keep_validation_list(folder: Path, dataset: Dataset) -> None:
    """Which images were held out, where some were."""
    if held := dataset.splits.get("validation"):
        write_atomically(
            folder / "validation_file_list.txt",
            "".join(f"{path}\t{label}\n" for path, label in zip(held.paths, held.labels, strict=True)),
        )


# --- the folder ---------------------------------------------------------------------------------------------------


def choose_folder(runs_dir: Path, name: str | None, fresh: bool, facts: dict[str, Any]) -> tuple[RunFolder, list[str]]:
    """The folder of this run: the one that is to go on, or a new one; and what there is to say of it.

    A name that was given must be new, or hold a run of the same settings. Without a name, the first of `base`, `base-2`,
    ... that is new or holds an unfinished run of the same settings. Only the strategy may change (see MAY_DIFFER).

    Raises:
        RunError: the named folder holds another run, or a finished one.
    """
    number = 1
    while True:
        base = name or f"{Path(facts['preset']).stem}-{facts['dataset']['name']}-seed{facts['seed']}"
        record = RunFolder(runs_dir / (base if number == 1 else f"{base}-{number}"))
        messages = restore_facts(record)
        if fresh and number == 1 and record.exists:
            messages = [f"the run that was there is now {record.rename_aside().name}"]
        if not record.exists:
            return record, messages
        old = record.facts()
        changed = [
            text
            for key in MUST_MATCH
            for text in differences(comparable(old, key), comparable(facts, key), key)
            if not text.startswith(MAY_DIFFER)
        ]
        changed += differences(
            old["dataset"]["fingerprint"], facts["dataset"]["fingerprint"], "the dataset's fingerprint"
        )
        finished = record.is_finished()
        if not changed and not finished:
            return record, messages
        where = os.path.relpath(record.folder)
        if name and changed:
            raise RunError(
                f"{where} holds a run of other settings ({'; '.join(changed)}); choose another --name, or --fresh to start over"
            )
        if name:
            raise RunError(
                f"{where} is finished; evaluate it with python evaluate.py {where}, choose another --name, "
                "or --fresh to start over"
            )
        number += 1


def restore_facts(record: RunFolder) -> list[str]:
    """Where run.json is lost or damaged, take it from the newest whole checkpoint."""
    try:
        record.facts()
    except RunError:
        for path in reversed(Checkpoints(record.folder / "state", 1).all()):
            if find_damage(path) is None:
                write_atomically(record.folder / "run.json", (path / "run.json").read_text())
                return [f"run.json was lost or damaged, and is restored from {path.name}"]
    return []
