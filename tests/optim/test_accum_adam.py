"""optim/accum_adam.py and parallel/diloco.py against their papers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optim.accum_adam import AccumAdam
from parallel.diloco import OuterStep


def steps_of(make, gradients: Tensor) -> Tensor:
    x = nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer = make([x])
    for gradient in gradients:
        x.grad = gradient.clone()
        optimizer.step()
    return x.detach()


@pytest.mark.parametrize("decoupled", [True, False])
def test_accumadam_with_a_window_of_one_is_adam(decoupled):
    gradients = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    settings = dict(lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    plain = steps_of(lambda p: (torch.optim.AdamW if decoupled else torch.optim.Adam)(p, **settings), gradients)
    ours = steps_of(lambda p: AccumAdam(p, **settings, window=1, decoupled=decoupled), gradients)
    assert torch.allclose(plain, ours, atol=1e-6)


def test_accumadam_follows_its_algorithm():
    """Algorithm 4 of arXiv 2410.11998, appendix C, written out with numbers: a window of 3, 8 steps."""
    gradients = torch.randn(8, 5, generator=torch.Generator().manual_seed(1)).double()
    lr, b1, b2, eps, window = 0.01, 0.9, 0.99, 1e-8, 3
    x, m, v, g_sum = torch.linspace(-1, 1, 5).double(), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        g_sum = g_sum + g
        m_hat, v_hat = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        s = (t + window - 1) // window
        x = x - lr * (m_hat / (1 - b1**s)) / ((v_hat / (1 - b2**s)).sqrt() + eps)
        if t % window == 0:
            m, v, g_sum = b1 * m + (1 - b1) * g_sum / window, b2 * v + (1 - b2) * (g_sum / window) ** 2, 0.0
    ours = steps_of(
        lambda p: AccumAdam(p, lr=lr, betas=(b1, b2), eps=eps, weight_decay=0.0, window=window, decoupled=True),
        gradients.float(),
    )
    assert torch.allclose(ours.double(), x, atol=1e-6)


def test_the_outer_step_is_nesterovs():
    """DiLoCo: v <- 0.9 v + d, theta <- theta - 0.7 (d + 0.9 v), d is the negative mean progress of the workers."""
    start, means = torch.tensor([1.0, 2.0]), [torch.tensor([0.5, 2.5]), torch.tensor([0.2, 2.0])]
    outer = OuterStep({"w": start}, learning_rate=0.7, momentum=0.9)
    theta, v = start, torch.zeros(2)
    for i, mean in enumerate(means):
        d = theta - mean
        v = d if i == 0 else 0.9 * v + d
        theta = theta - 0.7 * (d + 0.9 * v)
        (now,) = outer.step([mean])
        assert torch.allclose(now, theta)
    again = OuterStep({"w": start}, learning_rate=0.7, momentum=0.9)
    again.set_state(outer.state())
    assert torch.equal(again.step([start])[0], outer.step([start])[0])
