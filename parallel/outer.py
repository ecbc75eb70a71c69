"""The outer step of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on how far the workers have come.

    theta <- SGD(theta, theta - mean of the workers)

Where the mean comes from is the caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class OuterStep:
    """The weights that all workers last agreed on, and the momentum of their common way."""

    def __init__(self, parameters: Mapping[str, Tensor], learning_rate: float, momentum: float):
        self.anchor = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.sgd = torch.optim.SGD(self.anchor.values(), lr=learning_rate, momentum=momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self, means: Sequence[Tensor]) -> list[Tensor]:
        """The weights that every worker goes on from, given the mean of the workers' weights."""
        for anchor, mean in zip(self.anchor.values(), means, strict=True):
            anchor.grad = anchor - mean
        self.sgd.step()
        self.sgd.zero_grad()
        return list(self.anchor.values())

    def state(self) -> dict[str, Tensor]:
        """CPU tensors under `outer/anchor/<parameter>` and `outer/momentum/<parameter>`."""
        state = {}
        for name, anchor in self.anchor.items():
            state[f"outer/anchor/{name}"] = anchor.to("cpu", copy=True)
            momentum = self.sgd.state.get(anchor, {}).get("momentum_buffer")
            if momentum is not None:  # none before the first outer step
                state[f"outer/momentum/{name}"] = momentum.to("cpu", copy=True)
        return state

    @torch.no_grad()
    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name, anchor in self.anchor.items():
            anchor.copy_(state[f"outer/anchor/{name}"])
            if f"outer/momentum/{name}" in state:
                self.sgd.state[anchor]["momentum_buffer"] = state[f"outer/momentum/{name}"].to(anchor.device, copy=True)
