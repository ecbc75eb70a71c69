"""AccumAdam: Adam for small per-worker batches (arXiv 2410.11998, appendix C).

A decentralized worker sees only its own images. Its gradients are noisy, and Adam's second moment then consists mostly
of noise. AccumAdam updates the moments once per window of `window` steps, by the mean gradient of the window. It still
makes a step for every gradient, from the moments of the finished windows and the current gradient. A window of 1 is
Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AccumAdam(torch.optim.Optimizer):
    """Adam, or AdamW if `decoupled`, whose moments are updated by the mean gradient of `window` steps.

    The printed algorithm decays the stored second moment by beta1; this uses beta2, as the authors' implementation
    does. Epsilon is added outside the square root, and the bias correction counts windows.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        window: int,
        decoupled: bool,
    ):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        super().__init__(
            params,
            dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, window=window, decoupled=decoupled),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without the overload for a closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, x: Tensor, group: dict[str, Any]) -> None:
        state = self.state[x]
        if not state:
            state["step"] = torch.zeros(())
            for key in ("exp_avg", "exp_avg_sq", "window_sum"):
                state[key] = torch.zeros_like(x)
        (beta1, beta2), window = group["betas"], group["window"]
        state["step"] += 1
        step = int(state["step"])
        gradient = x.grad
        assert gradient is not None  # `step` checks it
        if group["decoupled"]:
            x.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            gradient = gradient.add(x, alpha=group["weight_decay"])
        state["window_sum"] += gradient
        # The moments if the current gradient were the mean of the window.
        mean = state["exp_avg"].lerp(gradient, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        begun = -(-step // window)  # windows begun
        square = (square / (1 - beta2**begun)).sqrt_().add_(group["eps"])
        x.addcdiv_(mean, square, value=-group["lr"] / (1 - beta1**begun))
        if step % window == 0:
            mean_gradient = state["window_sum"] / window
            state["exp_avg"].lerp_(mean_gradient, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(mean_gradient, mean_gradient, value=1 - beta2)
            state["window_sum"].zero_()
