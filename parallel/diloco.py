"""The outer step of DiLoCo (arXiv 2311.08105): SGD with Nesterov momentum on the mean change of the workers' weights.

    theta <- SGD(theta, theta - mean of the workers)

The caller computes the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class OuterStep:
    """The weights that all workers last agreed on, and the momentum of the outer optimizer.

    The formula is that of torch.optim.SGD, one multiplication or addition at a time. SGD's own kernels fuse them,
    differently on different CPUs, and peers on different machines must get the same bits.
    """

    def __init__(self, parameters: Mapping[str, Tensor], learning_rate: float, momentum: float):
        self.anchor = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.velocity = {name: torch.zeros_like(anchor) for name, anchor in self.anchor.items()}
        self.learning_rate, self.momentum = learning_rate, momentum

    @torch.no_grad()
    def step(self, means: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights from which every worker continues, given the mean of the workers' weights."""
        for anchor, velocity, mean in zip(self.anchor.values(), self.velocity.values(), means, strict=True):
            change = anchor - mean
            velocity.mul_(self.momentum).add_(change)
            anchor.sub_((velocity * self.momentum).add_(change).mul_(self.learning_rate))
        return list(self.anchor.values())

    def state(self) -> dict[str, Tensor]:
        """Return CPU tensors under `outer/anchor/<parameter>` and `outer/momentum/<parameter>`."""
        kinds = {"anchor": self.anchor, "momentum": self.velocity}
        return {
            f"outer/{kind}/{name}": value.to("cpu", copy=True)
            for kind, values in kinds.items()
            for name, value in values.items()
        }

    @torch.no_grad()
    def set_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`; states saved before the first outer step may lack the momentum."""
        for name, anchor in self.anchor.items():
            anchor.copy_(state[f"outer/anchor/{name}"])
            if f"outer/momentum/{name}" in state:
                self.velocity[name].copy_(state[f"outer/momentum/{name}"])
