"""Start or resumption of a run: its folder, the checkpoint to resume from, and whether the result is bitwise the same.

docs/resume.md lists what may change between a run and its resumption, and the effect of each change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.errors import EXIT_NOTHING_DONE, RunError, RunFinishedError
from common.files import bytes_text, room_left, write_atomically
from common.paths import near_path
from common.text import python_command, quoted
from config.differences import comparable, differences
from config.settings import ResizingSettings
from image_data.dataset import Dataset
from parallel.engine import Engine
from parallel.progressive_resizing import ProgressiveResizing
from records.checkpoint_store import ENGINE, STATE, Checkpoints, disk_space_needed, find_damage, read_facts, step_of
from records.own_part_files import FOLDER as OWN_PARTS
from records.own_part_files import keep_own_parts
from records.provenance import changed_between, write_code_diff
from records.run_folder import Progress, RunFolder
from training.resume_conditions import MAY_DIFFER, MUST_MATCH, compare

BUDGET = ("settings.epochs ", "max_steps ", "max_minutes ")  # differences that only make a run longer or shorter


@dataclass
class ResumePoint:
    """Where a run starts, on the main process: its folder, and the checkpoint to resume from, if there is one."""

    record: RunFolder
    checkpoint: Path | None
    progress: Progress
    messages: list[str]  # for the screen: what was damaged, what will not be bitwise the same
    changed: list[str] = field(default_factory=list)  # conditions that differ from those of the checkpoint

    def save_changes(self) -> None:
        """Record in run.json which conditions change at this step, for readers of the run's metrics."""
        if self.changed:
            assert self.checkpoint is not None  # the conditions are compared with its
            facts = self.record.facts()
            facts.setdefault("changes", []).append({"after_step": step_of(self.checkpoint), "what": self.changed})
            self.record.create(facts)


@dataclass(frozen=True)
class FolderOptions:
    """Options of the run folder and its checkpoints."""

    runs_dir: Path
    name: str | None
    fresh: bool
    keep_checkpoints: int
    allow_inexact_resume: bool


