"""One small real pass of a user-defined part on the CPU, which finds mistakes that shapes do not show.

A changed input and values that are not finite are errors. A parameter without a gradient and a dependence on the other
images of the batch are warnings, since a frozen layer, a tree or statistics of the batch may be meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from common.text import listed

LARGEST = 2e10  # parameters x positions of an image, which bound its multiply-adds: about a second on one core


def is_small(parameters: int, shape: tuple[int, ...]) -> bool:
    """Whether a part with inputs of `shape`, tokens (B, T, C) or images (B, 3, S, S), is fast enough for the pass."""
    positions = math.prod(shape[2:]) if len(shape) == 4 else shape[1]
    return parameters * positions <= LARGEST


def warnings_of(
    label: str, make: Callable[[], nn.Module], shape: tuple[int, ...], check: Callable[[nn.Module, Tensor], None]
) -> list[str]:
    """Run a new part with normally distributed inputs, in training and in evaluation mode; return its warnings.

    Args:
        label: begins every message.
        make: makes the part.
        shape: of the input, two images or more.
        check: raises SettingsError for a result of another shape or type.

    Raises:
        SettingsError: a wrong result, one that is not finite, or an input that is changed in place.
    """
    warnings = []
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        module, x = make(), torch.randn(shape)
        found = _forward(label, module, x, check)
        if names := _without_gradient(module, found):
            warnings.append(
                f"{label}: no gradient reaches the parameters {listed(names)}; "
                "use them in forward without detach() and no_grad(), or set requires_grad=False"
            )
        module.eval()
        others = x.clone()
        others[1:] *= -2
        with torch.no_grad():
            first, same = (_forward(label, module, batch, check)[0] for batch in (x, others))
        if not torch.allclose(first, same, rtol=1e-3, atol=1e-4):
            warnings.append(
                f"{label}: the result of an image depends on the other images of its batch in evaluation mode, "
                "so the accuracy depends on the batch size; compute each image by itself"
            )
    return warnings


def _forward(label: str, module: nn.Module, x: Tensor, check: Callable[[nn.Module, Tensor], None]) -> Tensor:
    torch.default_generator.manual_seed(0)  # equal noise in all passes, which is no dependence on the batch
    given = x.clone()
    found = module(given)
    check(module, found)
    if not given.equal(x):
        raise SettingsError(f"{label}: it changes its input in place; replace x.add_(1) or x += 1 by x = x + 1")
    if not found.isfinite().all():
        raise SettingsError(f"{label}: its result has NaN or infinite values for normally distributed inputs")
    return found


def _without_gradient(module: nn.Module, found: Tensor) -> list[str]:
    """Return the names of the trainable parameters on which a result does not depend."""
    trained: dict[str, Any] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trained or not found.requires_grad:
        return list(trained)
    gradients = torch.autograd.grad(found.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
