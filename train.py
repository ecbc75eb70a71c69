#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Train a network on a tree of class folders.

    ./launch_local_train.sh                                            one box: set-up, data, every GPU (or the CPU)
    python train.py --preset cpu --set model.feed_forward=geglu        one process, in a prepared environment

The run folder `runs/<name>/` keeps everything; starting the same run again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.paths import DATA
from config.settings import Settings, preset_names, resolve
from training.arguments import parse_arguments
from training.console import VERBOSE, Screen, tell_all

if TYPE_CHECKING:
    from image_data.dataset import Dataset
    from parallel.engine import Engine
    from parallel.peers.rendezvous import Meeting
    from training.loop import StopRequest

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "communicator was aborted")


def main() -> int:
    args = parse_arguments()
    import torch  # after the arguments, so that --help and mistyped settings answer at once

    from dali_pipeline import side_of
    from image_data.dataset import Dataset
    from image_data.local_copy import stage
    from model import build_model
    from models.initial_weights import load_initial_weights
    from parallel.peers.setup import meeting_of
    from parallel.slurm import rank_environment
    from parallel.strategies import engine_class
    from training.determinism import make_deterministic
    from training.loop import StopRequest
    from training.micro_batch import MicroBatch, OutOfMemory
    from training.trackers import check_trackers

    if args.patience and not args.hold_out:
        raise SettingsError("--patience waits for a better accuracy on a held-out part, and there is none; give --hold-out 0.1")
    stop = StopRequest()
    rank_environment()
    if args.deterministic:
        make_deterministic()
    screen = Screen(args.screen, is_main=os.environ.get("RANK", "0") == "0")
    preset = args.preset or ("spt-lsa" if torch.cuda.is_available() else "cpu")
    if not args.preset:
        screen.fact("preset", f"{preset}, because there is {'a' if torch.cuda.is_available() else 'no'} GPU (--preset NAME chooses another: "
                              f"{', '.join(preset_names())})")
    check_trackers(args.tensorboard, args.wandb)
    settings = resolve(preset, args.set, epochs=args.epochs, strategy=args.strategy)
    dataset = Dataset.open(prepare(args))
    if args.stage_to:
        dataset = stage(dataset, args.stage_to, files=args.source == "files" or dataset.splits["train"].packed is None)
    if args.hold_out:
        dataset = dataset.hold_out(args.hold_out)

    side = side_of(dataset, settings.image_side)

    def build() -> torch.nn.Module:
        model = build_model(settings.model, len(dataset.classes), side)
        for line in load_initial_weights(model, args.init_weights) if args.init_weights else []:
            screen.say(line)
        return model

    meeting = meeting_of(args, settings.parallel.patience_seconds)
    engine_type = engine_class(settings.strategy, peers=meeting is not None)
    if args.screen == VERBOSE:
        tell_all()
    micro_batch = MicroBatch(engine_type, settings, build, dataset, side)
    if args.micro_batch and (line := micro_batch.choose(args.micro_batch)):
        screen.say(line)
    try:
        return train(args, preset, settings, dataset, engine_type, meeting, build, stop, screen)
    except OutOfMemory:
        pass  # looked into when nothing holds the engine any more
    raise RunError(micro_batch.advice())


def train(args: argparse.Namespace, preset: str, settings: Settings, dataset: Dataset, engine_type: type[Engine], meeting: Meeting | None,
          build: Callable, stop: StopRequest, screen: Screen) -> int:
    """The run itself, from the engine on. Returns the exit code."""
    from dali_pipeline import Batches, Synthetic
    from image_data.dataset import too_few
    from optim.lr_schedule import Schedule
    from parallel.compile import FIRST_STEPS_SECONDS
    from parallel.peers.link_cost import lines_of_cost
    from parallel.process_group import limit_waits
    from training.loop import Loop

    steps_per_epoch = len(dataset.splits["train"]) // settings.engine["train_batch_size"]
    if not steps_per_epoch:
        raise too_few("train", len(dataset.splits["train"]), settings.engine["train_batch_size"])
    total_steps = min(settings.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    engine = engine_type(build, settings, Schedule(settings.schedule, total_steps), args.seed, **({"meeting": meeting} if meeting else {}))
    which, of_how_many = engine.data_shard
    source = dict(batch_size=engine.batch_sizes.micro, shard=which, num_shards=of_how_many, device=engine.device,
                  source=args.source, image_side=settings.image_side)
    training = Batches(dataset, "train", seed=engine.data_seed, augmentation=settings.augmentation, **source)
    if args.synthetic:
        training = Synthetic(training)
    evaluation = {name: Batches(dataset, name, **source) for name in dataset.splits if name != "train"}

    if args.skip_bad_steps:
        engine.skip_bad_steps()
    loop = Loop(engine, settings, training, evaluation, steps_per_epoch, total_steps, stop, screen)
    if args.link_gbps:
        for line in lines_of_cost(engine.num_parameters, settings.parallel.local_steps, args.link_gbps, args.step_seconds):
            screen.say(line)
    loop.open_run(args, preset, dataset)
    limit_waits(FIRST_STEPS_SECONDS if engine.first_steps else 0.0)
    finished = loop.run(stop_at=args.stop_at)
    for batches in (training, *evaluation.values()):
        batches.close()
    engine.close()
    return 0 if finished else EXIT_STOPPED


def prepare(args: argparse.Namespace) -> Path:
    """The folder of the prepared dataset; the first process of each host prepares it, the others wait.

    Raises:
        DatasetError: a folder of the person's own that holds neither a dataset nor a tree, and no word on what to put there.
    """
    from common.errors import DatasetError
    from image_data.dataset import DEFAULT, Dataset
    from image_data.preparation.prepare import prepare as prepare_dataset

    folder = Path(args.data_dir or DATA / (args.dataset or DEFAULT))
    if not Dataset.is_prepared(folder):
        if args.data_dir and not (args.archive or args.dataset or (folder / "train").is_dir()):
            raise DatasetError(f"--data-dir {folder} holds neither a prepared dataset nor images in train/<class>/; check the path, "
                               "or say with --archive FILE or --dataset NAME what to put there")
        prepare_dataset(folder, dataset=None if args.archive else args.dataset, archive=args.archive)
    return folder


def run() -> int:
    """`main` with the errors of the person's making as one line on the screen."""
    from common.errors import DatasetError

    try:
        return main()
    except (SettingsError, DatasetError, RunError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        elif not isinstance(error, SettingsError):  # every process refuses a setting; a file or a loss may fail in one alone
            print(f"error in process {rank}: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            print(f"error: --deterministic: {str(error).split(', ')[0].split('. ')[0]}; leave the flag out, or choose another part", file=sys.stderr)
            return 1
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        # The one that ended first says why; the traces of all the others would bury its sentence.
        print(f"process {os.environ.get('RANK', '0')} stops, because another process has ended", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
