"""Buffers of a model, such as BatchNorm's running statistics, and means of tensors over processes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of the state_dict, such as BatchNorm's running mean."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def mean_over(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Return the mean of each tensor over the processes of a group, in one message; bitwise equal everywhere.

    Collective.
    """
    flat = torch.cat([tensor.detach().to(dtype).flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def normalize_in_fp32(model: nn.Module) -> None:
    """Make every BatchNorm of a network with bf16 weights compute in fp32.

    Its running statistics stay in fp32, because bf16 would lose updates of a tenth of a batch's mean. PyTorch
    rejects a mixture of the two types.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = MethodType(_forward_in_fp32, module)  # type: ignore[method-assign]  # of this module only


def _forward_in_fp32(module: _BatchNorm, x: Tensor) -> Tensor:
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    floats: dict[str, Any] = {name: parameter.float() for name, parameter in own.items()}
    module._parameters.update(floats)
    try:
        return type(module).forward(module, x.float()).to(x.dtype)  # of the class, which may extend BatchNorm
    finally:
        module._parameters.update(own)


class BufferSnapshot:
    """Restores a model's buffers to their values before a step; BatchNorm updates them in the forward pass."""

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

    Each process normalizes by the statistics of its own images and updates its running mean and variance with them.
    Their mean over the processes is what one process would have, up to the variance between the shards' means. It is
    computed after every step, so that a resumed run has the same bits. A model without buffers costs nothing,
    one with BatchNorm a few kilobytes per step (DistributedDataParallel sends as much by default).
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None):
        self.group = group
        self.buffers = [buffer for buffer in persistent_buffers(model).values() if buffer.is_floating_point()]

    def average(self) -> None:
        """Replace the buffers by their mean over the processes. Collective."""
        if self.buffers and dist.get_world_size(self.group) > 1:
            # in float64 the mean of equal numbers is that number, so constant tables do not change
            for buffer, mean in zip(self.buffers, mean_over(self.buffers, self.group, torch.float64), strict=True):
                buffer.copy_(mean)
