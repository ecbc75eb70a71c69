"""Names, jobs and the request that `input_pipeline.py` passes to the loaders of `loaders.py`.

They are separate from the loaders because these import PyTorch and torchvision, which `--help` does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OURS = ("resident", "files", "tensor")  # the sources of dali_pipeline.Batches
BASELINES = ("imagefolder", "memory", "whole_batch", "ffcv")
# Only on request: cheaper, but a different job, because its images are channels last in memory.
OPTIONAL = ("ffcv_channels_last",)
PADDING = 4
JOBS = {
    "crop": f"crop {PADDING} + flip + normalize",
    "rand_augment": f"crop {PADDING} + flip + RandAugment(2, 9) + normalize",
}


class Unavailable(Exception):
    """A loader cannot run here, or cannot do this job; the message says why."""


@dataclass(frozen=True)
class Task:
    """The job of a loader."""

    job: str
    batch_size: int
    num_batches: int  # per epoch
    threads: int  # or worker processes
    device: torch.device
