"""Exponential moving average (EMA) of the weights, which evaluation and the saved weights use where `ema.decay` is set.

It averages the tensors that the optimizer updates in this process, full or sharded, so nothing is gathered for it.
BatchNorm's running statistics (all floating-point buffers of the state) are averaged with the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from config.settings import EmaSettings
from optim.optimizers import averaged_weights
from parallel.buffers import persistent_buffers


class WeightAverage:
    """EMA in fp32 of `tensors`, in their order."""

    def __init__(self, settings: EmaSettings, tensors: Sequence[Tensor]):
        """Start from the tensors as they are."""
        self.settings, self.tensors = settings, list(tensors)
        self.values = [tensor.detach().to(torch.float32, copy=True) for tensor in tensors]

    def decay(self, step: int) -> float:
        """Return the decay of this update, after `step` earlier ones.

        The warmup is that of TensorFlow's ExponentialMovingAverage. Without it, the random initialization would stay
        in the average for 1 / (1 - decay) steps.
        """
        return min(self.settings.decay, (1 + step) / (10 + step)) if self.settings.warmup else self.settings.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after `step` + 1 optimizer steps."""
        current = [local(tensor.detach()).to(torch.float32) for tensor in self.tensors]
        torch._foreach_lerp_([local(average) for average in self.values], current, 1 - self.decay(step))

    @torch.no_grad()
    def restart(self) -> None:
        """Restart from the present weights, for a state without an average."""
        for average, tensor in zip(self.values, self.tensors, strict=True):
            average.copy_(tensor)


class WeightAveraging:
    """The part of an engine that keeps the EMA, and swaps it in for evaluation.

    The engine provides `master_weights`, `network`, `sync_from_masters` and `step`.
    """

    ema: WeightAverage | None = None
    step: int

    if TYPE_CHECKING:

        def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]: ...

        def network(self) -> nn.Module: ...

        def sync_from_masters(self) -> None: ...

    def start_average(self, settings: EmaSettings) -> None:
        """Start the EMA once network and optimizer exist."""
        if settings.decay:
            self.ema = WeightAverage(settings, self._averaged_tensors())

    def end_step(self) -> None:
        """Update the EMA after the optimizer step that was just counted."""
        if self.ema is not None:
            self.ema.update(self.step - 1)

    def _averaged_tensors(self) -> list[Tensor]:
        return [
            *self.master_weights()[1],
            *(buffer for buffer in persistent_buffers(self.network()).values() if buffer.is_floating_point()),
        ]

    @contextmanager
    def evaluation_weights(self, raw: bool = False) -> Iterator[None]:
        """Swap the average in for the trained weights, which are restored bit for bit afterwards. Collective."""
        tensors = self._averaged_tensors()
        average = None if raw else self.ema.values if self.ema is not None else averaged_weights(*self.master_weights())
        if average is None:
            yield
            return
        own = [tensor.detach().clone() for tensor in tensors]
        self._swap_in(tensors, average)
        try:
            yield
        finally:
            self._swap_in(tensors, own)

    @torch.no_grad()
    def _swap_in(self, tensors: list[Tensor], values: list[Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=False):  # an optimizer's own average has no buffers
            tensor.copy_(value)
        self.sync_from_masters()


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a distributed tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
