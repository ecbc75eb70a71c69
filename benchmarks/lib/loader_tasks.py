"""What `input_pipeline.py` asks of the loaders of `loaders.py`: which there are, two jobs, and the size of a turn.

They stand apart from the loaders because these import PyTorch and torchvision, which `--help` does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OURS = ("resident", "files", "tensor")  # the sources of dali_pipeline.Batches
PEERS = ("imagefolder", "memory", "whole_batch", "ffcv")
OPTIONAL = (
    "ffcv_channels_last",
)  # where asked for only: cheaper, but not the same work, its images have their channels last in memory
PADDING = 4
JOBS = {
    "crop": f"crop {PADDING} + flip + normalise",
    "rand_augment": f"crop {PADDING} + flip + RandAugment(2, 9) + normalise",
}


class Unavailable(Exception):
    """A loader cannot run here, or cannot do this job; the message says why."""


@dataclass(frozen=True)
class Task:
    """What every loader is asked to do."""

    job: str
    batch_size: int
    num_batches: int  # an epoch
    threads: int  # or worker processes
    device: torch.device
