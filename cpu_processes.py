"""How many processes train on this machine's processor: `python cpu_processes.py [arguments of train.py]` prints the number and why.

Two processes with half of the cores each train 1.1 to 1.2 times as fast as one with all of them, because they never wait for
one another within a layer. They do where the strategy gives the same training in either number and the batch can be halved. The
launcher asks when NUM_PROCS does not say; nothing here imports PyTorch.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys

from settings import Settings, SettingsError, resolve

SAME_IN_ANY_NUMBER = ("zero", "ddp")  # strategies that are meant for it on a CPU; with the others the number is part of the question


def choose(settings: Settings, num_cores: int) -> tuple[int, str]:
    """The number of processes, and a word on why for the screen."""
    parts = 2 * settings.engine["gradient_accumulation_steps"]
    refusals = {
        "there is one core": num_cores < 2,
        f"{num_cores} cores are not two equal halves": num_cores % 2,
        f"strategy {settings.strategy} is started with as many as NUM_PROCS says": settings.strategy not in SAME_IN_ANY_NUMBER,
        f"a batch of {settings.engine['train_batch_size']} is not two equal halves": settings.engine["train_batch_size"] % parts,
    }
    for reason, holds in refusals.items():
        if holds:
            return 1, f"one process, because {reason}"
    return 2, f"two processes with half of the {num_cores} cores each, which is faster than one with all"


def main() -> None:
    """Print the number and the reason; mistyped arguments are for train.py to refuse."""
    from train import parse_arguments

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


if __name__ == "__main__":
    sys.exit(main())
