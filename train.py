#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Train a network on a tree of class folders.

    ./launch_local_train.sh                                            one box: set-up, data, every GPU (or the CPU)
    python train.py --preset cpu --set model.feed_forward=geglu        one process, in a prepared environment

The run folder `runs/<name>/` keeps everything; starting the same run again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoint import Interval
from command_line import Parser, at_least_one
from run_record import RUNS, RunError
from screen import NORMAL, QUIET, VERBOSE, Screen, tell_all
from settings import Settings, SettingsError, preset_names, resolve, table_names

if TYPE_CHECKING:
    import torch

    from dataset import Dataset
    from loop import StopRequest
    from parallel import Engine
    from parallel.peers.meeting import Meeting

HERE = Path(__file__).resolve().parent
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "communicator was aborted")
EXIT_STOPPED = 75  # told to stop, and saved: start again to go on


def main() -> int:
    args = parse_arguments()  # before PyTorch is imported, so that --help and mistyped settings answer at once
    from dali_pipeline import side_of
    from dataset import Dataset
    from init_weights import load_initial_weights
    from loop import StopRequest
    from micro_batch import MicroBatch, OutOfMemory
    from model import build_model
    from parallel import engine_class
    from parallel.environment import make_deterministic, rank_environment
    from parallel.peers.start import meeting_of
    from parallel.precision import choose as choose_precision
    from parallel.processes import pick_device
    from staging import stage
    from trackers import check_trackers

    if args.patience and not args.hold_out:
        raise SettingsError("--patience waits for a better accuracy on a held-out part, and there is none; give --hold-out 0.1")
    stop = StopRequest()
    rank_environment()
    if args.deterministic:
        make_deterministic()
    screen = Screen(args.screen, is_main=os.environ.get("RANK", "0") == "0")
    preset, why = (args.preset, "") if args.preset else default_preset(pick_device())
    if why:
        screen.fact("preset", f"{preset}, because {why} (--preset NAME chooses another: {', '.join(preset_names())})")
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
    if line := choose_precision(settings.engine["bf16"]["enabled"], engine_type.no_autocast, pick_device())[1]:
        screen.fact("precision", line)
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
    from dataset import too_few
    from loop import Loop
    from parallel.compiling import FIRST_STEPS_SECONDS
    from parallel.environment import limit_waits
    from parallel.peers.link import lines_of_cost
    from schedule import Schedule

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


def default_preset(device: torch.device) -> tuple[str, str]:
    """What is trained where no preset is named, and why."""
    from parallel.precision import fast_bf16

    if device.type == "cuda":
        return "spt-lsa", "there is a GPU"
    if fast_bf16(device):
        return "cpu", "there is no GPU"
    return "cpu-fp32", "there is no GPU, and the processor is not faster in bf16"


def prepare(args: argparse.Namespace) -> Path:
    """The folder of the prepared dataset; the first process of each host prepares it, the others wait.

    Raises:
        DatasetError: a folder of the person's own that holds neither a dataset nor a tree, and no word on what to put there.
    """
    from dataset import DEFAULT, Dataset, DatasetError
    from prepare_dataset import prepare as prepare_dataset

    folder = Path(args.data_dir or HERE / "data" / (args.dataset or DEFAULT))
    if not Dataset.is_prepared(folder):
        if args.data_dir and not (args.archive or args.dataset or (folder / "train").is_dir()):
            raise DatasetError(f"--data-dir {folder} holds neither a prepared dataset nor images in train/<class>/; check the path, "
                               "or say with --archive FILE or --dataset NAME what to put there")
        prepare_dataset(folder, dataset=None if args.archive else args.dataset, archive=args.archive)
    return folder


