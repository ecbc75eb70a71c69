"""How many processes train on this machine's processor: `main` prints the number and why, for the launcher.

Two processes with half of the cores each were 1.17 times as fast as one with both of two cores: they wait for one
another once a step, not in every layer. That is taken where the strategy gives the same training in either number and
the batch can be halved. NUM_PROCS decides otherwise; nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import os

from common.errors import SettingsError
from config.settings import Settings, resolve
from training.arguments import parse_arguments

SAME_IN_ANY_NUMBER = ("zero", "ddp")  # with the other strategies the number is part of the question


def choose(settings: Settings, num_cores: int) -> tuple[int, str]:
    """The number of processes, and a word on why for the screen."""
    batch, parts = settings.engine["train_batch_size"], 2 * settings.engine["gradient_accumulation_steps"]
    refusals = {
        "there is one core": num_cores < 2,
        f"{num_cores} cores are not two equal halves": num_cores % 2,
        f"strategy {settings.strategy} takes as many as NUM_PROCS says": settings.strategy not in SAME_IN_ANY_NUMBER,
        f"a batch of {batch} is not two equal halves": batch % parts,
    }
    for reason, holds in refusals.items():
        if holds:
            return 1, f"one process, because {reason}"
    return 2, f"two processes with half of the {num_cores} cores each, which is faster than one with all"


def main() -> None:
    """Print the number and the reason; mistyped arguments are for train.py to refuse."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            args = parse_arguments()
            if args.micro_batch or args.host_peers or args.join:
                number, reason = 1, "one process, because an option of this run is about one"
            else:
                settings = resolve(args.preset or "cpu", args.set, strategy=args.strategy)
                number, reason = choose(settings, len(os.sched_getaffinity(0)))
        except (SettingsError, SystemExit):
            number, reason = 1, "one process"
    print(number, reason)
