"""What the words behind the options of train.py may be. Each function raises ArgumentTypeError with the reason."""

from __future__ import annotations

import argparse

from config.command_line import at_least_one
from records.checkpoint_store import Interval

MAX_SEED = 2**63 - 1  # larger ones do not fit the generators of PyTorch and NumPy


def micro_batch(text: str) -> str:
    """A number of images, or "auto"."""
    return text if text == "auto" else str(at_least_one(text))


def interval(text: str) -> Interval:
    """The interval of checkpoints within an epoch, or of epochs."""
    try:
        return Interval.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def evaluation_interval(text: str) -> Interval:
    """The interval of evaluations."""
    try:
        return Interval.parse_evaluations(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seed(text: str) -> int:
    """A random seed from 0 to MAX_SEED."""
    if not (text.isascii() and text.isdecimal()) or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {MAX_SEED}, not {text}")
    return int(text)
