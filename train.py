"""Train a network on a tree of class folders.

    ./launch_local_train.sh                                            one box: set-up, data, every GPU (or the CPU)
    python train.py --preset cpu --set model.feed_forward=geglu        one process, in a prepared environment

The run folder `runs/<name>/` keeps everything; starting the same run again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from run_record import RUNS, RunError
from settings import SettingsError, preset_names, resolve, table_names

HERE = Path(__file__).resolve().parent
LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "communicator was aborted")
EXIT_STOPPED = 75  # told to stop, and saved: start again to go on


def main() -> int:
    args = parse_arguments()
    import torch  # after the arguments, so that --help and mistyped settings answer at once

    from dali_pipeline import Batches, Synthetic, side_of
    from dataset import Dataset
    from init_weights import load_initial_weights
    from loop import Loop, StopRequest
    from model import build_model
    from parallel import engine_class
    from parallel.environment import limit_waits, rank_environment
    from schedule import Schedule
    from staging import stage

    stop = StopRequest()
    rank_environment()
    preset = args.preset or ("spt-lsa" if torch.cuda.is_available() else "cpu")
    if not args.preset and os.environ.get("RANK", "0") == "0":
        print(f"preset    {preset}, because there is {'a' if torch.cuda.is_available() else 'no'} GPU (--preset NAME chooses another: "
              f"{', '.join(preset_names())})")
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
            if os.environ.get("RANK", "0") == "0":
                print(line)
        return model

    steps_per_epoch = len(dataset.splits["train"]) // settings.engine["train_batch_size"]
    total_steps = min(settings.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    engine = engine_class(settings.strategy)(build, settings, Schedule(settings.schedule, total_steps), args.seed)
    which, of_how_many = engine.data_shard
    source = dict(batch_size=engine.batch_sizes.micro, shard=which, num_shards=of_how_many, device=engine.device,
                  source=args.source, image_side=settings.image_side)
    training = Batches(dataset, "train", seed=args.seed, augmentation=settings.augmentation, **source)
    if args.synthetic:
        training = Synthetic(training)
    evaluation = {name: Batches(dataset, name, **source) for name in dataset.splits if name != "train"}

    loop = Loop(engine, settings, training, evaluation, steps_per_epoch, total_steps, stop)
    loop.open_run(args, preset, dataset)
    limit_waits()
    finished = loop.run(stop_at=args.stop_at)
    for batches in (training, *evaluation.values()):
        batches.close()
    engine.close()
    return 0 if finished else EXIT_STOPPED


def prepare(args: argparse.Namespace) -> Path:
    """The folder of the prepared dataset; the first process of each host prepares it, the others wait."""
    from dataset import Dataset
    from prepare_dataset import prepare as prepare_dataset

    folder = Path(args.data_dir or HERE / "data" / args.dataset)
    if not Dataset.is_prepared(folder):
        prepare_dataset(folder, dataset=None if args.archive else args.dataset, archive=args.archive)
    return folder


def parse_arguments() -> argparse.Namespace:
    def listed(file: str, table: str) -> str:
        return "\n".join(f"  {name:12} {doc}" for name, doc in table_names(file, table).items())

    parser = argparse.ArgumentParser(
        description="Train a network on a tree of class folders. Starting the same run again goes on where it stopped.",
        epilog=f"strategies (--strategy NAME):\n{listed('parallel/__init__.py', 'STRATEGIES')}\n\n"
               f"feed-forwards (--set model.feed_forward=NAME):\n{listed('feedforward.py', 'FEED_FORWARDS')}\n\n"
               "every part that has a name: python model.py\n\nexample:\n"
               "  python train.py --preset cpu --epochs 2 --set model.feed_forward=geglu --set optimizer.params.lr=5e-4",
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="cifar100", choices=["cifar100", "cifar10", "shapes"], help="what to prepare (default: cifar100)")
    data.add_argument("--data-dir", type=Path, help="folder of the prepared dataset (default: data/<dataset>)")
    data.add_argument("--archive", type=Path, help="prepare from this zip or tar.gz instead of the network")
    data.add_argument("--hold-out", type=float, metavar="FRACTION", help="train without this part of each class, and report accuracy on it")
    data.add_argument("--source", default="auto", choices=["auto", "resident", "files", "tensor"],
                      help="packed pixels through DALI, image files through DALI, or packed pixels through PyTorch "
                           "(default: auto: packed pixels where there are any, through PyTorch on a CPU)")
    data.add_argument("--stage-to", type=Path, metavar="DIR", help="copy the dataset to this local disk first, once a host")
    data.add_argument("--synthetic", action="store_true", help="train on one fixed batch of noise: the speed of everything but the data")
    what = parser.add_argument_group("what to train")
    what.add_argument("--preset", help=f"settings to start from: {', '.join(preset_names())}, or a .toml file "
                                       "(default: cpu without a GPU, else spt-lsa)")
    what.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting; repeat for more")
    what.add_argument("--init-weights", type=Path, metavar="FILE", help="start from these weights (safetensors, or a plain state_dict)")
    what.add_argument("--strategy", help="how processes share the work (default: zero)")
    budget = parser.add_argument_group("budget and run")
    budget.add_argument("--epochs", type=at_least_one, help="passes over the training split (default: the preset's)")
    budget.add_argument("--max-steps", type=at_least_one, metavar="N", help="end after N optimiser steps; the learning rate ends its course there")
    budget.add_argument("--stop-at", type=at_least_one, metavar="N",
                        help=f"save and leave (exit code {EXIT_STOPPED}) after optimiser step N, to go on later")
    budget.add_argument("--seed", type=int, default=0, help="of the weights, the order and the augmentation (default: 0)")
    budget.add_argument("--name", help="the run folder is runs/<name> (default: made of preset, dataset and seed)")
    budget.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where run folders live (default: runs)")
    budget.add_argument("--fresh", action="store_true", help="start over; an existing folder of that name is renamed, not deleted")
    budget.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher may add it
    return parser.parse_args()


def at_least_one(text: str) -> int:
    """A number of steps or epochs."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


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
        if not any(sign in str(error) for sign in LOST_PEER):
            raise
        # The one that ended first says why; the traces of all the others would bury its sentence.
        print(f"process {os.environ.get('RANK', '0')} stops, because another process has ended", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(run())
