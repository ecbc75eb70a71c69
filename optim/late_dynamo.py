"""Keeps PyTorch from importing its compiler for runs that do not compile, which would take a second of every start.

PyTorch imports torch._dynamo in the first call of two kinds of methods: those that it excludes from compilation
(`torch._disable_dynamo`, such as Optimizer.zero_grad), and optimizer steps that compiled code would have to interrupt
(`_use_grad_for_differentiable`, such as Adam.step). As long as nothing else has imported torch._dynamo, nothing is
compiled, so here such a method is called without it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.optim.optimizer import _use_grad_for_differentiable

# Code that all methods of a kind share, and where PyTorch 2.11 keeps what an excluded method calls. If another version
# does it differently (2.0 has no such import), nothing is replaced, and the second is spent again.
EXCLUDED = getattr(torch, "_disable_dynamo", lambda method: method)(lambda: None).__code__
INTERRUPTING = _use_grad_for_differentiable(lambda: None).__code__
MARK = "__dynamo_disable"


def postpone_dynamo(owner: type) -> None:
    """Let the methods that a class defines run without importing torch._dynamo, as long as nothing has imported it."""
    for name, method in list(vars(owner).items()):
        if getattr(method, "__code__", None) is INTERRUPTING and hasattr(method, "__wrapped__"):
            setattr(owner, name, step_without_dynamo(method))
            continue
        while plain := getattr(method, "__wrapped__", None):
            if getattr(method, "__code__", None) is EXCLUDED and not hasattr(plain, MARK):
                setattr(plain, MARK, until_dynamo_is_imported(method, plain))
            method = plain


def until_dynamo_is_imported(excluded: Callable, plain: Callable) -> Callable:
    """Return what `excluded`, PyTorch's form of `plain`, shall call."""

    def call(*arguments: Any, **named: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return plain(*arguments, **named)
        if getattr(plain, MARK) is call:
            delattr(plain, MARK)  # from now on as PyTorch does it
        return excluded(*arguments, **named)

    return call


def step_without_dynamo(step: Callable) -> Callable:
    """Return an optimizer's step; a differentiable one stays PyTorch's."""
    plain = step.__wrapped__  # type: ignore[attr-defined]

    @wraps(step)
    def call(self: torch.optim.Optimizer, *arguments: Any, **named: Any) -> Any:
        if "torch._dynamo" in sys.modules or self.defaults["differentiable"]:
            return step(self, *arguments, **named)
        with torch.no_grad():
            return plain(self, *arguments, **named)

    return call
