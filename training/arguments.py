"""The command line of train.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EXIT_STOPPED, SettingsError
from common.paths import RUNS
from config.catalog import SOURCES, table_names
from config.command_line import Parser, above_zero, at_least_one, fraction, run_name
from config.overrides import sets
from config.settings import preset_names
from training.argument_types import evaluation_interval, interval, micro_batch, seed
from training.console import NORMAL, QUIET, VERBOSE

if TYPE_CHECKING:
    from training.resume import FolderOptions
    from training.run_facts import RunOptions
    from training.run_start import LoggingOptions

MLFLOW_EXPERIMENT = "vision-transformers"


def parse_arguments() -> argparse.Namespace:
    """Parse and check the arguments of train.py.

    Raises:
        SettingsError: options that do not fit together.
    """

    def listed(file: str, table: str) -> str:
        return "\n".join(f"  {name:12} {doc}" for name, doc in table_names(file, table).items())

    parser = Parser(
        "python train.py",
        "Train a network on a folder of images, one subfolder per class. Starting the same run again resumes it.",
        example="python train.py --preset cpu --epochs 2 --set model.feed_forward=geglu --set optimizer.params.lr=5e-4",
        notes=f"strategies (--strategy NAME):\n{listed('parallel/strategies.py', 'STRATEGIES')}\n\n"
        "feed-forward modules (--set "
        f"model.feed_forward=NAME):\n{listed('models/feed_forward.py', 'FEED_FORWARDS')}\n\n"
        "every component registry: python model.py\n"
        "a component of your own file: --set model.feed_forward=FILE.py:NAME (docs/own-parts.md)\n"
        "every setting with its default and unit: python train.py --list-settings",
    )
    _add_data_options(parser)
    _add_network_options(parser)
    _add_peer_options(parser)
    _add_run_options(parser)
    _add_safety_options(parser)
    _add_logging_options(parser)
    args = parser.parse_args()
    if args.patience and not args.hold_out:
        raise SettingsError("--patience needs a validation split: add --hold-out 0.1")
    _check_time_budget(args)
    args.only_shortens = bool(args.max_minutes and (args.epochs or args.max_steps or sets("epochs", args.set)))
    if args.step_seconds and not args.link_gbps:
        raise SettingsError("--step-seconds needs the speed of the link: add --link-gbps 0.05")
    return args


def options_of(args: argparse.Namespace, preset: str) -> tuple[RunOptions, FolderOptions, LoggingOptions]:
    """Return what a run records of its arguments, where its folder is, and what it logs."""
    from models.pretrained import recorded_name
    from training.resume import FolderOptions
    from training.run_facts import RunOptions
    from training.run_start import LoggingOptions

    return (
        RunOptions(
            preset=preset,
            seed=args.seed,
            max_steps=args.max_steps,
            hold_out=args.hold_out,
            patience=args.patience,
            init_weights=args.init_weights and recorded_name(args.init_weights),
            synthetic=args.synthetic,
            deterministic=args.deterministic,
            evaluate_every=str(args.evaluate_every),
            max_minutes=args.max_minutes,
            only_shortens=args.only_shortens,
        ),
        FolderOptions(args.runs_dir, args.name, args.fresh, args.keep_checkpoints, args.allow_inexact_resume),
        LoggingOptions(
            checkpoint_every=args.checkpoint_every,
            tensorboard=args.tensorboard,
            wandb=args.wandb,
            report=args.report,
            mlflow=args.mlflow,
            group=args.group,
            profile=args.profile,
        ),
    )


def _check_time_budget(args: argparse.Namespace) -> None:
    """Raise SettingsError for options that do not fit --max-minutes."""
    if args.max_minutes and args.profile:
        raise SettingsError("--profile slows down the steps that --max-minutes times: leave out one of them")
    if args.max_minutes and (args.host_peers or args.join):
        raise SettingsError("--max-minutes cannot plan for peers, which need the same number of steps: use --max-steps")


def _add_data_options(parser: Parser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=["cifar100", "cifar10", "shapes"],
        help="dataset to prepare and train on (default: cifar100)",
    )
    data.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the prepared dataset, or an image tree {train,test}/<class>/*.png, which is prepared in place "
        "(default: data/<dataset>)",
    )
    data.add_argument(
        "--archive", type=Path, metavar="FILE", help="prepare the dataset from this zip or tar (default: download)"
    )
    data.add_argument(
        "--skip-broken",
        action="store_true",
        help="skip images that cannot be decoded when the dataset is prepared (default: stop with an error)",
    )
    data.add_argument(
        "--hold-out",
        type=fraction,
        metavar="FRACTION",
        help="hold out this fraction of each training class, for example 0.1, as a validation split (default: none)",
    )
    data.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="image source: resident (packed pixels through DALI), files (image files through DALI) or tensor (packed "
        "pixels through PyTorch) (default: auto: packed pixels where there are any, through PyTorch on a CPU)",
    )
    data.add_argument(
        "--stage-to",
        type=Path,
        metavar="DIR",
        help="copy the dataset to this local disk first, once per host (default: read it in place)",
    )
    data.add_argument(
        "--synthetic",
        action="store_true",
        help="train on a fixed random batch (benchmarks compute without data loading)",
    )


def _add_network_options(parser: Parser) -> None:
    network = parser.add_argument_group("network and settings")
    network.add_argument(
        "--preset",
        metavar="NAME",
        help=f"preset that the settings start from: {', '.join(preset_names())}, or a .toml file "
        "(default: spt-lsa on a GPU, cpu or cpu-fp32 without one)",
    )
    network.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting; repeat for more"
    )
    network.add_argument(
        "--init-weights",
        metavar="SOURCE",
        help="load initial weights from a safetensors file or a plain state_dict, or from the Hugging Face Hub: "
        "timm:NAME or hf:OWNER/NAME (default: random initialization)",
    )
    network.add_argument(
        "--strategy",
        metavar="NAME",
        help="parallelism strategy: zero, ddp, fsdp, ... as listed below (default: the preset's, otherwise zero)",
    )
    network.add_argument(
        "--list-settings",
        action="store_true",
        help="print every setting that --set takes, with its value and description, and exit",
    )


def _add_peer_options(parser: Parser) -> None:
    peers = parser.add_argument_group("peers over a network, with --strategy local (docs/strategies.md)")
    peers.add_argument(
        "--host-peers",
        metavar="ADDRESS[:PORT]",
        help="start a run of peers, which others join at this address of this machine (default: no peers)",
    )
    peers.add_argument(
        "--join",
        metavar="ADDRESS[:PORT]",
        help="join a run of peers at an address that one of them printed (default: no peers)",
    )
    peers.add_argument(
        "--peer-address",
        metavar="ADDRESS",
        help="address to listen on after --join (default: the address from which this machine reaches the other)",
    )
    peers.add_argument(
        "--link-gbps",
        type=above_zero,
        metavar="X",
        help="print the estimated cost of an exchange over a link of X Gbit/s (default: no estimate)",
    )
    peers.add_argument(
        "--step-seconds",
        type=above_zero,
        metavar="S",
        help="with --link-gbps: seconds per optimizer step (default: unknown)",
    )


def _add_run_options(parser: Parser) -> None:
    run = parser.add_argument_group("budget and run")
    run.add_argument(
        "--epochs", type=at_least_one, metavar="N", help="passes over the training split (default: the preset's)"
    )
    run.add_argument(
        "--max-steps",
        type=at_least_one,
        metavar="N",
        help="stop after N optimizer steps; the LR schedule is scaled to N (default: all epochs)",
    )
    run.add_argument(
        "--evaluate-every",
        type=evaluation_interval,
        default="1epochs",
        metavar="N[epochs|steps]",
        help="interval of evaluations and of the lines of metrics.jsonl: 100steps, 2epochs, or 2 for epochs; the last "
        "step is always evaluated (default: every epoch)",
    )
    run.add_argument(
        "--evaluate-ema-only",
        action="store_true",
        help="with ema.decay: evaluate the EMA weights alone, not the raw weights too, in half the time",
    )
    run.add_argument(
        "--max-minutes",
        type=above_zero,
        metavar="M",
        help="train for M minutes, without compilation, evaluation and checkpoints; the number of steps is planned "
        "from the first ones, and the LR schedule is scaled to it; with --epochs or --max-steps: whichever is less "
        "(default: all epochs; without a GPU, a preset or another budget, at most 19 minutes)",
    )
    run.add_argument(
        "--patience",
        type=at_least_one,
        metavar="N",
        help="early stopping: stop after N epochs without improvement in validation accuracy; needs --hold-out "
        "(default: no early stopping)",
    )
    run.add_argument(
        "--stop-at",
        type=at_least_one,
        metavar="N",
        help=f"save and exit (exit code {EXIT_STOPPED}) after optimizer step N, to resume later (default: the "
        "last step)",
    )
    run.add_argument(
        "--seed",
        type=seed,
        default=0,
        metavar="N",
        help="random seed for initialization, data order and augmentation (default: 0)",
    )
    run.add_argument(
        "--name",
        type=run_name,
        help="name of the run folder runs/<name> (default: made from preset, dataset and seed; -2, -3, ... is appended "
        "where a finished or different run has that name)",
    )
    run.add_argument("--runs-dir", type=Path, default=RUNS, metavar="DIR", help="folder of all runs (default: runs)")
    run.add_argument(
        "--fresh", action="store_true", help="start over; an existing folder of that name is renamed, not deleted"
    )
    run.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the DeepSpeed launcher may add it


def _add_safety_options(parser: Parser) -> None:
    safety = parser.add_argument_group("memory, checkpoints and reproducibility")
    safety.add_argument(
        "--micro-batch",
        type=micro_batch,
        metavar="N",
        help="images per process and forward pass, or auto: as many as the GPU's memory allows; accumulation keeps the "
        "global batch size (default: the process's share of the global batch)",
    )
    safety.add_argument(
        "--checkpoint-every",
        type=interval,
        default="10min",
        metavar="INTERVAL",
        help="interval of checkpoints: 500steps, 10min or 30s within an epoch, and every epoch ends with one; or "
        "epochs:5, at the end of every fifth epoch alone (default: 10min)",
    )
    safety.add_argument(
        "--keep-checkpoints",
        type=at_least_one,
        default=2,
        metavar="K",
        help="number of newest checkpoints to keep, besides the one with the best validation accuracy (default: 2)",
    )
    safety.add_argument(
        "--allow-inexact-resume",
        action="store_true",
        help="resume although the device, the precision or a similar condition has changed (docs/resume.md)",
    )
    safety.add_argument(
        "--skip-bad-steps",
        action="store_true",
        help="skip, count and report steps whose loss or gradient is not finite; synchronizes the device every step",
    )
    safety.add_argument(
        "--deterministic", action="store_true", help="bitwise-reproducible GPU runs (uses slower deterministic kernels)"
    )


def _add_logging_options(parser: Parser) -> None:
    logging = parser.add_argument_group("logging")
    logging.add_argument(
        "--no-tensorboard",
        dest="tensorboard",
        action="store_false",
        help="write no TensorBoard files into the run folder",
    )
    logging.add_argument(
        "--no-report",
        dest="report",
        action="store_false",
        help="write no curves.png, no report.html and no index.html of all runs (python report.py writes them later)",
    )
    logging.add_argument(
        "--wandb",
        nargs="?",
        const="",
        metavar="PROJECT",
        help="also log to Weights & Biases (needs: pip install wandb; WANDB_MODE=offline keeps the data on this disk; "
        "default: off)",
    )
    logging.add_argument(
        "--mlflow",
        nargs="?",
        const=MLFLOW_EXPERIMENT,
        metavar="EXPERIMENT",
        help="also log to MLflow (needs: pip install mlflow), to the server of MLFLOW_TRACKING_URI or to mlflow.db "
        f"next to the run folder (default: off; the experiment's default: {MLFLOW_EXPERIMENT})",
    )
    logging.add_argument(
        "--group", metavar="NAME", help="group of the run at Weights & Biases and in MLflow (default: none)"
    )
    logging.add_argument(
        "--profile",
        type=at_least_one,
        metavar="N",
        help="profile N steps after the warmup: a trace for Perfetto, the most expensive operations and the memory, "
        "in runs/<name>/profile (default: off)",
    )
    logging.add_argument(
        "--log-gradients",
        action="store_true",
        help="log gradient norms and update/weight ratios of about 200 steps, for the whole network and by layer",
    )
    verbosity = logging.add_mutually_exclusive_group()
    verbosity.add_argument(
        "--quiet", dest="verbosity", action="store_const", const=QUIET, default=NORMAL, help="print the result only"
    )
    verbosity.add_argument(
        "--verbose",
        dest="verbosity",
        action="store_const",
        const=VERBOSE,
        help="print changed settings, more numbers of every epoch, and the messages of libraries",
    )
