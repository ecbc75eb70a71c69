"""benchmarks/step_parts.py: a part that fails is reported, and the others continue."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.step_parts import Bench, both_passes


def refuse(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this shape")


def test_a_function_that_fails_is_a_problem_of_its_own(capsys):
    """Already its first forward pass."""
    bench, x = Bench(None), torch.ones(3)
    bench.time("refused", both_passes(refuse, x))
    bench.time("good", both_passes(torch.square, x))
    assert bench.report["problems"] == {"refused": "RuntimeError: no kernel for this shape"}
    assert list(bench.report["ms"]) == ["good"]


@pytest.mark.parametrize("runs", [1, 3])
def test_each_run_is_one_forward_and_one_backward_pass(runs):
    passes = []

    def function(x: Tensor) -> Tensor:
        y = x.square()
        passes.append("forward")
        y.register_hook(lambda gradient: passes.append("backward"))
        return y

    run = both_passes(function, torch.ones(3))
    for _ in range(runs):
        run()
    assert passes == ["forward", "backward"] * runs
