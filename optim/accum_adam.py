"""AccumAdam: Adam for small batches a worker (arXiv 2410.11998, appendix C).

A decentralised worker sees only its own images, so its gradients are noisy, and Adam's second moment then holds mostly
noise. Here the moments move once in a window of `window` steps, by the mean gradient of the window; the step itself is
made every time, with the current gradient added to the moments of the finished windows. With a window of 1 this is Adam.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class AccumAdam(torch.optim.Optimizer):
    """Adam, or AdamW (`decoupled`), whose moments take in the mean gradient of `window` steps at a time.

    Where the algorithm as printed decays the stored second moment by beta1, this takes beta2, as the authors' own
    implementation does; epsilon stands outside the square root, and the bias correction counts windows.
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
            raise ValueError(f"a window of {window} steps")
        super().__init__(
            params,
            dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, window=window, decoupled=decoupled),
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
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
        if group["decoupled"]:
            x.mul_(1 - group["lr"] * group["weight_decay"])
        elif group["weight_decay"]:
            gradient = gradient.add(x, alpha=group["weight_decay"])
        state["window_sum"] += gradient
        # What the moments would be if the current gradient were the window's.
        mean = state["exp_avg"].lerp(gradient, 1 - beta1)
        square = (state["exp_avg_sq"] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        begun = -(-step // window)
        square = (square / (1 - beta2**begun)).sqrt_().add_(group["eps"])
        x.addcdiv_(mean, square, value=-group["lr"] / (1 - beta1**begun))
        if step % window == 0:
            whole = state["window_sum"] / window
            state["exp_avg"].lerp_(whole, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(whole, whole, value=1 - beta2)
            state["window_sum"].zero_()
