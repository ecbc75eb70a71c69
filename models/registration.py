"""Modules and parameters of user-defined parts that PyTorch does not find, and so neither trains, moves nor saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from common.errors import SettingsError

OF_PYTORCH = frozenset(vars(nn.Module()))  # attributes in which every module keeps what is registered


def check_registered(label: str, module: nn.Module) -> None:
    """Check that attributes of a new module, and of all modules in it, hold nothing that PyTorch does not register.

    Raises:
        SettingsError: a list, tuple or dictionary hides a module or a parameter; the message begins with `label`.
    """
    registered = {id(found) for found in (*module.modules(), *module.parameters())}
    for owner in module.modules():
        for name, value in vars(owner).items():
            hidden = [] if name in OF_PYTORCH else [found for found in _held_by(value) if id(found) not in registered]
            if not hidden:
                continue
            kind = "Module" if isinstance(hidden[0], nn.Module) else "Parameter"
            where, fix = f"{kind.lower()}s in a {type(value).__name__}", "Dict" if isinstance(value, dict) else "List"
            if value is hidden[0]:
                where, fix = "a tensor with requires_grad", ""
            raise SettingsError(
                f"{label}: self.{name} of {type(owner).__name__} holds {where}, which PyTorch does not register; "
                f"use nn.{kind}{fix}"
            )


def _held_by(value: Any) -> Iterator[nn.Module | Tensor]:
    """Yield the modules and the trainable tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, nn.Module) or (isinstance(value, Tensor) and value.requires_grad and value.is_leaf):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for held in value.values() if isinstance(value, dict) else value:
            yield from _held_by(held)