def find_resume_point(
    options: FolderOptions, facts: dict[str, Any], new: dict[str, Any], state_values: int
) -> ResumePoint:
    """Find or create the run folder, and find the checkpoint to resume from. For the main process.

    Args:
        facts: content of run.json.
        new: the present conditions.
        state_values: number of values in a checkpoint, to check the free disk space.

    Raises:
        RunError: the folder cannot be used as asked, its checkpoints are lost, or the conditions have changed.
    """
    record, messages = choose_folder(options.runs_dir, options.name, options.fresh, facts)
    if not record.exists:
        check_room(record.folder, disk_space_needed(state_values, options.keep_checkpoints), options)
        record.lock()
        record_start(record, facts)
        return ResumePoint(record, None, Progress(), messages)
    record.lock()
    checkpoint, damaged = Checkpoints(record.folder / "state", options.keep_checkpoints).newest_intact()
    messages += damaged
    if checkpoint is None:
        lines = [line for line in record.metrics() if line.get("checkpoint", True)]
        if len(lines) > 1:  # more than the first, whose line is written before its checkpoint
            lost = "; ".join(
                [f"{near_path(record.folder)} has {len(lines)} finished epochs, but no intact checkpoint", *damaged]
            )
            raise RunError(
                f"{lost}. Start over with --fresh (the folder is renamed, nothing is deleted), "
                "or from its weights with --init-weights"
            )
        record_start(record, facts)  # the run was killed before its first checkpoint
        record.write_metrics("")
        return ResumePoint(record, None, Progress(), messages)
    check_room(record.folder, sum(file.stat().st_size for file in checkpoint.iterdir()) * 3 // 2, options)
    edited = changed_between(record.facts().get("code", {}), facts["code"])
    changed = check_conditions(record, checkpoint, new, edited, options.allow_inexact_resume)
    if edited:
        keep_own_parts(record.folder, facts["settings"], f"{OWN_PARTS}.before-{checkpoint.name}")
    messages += [
        f"from step {step_of(checkpoint):,} on not bitwise the same as an uninterrupted run: {text}" for text in changed
    ]
    record.write_metrics((checkpoint / "metrics.jsonl").read_text())
    return ResumePoint(record, checkpoint, RunFolder.read_progress(checkpoint), messages, changed)


def record_start(record: RunFolder, facts: dict[str, Any]) -> None:
    """Write what a run starts from: run.json, its source where it differs from the commit, and user-defined parts."""
    keep_own_parts(record.folder, facts["settings"])
    record.create(facts)
    write_code_diff(record.folder, facts["code"])


def start_or_resume(
    engine: Engine, options: FolderOptions, facts: dict[str, Any], new: dict[str, Any], dataset: Dataset
) -> ResumePoint | None:
    """Find or create the run folder and load its newest checkpoint, if there is one. Collective.

    Returns:
        The resume point on the main process, None elsewhere.

    Raises:
        RunError: as `find_resume_point`; the other processes exit.
    """
    point = problem = None
    if engine.is_main:
        try:
            point = find_resume_point(options, facts, new, engine.state_values())
            keep_validation_list(point.record.folder, dataset)
        except (RunError, OSError) as error:
            problem = error
    raise_on_all_ranks(engine, problem)
    if engine.broadcast_object(point is not None and point.checkpoint is not None):
        engine.load(point.checkpoint if point and point.checkpoint else Path())
    if point:
        point.save_changes()
    return point


def raise_on_all_ranks(engine: Engine, problem: str | Exception | None) -> None:
    """End all processes where the main process has a problem, which it alone reports. Collective.

    Args:
        problem: the message, or the error itself, on the main process.
    """
    text = engine.broadcast_object(None if problem is None else str(problem))
    if text:
        error = problem if isinstance(problem, RunError) else RunError(text)
        finished = engine.broadcast_object(isinstance(error, RunFinishedError))
        raise error if engine.is_main else SystemExit(EXIT_NOTHING_DONE if finished else 1)


def check_conditions(
    record: RunFolder, checkpoint: Path, new: dict[str, Any], edited: list[str], allowed: bool
) -> list[str]:
    """Return the changed conditions. Raises RunError for changes of the arithmetic or the code, unless `allowed`.

    Args:
        edited: files of the run's code that have changed since the run started.
    """
    from safetensors import safe_open

    with safe_open(checkpoint / STATE, "pt") as file:
        batch_norm = any(key.endswith("running_mean") for key in file.keys())  # noqa: SIM118
    accepted, refused = compare(read_facts(checkpoint, ENGINE).get("conditions", {}), new, batch_norm)
    if edited:
        refused.append(
            f"the code has changed since the run started: {', '.join(edited[:3])}{' ...' * (len(edited) > 3)}"
        )
    if refused and not allowed:
        raise RunError(
            f"{near_path(record.folder)} would not resume as the same training: {'; '.join(refused)}. "
            "Start it as before, or resume nevertheless with --allow-inexact-resume"
        )
    return [*accepted, *refused]


def check_room(folder: Path, needed: int, options: FolderOptions) -> None:
    """Raise RunError where the disk of the run folder has too little free space."""
    left = room_left(folder)
    if left < needed:
        raise RunError(
            f"the run needs about {bytes_text(needed)} for its checkpoints and weights, and the disk of "
            f"{near_path(options.runs_dir)} has {bytes_text(left)} left; free some space, choose another "
            "--runs-dir, "
            f"or keep fewer than --keep-checkpoints {options.keep_checkpoints}"
        )


def keep_validation_list(folder: Path, dataset: Dataset) -> None:
    """Write the list of the validation images, where there is a validation split."""
    if held := dataset.splits.get("validation"):
        write_atomically(
            folder / "validation_file_list.txt",
            "".join(f"{path}\t{label}\n" for path, label in zip(held.paths, held.labels, strict=True)),
        )


# --- the folder ---------------------------------------------------------------------------------------------------


def choose_folder(runs_dir: Path, name: str | None, fresh: bool, facts: dict[str, Any]) -> tuple[RunFolder, list[str]]:
    """Return the folder of this run, new or to be resumed, and messages for the screen.

    A given name must be new, or hold an unfinished run of the same settings. Without a name, it is the first of `base`,
    `base-2`, ... that is new or holds an unfinished run of the same settings. Only MAY_DIFFER may change.

    Raises:
        RunError: the named folder holds another run.
        RunFinishedError: the named folder holds a finished run.
    """
    number = 1
    while True:
        base = name or f"{Path(facts['preset']).stem}-{facts['dataset']['name']}-seed{facts['seed']}"
        record = RunFolder(runs_dir / (base if number == 1 else f"{base}-{number}"))
        messages = restore_facts(record)
        if fresh and number == 1 and record.exists:
            messages = [f"the previous run is now {record.rename_aside().name}"]
        if not record.exists:
            return record, messages
        old = record.facts()
        changed = [
            text
            for key in MUST_MATCH
            for text in differences(trained_with(old, key), trained_with(facts, key), key)
            if not text.startswith(MAY_DIFFER)
        ]
        changed += differences(
            old["dataset"]["fingerprint"], facts["dataset"]["fingerprint"], "the dataset's fingerprint"
        )
        finished = record.is_finished()
        if not changed and not finished:
            return record, messages
        where = near_path(record.folder)
        if name and changed and finished and all(text.startswith(BUDGET) for text in changed):
            raise RunFinishedError(
                f"{where} is finished; its schedule ended with it ({'; '.join(changed)}). To train longer, "
                f"start from its weights: --name {quoted(f'{record.folder.name}-longer')} "
                f"--init-weights {quoted(f'{where}/weights.safetensors')}; or --fresh to start over"
            )
        if name and changed:
            raise RunError(
                f"{where} holds a run of other settings ({'; '.join(changed)}); choose another --name, "
                "or --fresh to start over"
            )
        if name:
            raise RunFinishedError(
                f"{where} is finished; evaluate it with {python_command('evaluate.py', where)}, choose another --name, "
                "or --fresh to start over"
            )
        number += 1


def trained_with(facts: dict[str, Any], key: str) -> Any:
    """Return a fact of run.json for comparison, without a resizing to the full side, which earlier commits recorded."""
    fact = comparable(facts, key)
    if key != "settings" or not {"resizing", "model", "image_side"} <= (fact or {}).keys():
        return fact
    scale, fraction = (fact["resizing"].get(name) for name in ("initial_scale", "fraction"))
    side, patch = fact["image_side"] or facts["dataset"].get("image_side"), fact["model"].get("patch")
    if not (scale and fraction and side and patch):
        return fact
    has_effect = ProgressiveResizing(ResizingSettings(scale, fraction), patch).initial_side(side) < side
    return fact if has_effect else {**fact, "resizing": asdict(ResizingSettings())}


def restore_facts(record: RunFolder) -> list[str]:
    """Restore a lost or damaged run.json from the newest intact checkpoint. Returns messages for the screen."""
    try:
        record.facts()
    except RunError:
        for path in reversed(Checkpoints(record.folder / "state", 1).all()):
            if find_damage(path) is None:
                write_atomically(record.folder / "run.json", (path / "run.json").read_text())
                return [f"run.json was lost or damaged and is restored from {path.name}"]
    return []
