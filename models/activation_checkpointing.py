"""Activation checkpointing (arXiv 1604.06174): a block keeps its input only and recomputes the rest for its gradient.

The gradient has the same bits. The recomputation draws the same dropout masks, because PyTorch restores the random
state, and it leaves BatchNorm's running statistics as the forward pass left them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import SettingsError
from common.packages import check_torch

MIN_LAYERS = 3  # input, at least one block, output


def checkpoint_blocks(layers: list[nn.Module], architecture: str) -> None:
    """Checkpoint every layer of a network but the first and the last.

    Raises:
        SettingsError: the network is not a list of blocks, or PyTorch is too old.
    """
    if len(layers) < MIN_LAYERS:
        raise SettingsError(
            f"model.checkpoint_blocks=true needs a network with a list of blocks, which "
            f"model.architecture={architecture} is not; set it to false"
        )
    check_torch("model.checkpoint_blocks=true", (2, 1))  # torch.compiler
    for layer in layers[1:-1]:
        checkpoint_layer(layer)


def checkpoint_layer(layer: nn.Module) -> None:
    """Recompute the activations of a layer, one tensor to one tensor, in its backward pass.

    The class of the layer changes, not its modules, so parameters and buffers keep their names. A class also works
    where a strategy copies modules (DataParallel), unlike a replaced `forward` of one object.
    """
    layer.__class__ = _checkpointed(type(layer))  # type: ignore[arg-type]  # a class is hashable


@cache
def _checkpointed(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass with the same name whose forward pass is checkpointed in training."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return kind.forward(self, x)
        options: dict[str, Any] = {"use_reentrant": False}
        # A compiled forward pass updates its buffers once, whatever it recomputes.
        if not torch.compiler.is_compiling() and next(self.buffers(), None) is not None:
            options["context_fn"] = partial(_contexts, self)
        return checkpoint(partial(kind.forward, self), x, **options)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__})


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the forward pass and of its recomputation."""
    return nullcontext(), _unchanged_buffers(layer)


@contextmanager
def _unchanged_buffers(layer: nn.Module) -> Iterator[None]:
    """Undo changes of the layer's buffers, such as BatchNorm's running statistics."""
    kept = [(buffer, buffer.clone()) for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)  # by `data`: a constant table must not count as changed in place
