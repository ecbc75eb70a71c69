"""How a run begins or goes on: its folder, the checkpoint it goes on from, and whether what follows is the same to the bit.

docs/resume.md has the table of what may change between a run and its resumption, and what each change means.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from checkpoint import ENGINE, STATE, Checkpoints, damage, gigabytes, read_facts, room_left, room_needed, step_of
from dataset import DEFAULT, Dataset
from parallel import Engine
from run_record import Progress, RunError, RunRecord, differences, provenance, write_atomically
from settings import Settings, SettingsError

# What must be the same for a run to go on ...
SAME = ("settings", "seed", "max_steps", "hold_out", "patience", "init_weights", "synthetic")
# ... but for how the work is spread: the state is the same for all (an engine that cannot go on from another's refuses it by name).
SPREAD = ("settings.strategy", "settings.parallel", "settings.engine.zero_optimization", "settings.engine.gradient_accumulation_steps")


@dataclass(frozen=True)
class Change:
    """What it means when a run goes on under another condition; one that is not `accepted` needs --allow-inexact-resume."""

    words: str
    why: str
    accepted: bool


ROUNDING = "the same sums, rounded in another order"
CHANGES = {  # by the key of `conditions`
    "processes": Change("processes", f"{ROUNDING}; dropout draws other masks", True),
    "micro_batch": Change("images a micro-batch", f"{ROUNDING}; dropout draws other masks, MixUp and CutMix other partners", True),
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
IMPLIED = {"device": ("threads", "device_name"), "strategy": ("stage",)}  # change with these, and need no sentence of their own
BATCH_NORM = Change("images a micro-batch", "BatchNorm takes its statistics of each micro-batch", False)


@dataclass
class Start:
    """Where a run starts, on the main process: its folder, and the checkpoint it goes on from, if there is one."""

    record: RunRecord
    checkpoint: Path | None
    progress: Progress
    said: list[str]  # for the person: what was damaged, what will not be the same to the bit
    changed: list[str] = field(default_factory=list)  # conditions that are other ones than those of the checkpoint

    def keep_changes(self) -> None:
        """Write into run.json what is not the same from here on, for whoever reads the run's figures."""
        if self.changed:
            facts = self.record.facts()
            facts.setdefault("changes", []).append({"after_step": step_of(self.checkpoint), "what": self.changed})
            self.record.create(facts)