def parse_arguments() -> argparse.Namespace:
    def listed(file: str, table: str) -> str:
        return "\n".join(f"  {name:12} {doc}" for name, doc in table_names(file, table).items())

    parser = Parser(
        "python train.py", "Train a network on a tree of class folders. Starting the same run again goes on where it stopped.",
        example="python train.py --preset cpu --epochs 2 --set model.feed_forward=geglu --set optimizer.params.lr=5e-4",
        notes=f"strategies (--strategy NAME):\n{listed('parallel/__init__.py', 'STRATEGIES')}\n\n"
              f"feed-forwards (--set model.feed_forward=NAME):\n{listed('feedforward.py', 'FEED_FORWARDS')}\n\n"
              "every part that has a name: python model.py; every setting with its default and unit: python settings.py",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=["cifar100", "cifar10", "shapes"], help="what to prepare (default: cifar100)")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of the prepared dataset (default: data/<dataset>)")
    data.add_argument("--archive", type=Path, metavar="FILE", help="prepare from this zip or tar (default: download)")
    data.add_argument("--hold-out", type=float, metavar="FRACTION",
                      help="train without this part of each class, for example 0.1, and report accuracy on it (default: none)")
    data.add_argument("--source", default="auto", choices=["auto", "resident", "files", "tensor"],
                      help="packed pixels through DALI, image files through DALI, or packed pixels through PyTorch "
                           "(default: auto: packed pixels where there are any, through PyTorch on a CPU)")
    data.add_argument("--stage-to", type=Path, metavar="DIR",
                      help="copy the dataset to this local disk first, once a host (default: read it where it is)")
    data.add_argument("--synthetic", action="store_true", help="train on one fixed batch of noise: the speed of everything but the data")
    what = parser.add_argument_group("what to train")
    what.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(preset_names())}, or a .toml file "
                                       "(default: cpu or cpu-fp32 without a GPU, else spt-lsa)")
    what.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting; repeat for more")
    what.add_argument("--init-weights", type=Path, metavar="FILE",
                      help="start from these weights, safetensors or a plain state_dict (default: at random)")
    what.add_argument("--strategy", metavar="NAME", help="how processes share the work (default: the preset's, else zero)")
    peers = parser.add_argument_group("peers over a network, with --strategy local (docs/strategies.md)")
    peers.add_argument("--host-peers", metavar="ADDRESS[:PORT]",
                       help="be the first, and let others join at this address of this machine (default: no peers)")
    peers.add_argument("--join", metavar="ADDRESS[:PORT]", help="join a run at an address that one of its peers printed (default: no peers)")
    peers.add_argument("--peer-address", metavar="ADDRESS", help="where to listen after --join (default: where this machine reaches the other from)")
    peers.add_argument("--link-gbps", type=above_zero, metavar="X",
                       help="say beforehand what an exchange costs over a link of X Gbit/s (default: say nothing)")
    peers.add_argument("--step-seconds", type=above_zero, metavar="S", help="with --link-gbps: seconds that one step takes (default: unknown)")
    budget = parser.add_argument_group("budget and run")
    budget.add_argument("--epochs", type=at_least_one, metavar="N", help="passes over the training split (default: the preset's)")
    budget.add_argument("--max-steps", type=at_least_one, metavar="N",
                        help="end after N optimiser steps, where the learning rate then ends its course (default: all epochs)")
    budget.add_argument("--patience", type=at_least_one, metavar="N",
                        help="end when N epochs have brought no better accuracy on the held-out part; needs --hold-out (default: at the end)")
    budget.add_argument("--stop-at", type=at_least_one, metavar="N",
                        help=f"save and leave (exit code {EXIT_STOPPED}) after optimiser step N, to go on later (default: at the end)")
    budget.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights, the order and the augmentation (default: 0)")
    budget.add_argument("--name", help="the run folder is runs/<name> (default: made of preset, dataset and seed)")
    budget.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where run folders live (default: runs)")
    budget.add_argument("--fresh", action="store_true", help="start over; an existing folder of that name is renamed, not deleted")
    safety = parser.add_argument_group("safety")
    safety.add_argument("--micro-batch", type=micro_batch, metavar="N",
                        help="images that a process takes at once, or auto: as many as its GPU has room for; the global batch stays, by accumulation "
                             "(default: its share of the batch)")
    safety.add_argument("--checkpoint-every", type=interval, default="10min", metavar="INTERVAL",
                        help="besides the end of every epoch: 500steps, 10min or 30s (default: 10min)")
    safety.add_argument("--keep-checkpoints", type=at_least_one, default=2, metavar="K",
                        help="how many of the newest to keep, besides the best on a held-out part (default: 2)")
    safety.add_argument("--allow-inexact-resume", action="store_true",
                        help="go on although the device, the precision or the like is another one than before (docs/resume.md)")
    safety.add_argument("--skip-bad-steps", action="store_true",
                        help="leave out, count and report steps whose loss or gradient is not finite; waits for the device in every step")
    safety.add_argument("--deterministic", action="store_true", help="the same bits again on a GPU too, by slower kernels")
    seen = parser.add_argument_group("what is seen of it")
    seen.add_argument("--no-tensorboard", dest="tensorboard", action="store_false", help="write no TensorBoard files into the run folder")
    seen.add_argument("--wandb", nargs="?", const="", metavar="PROJECT",
                      help="tell Weights & Biases too (needs: pip install wandb; WANDB_MODE=offline keeps it on this disk; default: no)")
    how_much = seen.add_mutually_exclusive_group()
    how_much.add_argument("--quiet", dest="screen", action="store_const", const=QUIET, default=NORMAL, help="print the result only")
    how_much.add_argument("--verbose", dest="screen", action="store_const", const=VERBOSE,
                          help="print settings that are not the defaults, more of every epoch, and what libraries say")
    budget.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher may add it
    return parser.parse_args()


def micro_batch(text: str) -> str:
    """A number of images, or "auto"."""
    return text if text == "auto" else str(at_least_one(text))


def interval(text: str) -> Interval:
    """How far apart checkpoints are."""
    try:
        return Interval.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def above_zero(text: str) -> float:
    """A rate or a time."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def run() -> int:
    """`main` with the errors of the person's making as one line on the screen."""
    from dataset import DatasetError

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
