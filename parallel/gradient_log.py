"""Gradient norms and update/weight ratios of a step, for the whole network and by layer (`train.py --log-gradients`).

A gradient norm is that before clipping. An update/weight ratio is the norm of a step's change of the weights, divided
by the norm of the weights before it. A measured step keeps a copy of the weights in fp32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor, nn

GRADIENT, UPDATE = "gradient_norm", "update_ratio"


def layer_names(network: nn.Module) -> dict[str, str]:
    """Return the layer of every trainable parameter: `3_Block` for "3.attention.part.qkv.weight".

    A layer is an entry of the network's list. Where a library's network is the only entry, it is the part of the path
    up to the first number, as in `0.network.blocks.3_Block`, or its first three names.
    """
    is_list = len(list(network.children())) > 1
    names = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            path = name.split(".")[:-1]
            number = next((i for i, part in enumerate(path[1:], 1) if part.isdigit()), 2)
            layer = ".".join(path[:1] if is_list else path[: number + 1])
            kind = type(network.get_submodule(layer)).__name__.removeprefix("FSDP")  # of fully_shard's subclass
            names[name] = f"{layer}_{kind}"
    return names


class GradientLog:
    """Measures one step at a time. All methods are collective where `gradient`, `weight` or `whole` are."""

    def __init__(
        self,
        network: nn.Module,
        gradient: Callable[[Tensor], Tensor | None] = lambda parameter: parameter.grad,
        weight: Callable[[Tensor], Tensor] = lambda parameter: parameter.detach().float().clone(),
        whole: Callable[[Tensor], Tensor] = lambda norm: norm,
    ):
        """Prepare for the parameters of a network.

        Args:
            gradient: returns the gradient of a parameter, or None where it has none.
            weight: returns a copy of a parameter in fp32.
            whole: returns the norm of a possibly sharded tensor from the norm that PyTorch computes.
        """
        self.gradient, self.weight, self.whole = gradient, weight, whole
        self.layers: dict[str, list[Tensor]] = defaultdict(list)
        names, parameters = layer_names(network), dict(network.named_parameters())
        for name, layer in names.items():
            self.layers[layer].append(parameters[name])
        self._before: dict[str, list[Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_update(self) -> None:
        """Measure the gradients, and keep the weights."""
        found = {layer: [self.gradient(p) for p in members] for layer, members in self.layers.items()}
        self._gradients = {layer: self._norm([g for g in some if g is not None]) for layer, some in found.items()}
        self._before = {layer: [self.weight(p) for p in members] for layer, members in self.layers.items()}

    @torch.no_grad()
    def after_update(self) -> dict[str, Tensor]:
        """Return the norms and ratios of the step by name, on the device: `gradient_norm/3_Block`."""
        weights = {layer: self._norm(before) for layer, before in self._before.items()}
        updates = {
            layer: self._norm([self.weight(p) - old for p, old in zip(members, self._before[layer], strict=True)])
            for layer, members in self.layers.items()
        }
        self._before = {}
        values = {GRADIENT: _joint(self._gradients), UPDATE: _joint(updates) / _joint(weights)}
        values |= {f"{GRADIENT}/{layer}": norm for layer, norm in self._gradients.items()}
        return values | {f"{UPDATE}/{layer}": updates[layer] / weights[layer] for layer in updates}

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        if not tensors:  # the step did not use the layer
            return torch.zeros((), device=next(iter(self.layers.values()))[0].device)
        return self.whole(nn.utils.get_total_norm(tensors)).float()


def _joint(norms: dict[str, Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms.values())))
