"""PyTorch's DataParallel, the predecessor of DistributedDataParallel: one process, one thread per GPU of one machine.

The model is copied to every GPU in every step and the gradients are summed on the first one, which also keeps
BatchNorm's statistics, of its own share of the images only. It is a legacy baseline for the other strategies, so it
rejects machines where it would have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from parallel.torch_engine import TorchEngine


class InPrecision(nn.Module):
    """A network that enters autocast itself, because DataParallel's threads do not inherit it."""

    def __init__(self, network: nn.Module, precision: Callable[[], AbstractContextManager]):
        super().__init__()
        self.network, self.precision = network, precision

    def forward(self, images: Tensor) -> Tensor:
        with self.precision():
            return self.network(images)


class Engine(TorchEngine):
    """All GPUs of this machine in one process."""

    name = "dp"
    fits_one_device = False  # several GPUs share a micro-batch
    compile_refusal = "DataParallel copies the network to every GPU in every step"

    def __init__(self, *arguments, **keywords):
        num_gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
        if num_gpus < 2:
            raise SettingsError(
                "strategy dp divides a batch over the GPUs of one machine, and there "
                f"{'is 1' if num_gpus else 'are 0'} "
                "here; choose --strategy zero or ddp"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SettingsError(
                "strategy dp drives all GPUs from one process; start it without a launcher: python train.py "
                "--strategy dp"
            )
        self.num_gpus = num_gpus
        super().__init__(*arguments, **keywords)

    def wrap_model(self, model: nn.Module) -> nn.Module:
        return nn.DataParallel(InPrecision(model, self._precision), device_ids=list(range(self.num_gpus)))

    def prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().prepare_step(optimizer)
        for i, generator in enumerate(torch.cuda.default_generators[: self.num_gpus]):
            # PyTorch seeds all GPUs alike, but each one must draw its own dropout masks.
            generator.manual_seed((torch.initial_seed() + i) % 2**63)

    def describe(self) -> str:
        return f"{self.num_gpus} GPUs in one process, {super().describe()}"
