"""The command line of train.py."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from common.errors import EXIT_STOPPED, SettingsError
from common.paths import RUNS
from config.catalog import SOURCES, table_names
from config.command_line import Parser, at_least_one
from config.settings import preset_names
from records.checkpoint_store import Interval
from training.console import NORMAL, QUIET, VERBOSE


def parse_arguments() -> argparse.Namespace:
    def listed(file: str, table: str) -> str:
        return "\n".join(f"  {name:12} {doc}" for name, doc in table_names(file, table).items())

    parser = Parser(
        "python train.py",
        "Train a network on a tree of class folders. Starting the same run again goes on where it stopped.",
        example="python train.py --preset cpu --epochs 2 --set model.feed_forward=geglu --set optimizer.params.lr=5e-4",
        notes=f"strategies (--strategy NAME):\n{listed('parallel/strategies.py', 'STRATEGIES')}\n\n"
        f"feed-forwards (--set model.feed_forward=NAME):\n{listed('models/feed_forward.py', 'FEED_FORWARDS')}\n\n"
        "every part that has a name: python model.py; every setting with its default and unit: python train.py --list-settings",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset", choices=["cifar100", "cifar10", "shapes"], help="what to prepare (default: cifar100)"
    )
    data.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of the prepared dataset (default: data/<dataset>)"
    )
    data.add_argument("--archive", type=Path, metavar="FILE", help="prepare from this zip or tar (default: download)")
    data.add_argument(
        "--hold-out",
        type=float,
        metavar="FRACTION",
        help="train without this part of each class, for example 0.1, and report accuracy on it (default: none)",
    )
    data.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="packed pixels through DALI, image files through DALI, or packed pixels through PyTorch "
        "(default: auto: packed pixels where there are any, through PyTorch on a CPU)",
    )
    data.add_argument(
        "--stage-to",
        type=Path,
        metavar="DIR",
        help="copy the dataset to this local disk first, once a host (default: read it where it is)",
    )
    data.add_argument(
        "--synthetic",
        action="store_true",
        help="train on one fixed batch of noise: the speed of everything but the data",
    )
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings to start from: {', '.join(preset_names())}, or a .toml file "
        "(default: cpu without a GPU, else spt-lsa)",
    )
    what.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting; repeat for more"
    )
    what.add_argument(
        "--init-weights",
        type=Path,
        metavar="FILE",
        help="start from these weights, safetensors or a plain state_dict (default: at random)",
    )
    what.add_argument(
        "--strategy", metavar="NAME", help="how processes share the work (default: the preset's, else zero)"
    )
    peers = parser.add_argument_group("peers over a network, with --strategy local (docs/strategies.md)")
    peers.add_argument(
        "--host-peers",
        metavar="ADDRESS[:PORT]",
        help="be the first, and let others join at this address of this machine (default: no peers)",
    )
    peers.add_argument(
        "--join",
        metavar="ADDRESS[:PORT]",
        help="join a run at an address that one of its peers printed (default: no peers)",
    )
    peers.add_argument(
        "--peer-address",
        metavar="ADDRESS",
        help="where to listen after --join (default: where this machine reaches the other from)",
    )
    peers.add_argument(
        "--link-gbps",
        type=above_zero,
        metavar="X",
        help="say beforehand what an exchange costs over a link of X Gbit/s (default: say nothing)",
    )
    peers.add_argument(
        "--step-seconds",
        type=above_zero,
        metavar="S",
        help="with --link-gbps: seconds that one step takes (default: unknown)",
    )
    budget = parser.add_argument_group("budget and run")
    budget.add_argument(
        "--epochs", type=at_least_one, metavar="N", help="passes over the training split (default: the preset's)"
    )
    budget.add_argument(
        "--max-steps",
        type=at_least_one,
        metavar="N",
        help="end after N optimiser steps, where the learning rate then ends its course (default: all epochs)",
    )
    budget.add_argument(
        "--patience",
        type=at_least_one,
        metavar="N",
        help="end when N epochs have brought no better accuracy on the held-out part; needs --hold-out (default: at the end)",
    )
    budget.add_argument(
        "--stop-at",
        type=at_least_one,
        metavar="N",
        help=f"save and leave (exit code {EXIT_STOPPED}) after optimiser step N, to go on later (default: at the end)",
    )
    budget.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the weights, the order and the augmentation (default: 0)"
    )
    budget.add_argument("--name", help="the run folder is runs/<name> (default: made of preset, dataset and seed)")
    budget.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="where run folders live (default: runs)"
    )
    budget.add_argument(
        "--fresh", action="store_true", help="start over; an existing folder of that name is renamed, not deleted"
    )
    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--micro-batch",
        type=micro_batch,
        metavar="N",
        help="images that a process takes at once, or auto: as many as its GPU has room for; the global batch stays, by accumulation "
        "(default: its share of the batch)",
    )
    safety.add_argument(
        "--checkpoint-every",
        type=interval,
        default="10min",
        metavar="INTERVAL",
        help="besides the end of every epoch: 500steps, 10min or 30s (default: 10min)",
    )
    safety.add_argument(
        "--keep-checkpoints",
        type=at_least_one,
        default=2,
        metavar="K",
        help="how many of the newest to keep, besides the best on a held-out part (default: 2)",
    )
    safety.add_argument(
        "--allow-inexact-resume",
        action="store_true",
        help="go on although the device, the precision or the like is another one than before (docs/resume.md)",
    )
    safety.add_argument(
        "--skip-bad-steps",
        action="store_true",
        help="leave out, count and report steps whose loss or gradient is not finite; waits for the device in every step",
    )
    safety.add_argument(
        "--deterministic", action="store_true", help="the same bits again on a GPU too, by slower kernels"
    )
    seen = parser.add_argument_group("what is seen of it")
    seen.add_argument(
        "--no-tensorboard",
        dest="tensorboard",
        action="store_false",
        help="write no TensorBoard files into the run folder",
    )
    seen.add_argument(
        "--wandb",
        nargs="?",
        const="",
        metavar="PROJECT",
        help="tell Weights & Biases too (needs: pip install wandb; WANDB_MODE=offline keeps it on this disk; default: no)",
    )
    how_much = seen.add_mutually_exclusive_group()
    how_much.add_argument(
        "--quiet", dest="verbosity", action="store_const", const=QUIET, default=NORMAL, help="print the result only"
    )
    how_much.add_argument(
        "--verbose",
        dest="verbosity",
        action="store_const",
        const=VERBOSE,
        help="print settings that are not the defaults, more of every epoch, and what libraries say",
    )
    what.add_argument(
        "--list-settings",
        action="store_true",
        help="print every setting that --set takes, with its value and meaning, and exit",
    )
    budget.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher may add it
    args = parser.parse_args()
    if args.patience and not args.hold_out:
        raise SettingsError(
            "--patience waits for a better accuracy on a held-out part, and there is none; give --hold-out 0.1"
        )
    return args


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
