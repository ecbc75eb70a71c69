"""Training without torch.compile does not import torch._dynamo; once it is imported, PyTorch's own methods run."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common.paths import PROJECT

TRAIN = """
import sys
import torch
from optim import late_dynamo, optimizers

start = torch.nn.Linear(3, 3, bias=False).weight.detach().clone()


def trained(kind):
    model = torch.nn.Linear(3, 3, bias=False)
    model.weight.data.copy_(start)
    optimizer = kind(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    return model.weight.detach().clone()


kinds = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
before = [trained(kind) for kind in kinds]
assert "torch._dynamo" not in sys.modules
import torch._dynamo
calls = []
graph_break = torch._dynamo.graph_break
torch._dynamo.graph_break = lambda *words: calls.append(words) or graph_break(*words)
after = [trained(kind) for kind in kinds]
assert all(torch.equal(a, b) for a, b in zip(before, after))
assert len(calls) == 2 * 3 * len(kinds)  # PyTorch's own step breaks the graph before and after
for name in ("zero_grad", "state_dict", "load_state_dict", "add_param_group"):
    plain = getattr(torch.optim.Optimizer, name).__wrapped__
    assert getattr(plain, late_dynamo.MARK).__module__ != "optim.late_dynamo", name
print("same")
"""

PYTORCH_2_0 = """
import torch
from torch.optim import optimizer


def interrupting(step):
    def call(self):
        return step(self)

    return call


exclude = torch._disable_dynamo
del torch._disable_dynamo
optimizer._use_grad_for_differentiable = interrupting
from optim import late_dynamo
torch._disable_dynamo = exclude  # the rest of this PyTorch needs it


class Optimizer:
    step = interrupting(lambda self: "same")


late_dynamo.postpone_dynamo(Optimizer)
print(Optimizer().step())
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("program", [TRAIN, PYTORCH_2_0], ids=["this PyTorch", "2.0"])
def test_uncompiled_training_does_not_import_the_compiler_and_compiled_training_is_pytorchs(program):
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0 and done.stdout == "same\n", done.stderr
