"""Number of training processes on this machine's CPU: `main` prints it and the reason, for the launcher.

Two processes with half of the cores each were 1.17 times as fast as one process with two cores: they wait for one
another once per step instead of in every layer. Two are used where the strategy trains the same with either number and
the batch can be halved. The exception is BatchNorm, which the presets for CPUs have: each process normalizes its own
half of the batch. NUM_PROCS overrides the choice. Nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import os

from common.errors import SettingsError
from config.settings import Settings, resolve
from training.arguments import parse_arguments

SAME_IN_ANY_NUMBER = ("zero", "ddp")  # with the other strategies the number of processes changes the training


def choose(settings: Settings, num_cores: int) -> tuple[int, str]:
    """Return the number of processes, and the reason for the screen."""
    batch, parts = settings.engine["train_batch_size"], 2 * settings.engine["gradient_accumulation_steps"]
    refusals = {
        "there is one core": num_cores < 2,
        f"{num_cores} cores cannot be divided into two equal halves": num_cores % 2,
        f"strategy {settings.strategy} uses as many processes as NUM_PROCS says": (
            settings.strategy not in SAME_IN_ANY_NUMBER
        ),
        f"a batch of {batch} cannot be divided into two equal halves": batch % parts,
    }
    for reason, holds in refusals.items():
        if holds:
            return 1, f"one process, because {reason}"
    return 2, f"two processes with half of the {num_cores} cores each, which is faster than one process with all"


def main() -> None:
    """Print the number and the reason; train.py itself rejects mistyped arguments."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            args = parse_arguments()
            if args.micro_batch or args.host_peers or args.join:
                number, reason = 1, "one process, because an option of this run applies to one process"
            else:
                settings = resolve(args.preset or "cpu", args.set, strategy=args.strategy)
                number, reason = choose(settings, len(os.sched_getaffinity(0)))
        except (SettingsError, SystemExit):
            number, reason = 1, "one process"
    print(number, reason)
