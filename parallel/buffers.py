"""Averages over processes: of BatchNorm's running statistics after every step, and of whole models."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to the state_dict, such as BatchNorm's running mean."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def mean_over(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The mean of each tensor over the processes of a group, in one message; the same bits in all of them. Collective."""
    flat = torch.cat([tensor.detach().to(dtype).flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def normalise_in_fp32(model: nn.Module) -> None:
    """Let every BatchNorm compute in fp32 in a network whose weights are bf16.

    Its running statistics stay in fp32, where a tenth of a batch's mean is not lost, and PyTorch takes no mixture of the two.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = MethodType(_forward_in_fp32, module)


def _forward_in_fp32(module: _BatchNorm, x: Tensor) -> Tensor:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    module._parameters.update({name: parameter.float() for name, parameter in own.items()})
    try:
        return (
            type(module).forward(module, x.float()).to(x.dtype)
        )  # of the class: it may be one that does more than BatchNorm
    finally:
        module._parameters.update(own)


class BufferSnapshot:
    """Brings a model's buffers back to what they were before a step: BatchNorm notes its statistics in the forward pass."""

    def __init__(self, model: nn.Module):
        self.buffers = list(persistent_buffers(model).values())
        self.kept: list[Tensor] = []

    def keep(self) -> None:
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, before in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(before)


class SyncedBuffers:
    """Keeps a model's floating-point buffers equal in all processes that train it.

    Each process normalises by the statistics of its own images and notes them in its running mean and variance. Their
    average over the processes is what one process would have noted, up to the variance between the shards' means. It is
    taken after every step, so that a run that is stopped and resumed goes on with the same bits; a model without buffers
    pays nothing, one with BatchNorm a few kilobytes a step (DistributedDataParallel sends as much by default).
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None):
        self.group = group
        self.buffers = [buffer for buffer in persistent_buffers(model).values() if buffer.is_floating_point()]

    def average(self) -> None:
        """Collective."""
        if self.buffers and dist.get_world_size(self.group) > 1:
            # in float64 the mean of equal numbers is that number, so constant tables stay as they are
            for buffer, mean in zip(self.buffers, mean_over(self.buffers, self.group, torch.float64), strict=True):
                buffer.copy_(mean)