def conditions(engine: Engine, source: str, commit: str) -> dict[str, Any]:
    """Under which conditions this process trains: a run that goes on under the same ones gives the same bits (on a GPU if deterministic)."""
    on_gpu = engine.device.type == "cuda"
    return {
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "micro_batch": engine.batch_sizes.micro,
        "strategy": engine.name,
        "stage": engine.settings.engine["zero_optimization"]["stage"] if engine.honours_deepspeed else None,
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


def cpu_name() -> str:
    """The model of this machine's processor: another one may choose other kernels."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def compare(old: dict[str, Any], new: dict[str, Any], batch_norm: bool) -> tuple[list[str], list[str]]:
    """Sentences for the changes of conditions that are accepted, and for those that are not."""
    accepted, refused = [], []
    changed = {key for key in CHANGES if key in old and old[key] != new[key]}
    for key in (key for key in CHANGES if key in changed.difference(*(IMPLIED.get(cause, ()) for cause in changed))):
        change = BATCH_NORM if key == "micro_batch" and batch_norm else CHANGES[key]
        (accepted if change.accepted else refused).append(f"{change.words}: {old[key]} before, {new[key]} now ({change.why})")
    return accepted, refused


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
            "folder": os.path.relpath(dataset.folder.resolve(), Path(__file__).resolve().parent),
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


def begin(args: Any, facts: dict[str, Any], new: dict[str, Any], state_values: int) -> Start:
    """Find or make the run folder, and say where the run goes on. For the main process.

    Args:
        facts: what run.json is to hold.
        new: the conditions of now.
        state_values: numbers that a checkpoint holds, to see whether the disk has room for them.

    Raises:
        RunError: the folder cannot be used as asked, its checkpoints are lost, or going on would not be the same training.
    """
    record, said = choose_folder(args, facts)
    if not record.exists:
        check_room(record.folder, room_needed(state_values, args.keep_checkpoints), args)
        record.lock()
        record.create(facts)
        return Start(record, None, Progress(), said)
    record.lock()
    checkpoint, damaged = Checkpoints(record.folder / "state", args.keep_checkpoints).newest()
    said += damaged
    if checkpoint is None:
        epochs = len(record.metrics())
        if epochs > 1:  # more than the first, whose line is written before its checkpoint
            lost = "; ".join([f"{os.path.relpath(record.folder)} has {epochs} finished epochs, but no checkpoint that is whole", *damaged])
            raise RunError(f"{lost}. Start over with --fresh (the folder is renamed, nothing is deleted), or from its weights with --init-weights")
        record.write_metrics("")  # of a run that was killed before its first checkpoint
        return Start(record, None, Progress(), said)
    check_room(record.folder, sum(file.stat().st_size for file in checkpoint.iterdir()) * 3 // 2, args)
    changed = check_conditions(record, checkpoint, new, args.allow_inexact_resume)
    said += [f"from step {step_of(checkpoint):,} on not the same to the bit as an unbroken run: {text}" for text in changed]
    record.write_metrics((checkpoint / "metrics.jsonl").read_text())
    return Start(record, checkpoint, RunRecord.read_progress(checkpoint), said, changed)


def check_conditions(record: RunRecord, checkpoint: Path, new: dict[str, Any], allowed: bool) -> list[str]:
    """What will not be the same to the bit from here on. Raises RunError where it would be another training, unless `allowed`."""
    from safetensors import safe_open

    with safe_open(checkpoint / STATE, "pt") as file:
        batch_norm = any(key.endswith("running_mean") for key in file.keys())  # noqa: SIM118
    accepted, refused = compare(read_facts(checkpoint, ENGINE).get("conditions", {}), new, batch_norm)
    if refused and not allowed:
        raise RunError(f"{os.path.relpath(record.folder)} would not go on as the same training: {'; '.join(refused)}. "
                       "Start it as before, or go on all the same with --allow-inexact-resume")
    return [*accepted, *refused]


def check_room(folder: Path, needed: int, args: Any) -> None:
    """Raises RunError when the disk of the run folder cannot take what will be written."""
    left = room_left(folder)
    if left < needed:
        raise RunError(f"the run needs about {gigabytes(needed)} for its checkpoints and weights, and the disk of {os.path.relpath(args.runs_dir)} "
                       f"has {gigabytes(left)} left; make room, choose another --runs-dir, or keep fewer than --keep-checkpoints "
                       f"{args.keep_checkpoints}")


def keep_validation_list(folder: Path, dataset: Dataset) -> None:
    """Which images were held out, where some were."""
    if held := dataset.splits.get("validation"):
        write_atomically(folder / "validation_file_list.txt",
                         "".join(f"{path}\t{label}\n" for path, label in zip(held.paths, held.labels, strict=True)))


# --- the folder ---------------------------------------------------------------------------------------------------


def choose_folder(args: Any, facts: dict[str, Any]) -> tuple[RunRecord, list[str]]:
    """The folder of this run: the one that is to go on, or a new one; and what there is to say of it.

    A name that was given must be new, or hold a run of the same settings. Without a name, the first of `base`, `base-2`,
    ... that is new or holds an unfinished run of the same settings. Only the strategy may change (see SPREAD).

    Raises:
        RunError: the named folder holds another run, or a finished one.
    """
    number = 1
    while True:
        base = args.name or f"{Path(facts['preset']).stem}-{facts['dataset']['name']}-seed{args.seed}"
        record = RunRecord(args.runs_dir / (base if number == 1 else f"{base}-{number}"))
        said = restore_facts(record)
        if args.fresh and number == 1 and record.exists:
            said = [f"the run that was there is now {record.set_aside().name}"]
        if not record.exists:
            return record, said
        old = record.facts()
        changed = [text for key in SAME for text in differences(comparable(old, key), comparable(facts, key), key) if not text.startswith(SPREAD)]
        changed += differences(old["dataset"]["fingerprint"], facts["dataset"]["fingerprint"], "the dataset's fingerprint")
        finished = record.is_finished()
        if not changed and not finished:
            return record, said
        where = os.path.relpath(record.folder)
        if args.name and changed:
            raise RunError(f"{where} holds a run of other settings ({'; '.join(changed)}); choose another --name, or --fresh to start over")
        if args.name:
            raise RunError(f"{where} is finished; evaluate it with python evaluate.py {where}, choose another --name, "
                           "or --fresh to start over")
        number += 1


def comparable(facts: dict[str, Any], key: str) -> Any:
    """A fact of run.json; a run made before a setting existed had that setting's default."""
    if key == "settings":
        try:
            return Settings.from_dict(facts["settings"]).as_dict()
        except (SettingsError, TypeError, KeyError):
            pass
    return facts.get(key)


def restore_facts(record: RunRecord) -> list[str]:
    """Where run.json is lost or damaged, take it from the newest whole checkpoint."""
    try:
        record.facts()
    except RunError:
        for path in reversed(Checkpoints(record.folder / "state", 1).all()):
            if damage(path) is None:
                write_atomically(record.folder / "run.json", (path / "run.json").read_text())
                return [f"run.json was lost or damaged, and is restored from {path.name}"]
    return []
