"""The flags of train.py as the values that a run's parts need."""

from __future__ import annotations

import argparse

from training.resume import FolderOptions
from training.run_facts import RunOptions
from training.run_start import LoggingOptions


def run_options(args: argparse.Namespace, preset: str) -> RunOptions:
    """What run.json records of the flags; `preset` is the one that was chosen where none was given."""
    return RunOptions(
        preset,
        args.seed,
        args.max_steps,
        args.hold_out,
        args.patience,
        args.init_weights.name if args.init_weights else None,
        args.synthetic,
        args.deterministic,
    )


def folder_options(args: argparse.Namespace) -> FolderOptions:
    """Where the run writes."""
    return FolderOptions(args.runs_dir, args.name, args.fresh, args.keep_checkpoints, args.allow_inexact_resume)


def logging_options(args: argparse.Namespace) -> LoggingOptions:
    """When the run saves and who is told of it."""
    return LoggingOptions(args.checkpoint_every, args.tensorboard, args.wandb)
