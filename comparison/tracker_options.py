"""Options of compare.py that make its runs log to Weights & Biases or MLflow, grouped by variant."""

from __future__ import annotations

import argparse
from dataclasses import replace

from common.packages import require
from comparison.planned_run import PlannedRun
from config.command_line import Parser

TRACKERS = {"wandb": "Weights & Biases", "mlflow": "MLflow"}  # option and package -> name


def add_tracker_options(parser: Parser) -> None:
    """Add --wandb and --mlflow."""
    logging = parser.add_argument_group("logging")
    for package, name in TRACKERS.items():
        logging.add_argument(
            f"--{package}",
            nargs="?",
            const="",
            metavar="PROJECT",
            help=f"also log all runs to {name}, grouped by variant (needs: pip install {package}; default: off)",
        )


def tracker_words(args: argparse.Namespace, group: str) -> tuple[str, ...]:
    """Return the arguments of train.py that make a run log as the options ask, none without them.

    Raises:
        SettingsError: a package is not installed.
    """
    words: list[str] = []
    for package in TRACKERS:
        project = getattr(args, package)
        if project is None:
            continue
        require(package, f"--{package}")
        words += [f"--{package}", project] if project else [f"--{package}"]
    return (*words, "--group", group) if words else ()


def with_trackers(tasks: list[PlannedRun], args: argparse.Namespace, experiment: str) -> list[PlannedRun]:
    """Return the runs with the arguments of the trackers. The group of a run is <experiment>/<variant>."""
    return [
        replace(task, arguments=[*task.arguments, *tracker_words(args, f"{experiment}/{task.variant}")])
        for task in tasks
    ]
