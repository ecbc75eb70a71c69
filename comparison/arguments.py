"""The command line of compare.py."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from common.errors import EXIT_STOPPED
from common.paths import RESULTS, RUNS
from comparison.tracker_options import add_tracker_options
from config.command_line import Parser, at_least_one


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python compare.py experiment",
        "Compare architectures: run every variant of an experiment with several seeds, and report the differences.",
        example="python compare.py experiments/eight-ideas.toml --size small --dry-run",
        notes="exit code: 0 all runs are in the report, 1 some are missing (each is named), "
        f"{EXIT_STOPPED} stopped and saved: start the same command again to resume",
    )
    parser.add_argument("experiment", type=Path, help="experiment file, such as experiments/pairs.toml")
    asked = parser.add_argument_group("experiment")
    asked.add_argument(
        "--size",
        help="size defined in the file, such as small or full (default: small if the file has it, else the file "
        "without a size)",
    )
    asked.add_argument(
        "--seeds",
        type=at_least_one,
        metavar="N",
        help='number of seeds, with until = "decided" per round; existing runs are reused (default: the number in the '
        "file)",
    )
    asked.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="setting to override in all variants; repeat for more",
    )
    asked.add_argument(
        "--final", action="store_true", help="also report the test split; use it once, after all choices are made"
    )
    what = parser.add_argument_group("runs")
    what.add_argument("--dry-run", "--plan", action="store_true", help="print the plan and run nothing")
    what.add_argument("--report-only", action="store_true", help="report on the existing runs and run nothing")
    what.add_argument(
        "--redo-changed",
        action="store_true",
        help="rename existing runs of other settings or other source code aside, and run them again",
    )
    what.add_argument(
        "--parallel",
        type=at_once,
        metavar="N",
        help="number of runs at once, or auto: measure 1, 2 and 4 and keep the fastest (default: one per GPU; one on "
        "the CPU, with all its cores)",
    )
    what.add_argument(
        "--cold",
        action="store_true",
        help="start each run in a new Python process, through the launcher (default: fork the runs from one process "
        "that has imported PyTorch)",
    )
    what.add_argument(
        "--shard",
        type=one_of_many,
        metavar="I/N",
        help="make shard I of N of the runs, for machines that share a disk (default: all)",
    )
    where = parser.add_argument_group("folders")
    where.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder of the prepared dataset, or an image tree {train,test}/<class>/*.png, which is prepared in place "
        "(default: data/<dataset>)",
    )
    where.add_argument(
        "--runs-dir", type=Path, default=RUNS, metavar="DIR", help="folder for run folders (default: runs)"
    )
    where.add_argument(
        "--results-dir", type=Path, default=RESULTS, metavar="DIR", help="folder for reports (default: results)"
    )
    add_tracker_options(parser)
    args = parser.parse_args()
    if args.shard and args.report_only:
        parser.error("--report-only reports on all runs; leave out --shard")
    if args.dry_run and args.report_only:
        parser.error("--dry-run and --report-only exclude each other; give one of them")
    return args


def at_once(text: str) -> int | str:
    """A number of runs, or "auto"."""
    if text == "auto":
        return text
    try:
        return at_least_one(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, or auto, not {text}") from None


def one_of_many(text: str) -> tuple[int, int]:
    """Parse a shard: `2/4` -> (2, 4)."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 2/4, not '{text}'")
    return int(found[1]), int(found[2])
