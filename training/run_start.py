"""The start of a run, from a complete engine to the next step: run folder, checkpoint, console lines, logging."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from common.errors import RunError
from common.launch_facts import print_launch_facts
from common.paths import near_path
from dali_pipeline import Batches, Synthetic
from parallel.engine import Engine
from records.checkpoint_store import Checkpoints, Interval
from records.run_folder import Progress, RunFolder
from training.checkpoint_writer import CheckpointWriter
from training.console import Console
from training.resume import FolderOptions, raise_on_all_ranks, start_or_resume
from training.resume_conditions import conditions
from training.run_facts import RunOptions, facts_of
from training.run_setup import RunData
from training.step_profile import StepProfile
from training.trackers import Tracking, first_images, start_tracking


@dataclass(frozen=True)
class LoggingOptions:
    """When a run saves checkpoints, and which trackers it logs to."""

    checkpoint_every: Interval
    tensorboard: bool
    wandb: str | None  # Weights & Biases project, "" for its default; None: no Weights & Biases
    report: bool  # curves.png and report.html
    mlflow: str | None = None  # MLflow experiment; None: no MLflow
    group: str | None = None  # of the run at Weights & Biases and in MLflow
    profile: int | None = None  # number of steps to profile


@dataclass
class StartedRun:
    """What the training loop needs besides the engine and the batches."""

    progress: Progress
    writer: CheckpointWriter
    tracking: Tracking
    record: RunFolder | None  # on the main process only
    profile: StepProfile


def start_run(
    engine: Engine,
    options: RunOptions,
    folder: FolderOptions,
    logging: LoggingOptions,
    data: RunData,
    training: Batches | Synthetic,
    steps_per_epoch: int,
    total_steps: int,
    console: Console,
) -> StartedRun:
    """Find or create the run folder, load its newest checkpoint if there is one, and print the run. Collective.

    Raises:
        RunError: the folder cannot be used as asked.
    """
    facts = facts_of(options, data.dataset, data.folder, engine, training.source, steps_per_epoch, total_steps)
    now = conditions(engine, training.source, facts["commit"])
    point = start_or_resume(engine, folder, facts, now, data.dataset)
    record = point.record if point else None
    if engine.schedule.plan:  # of the checkpoint
        facts |= {"total_steps": engine.schedule.total, "plan": engine.schedule.plan_facts()}
    progress = engine.broadcast_object(point and point.progress)
    progress.loss_sum = engine.own_value(progress.loss_sums)
    checkpoints = Checkpoints(record.folder / "state", folder.keep_checkpoints) if record else None
    writer = CheckpointWriter(engine, logging.checkpoint_every, now, record, checkpoints)
    if record:
        console.print_run(near_path(record.folder), facts, training.side, engine)
        if facts["commit"] is None:
            console.print_field("note", f"the commit of this project is unknown: {facts['commit_unknown']}")
    for text in point.messages if point else ():
        console.print_field("note", text)
    with ExitStack() as until_it_trains:  # a start that fails closes the trackers
        tracking = until_it_trains.enter_context(_start_tracking(engine, record, facts, logging, console))
        if not engine.step:
            mean, std = data.dataset.mean, data.dataset.std
            tracking.first_batch(lambda: first_images(next(training.epoch(0, 0, 1))[0], mean, std))
        engine.begin(facts)
        folder_of_run = record.folder if record else None
        profile = StepProfile(folder_of_run, logging.profile, engine.first_steps, engine.device, console.say)
        until_it_trains.pop_all()
    if record:
        sizes = engine.batch_sizes
        print_launch_facts(record.folder, (sizes.total, sizes.accumulation, sizes.shards))
    return StartedRun(progress, writer, tracking, record, profile)


def _start_tracking(
    engine: Engine, record: RunFolder | None, facts: dict[str, Any], logging: LoggingOptions, console: Console
) -> Tracking:
    """Start the trackers. Collective, because a tracker that cannot start ends all processes."""
    tracking, problem = Tracking([]), None
    if record:
        try:
            tracking = start_tracking(
                record.folder,
                facts,
                engine.step,
                console,
                tensorboard=logging.tensorboard,
                wandb=logging.wandb,
                mlflow=logging.mlflow,
                group=logging.group,
                report=logging.report,
            )
        except (RunError, OSError) as error:
            problem = str(error)
    raise_on_all_ranks(engine, problem)
    return tracking
