"""bf16 weights beside fp32 masters, for strategies that have no such pair themselves (`bf16.enabled=masters`).

Under torch.autocast every layer casts its fp32 weights to bf16 in every forward pass, and the gradients back. Here a
copy of the network holds bf16 weights and computes. Its gradients go to the fp32 weights, which the optimizer updates,
and all of them return in one operation per step, as in mixed-precision training (arXiv 1710.03740, section 3.1).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from common.packages import check_torch
from parallel.buffers import normalize_in_fp32


class Bf16Copy:
    """A copy of a network that computes in bf16. It shares the network's buffers, which stay in fp32."""

    def __init__(self, masters: nn.Module):
        check_torch("bf16.enabled=masters", (2, 1))  # torch._foreach_copy_
        self.network = copy.deepcopy(masters)
        normalize_in_fp32(self.network)
        for own, shared in zip(self.network.modules(), masters.modules(), strict=True):
            own._buffers.update(shared._buffers)
        pairs = list(zip(self.network.parameters(), masters.parameters(), strict=True))
        for weight, _ in pairs:
            weight.data = weight.data.bfloat16()
        self._weights: list[Tensor] = [weight for weight, _ in pairs]
        self._masters: list[Tensor] = [master for _, master in pairs]

    @torch.no_grad()
    def hand_over_gradients(self) -> None:
        """Move the gradients to the masters, in fp32."""
        gradients: list[Tensor] = []
        received: list[Tensor] = []
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is not None:
                master.grad = torch.empty_like(master)
                gradients.append(weight.grad)
                received.append(master.grad)
                weight.grad = None
        if gradients:
            torch._foreach_copy_(received, gradients)

    @torch.no_grad()
    def take_weights(self) -> None:
        """Copy the masters to the weights, rounded."""
        torch._foreach_copy_(self._weights, self._masters)
