"""What the parts of a network share: their dimensions, and how a part is made from its name and its options.

A part (a feed-forward, an attention, a patch embedding ...) is a class in a table. Its constructor takes the network's
Dimensions and, as further arguments with defaults, its own options; those are what `--set model.<part>_options.<name>=`
accepts, and what is refused follows from the same signature.

Letters, everywhere the same: B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes, S image side.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.errors import SettingsError, unknown


@dataclass(frozen=True)
class Dimensions:
    """The sizes that every part of one network agrees on."""

    num_classes: int  # K
    image_side: int  # S
    patch: int  # P
    width: int  # C
    depth: int
    heads: int  # H
    head_size: int  # D
    num_prefix: int  # class tokens that stand before the patch tokens
    dropout: float

    @property
    def grid(self) -> int:
        """Patch tokens along one side of the image."""
        return self.image_side // self.patch

    @property
    def num_tokens(self) -> int:
        """T, class tokens included."""
        return self.num_prefix + self.grid**2


def make_part(
    table: dict[str, Callable[..., nn.Module]], kind: str, name: str, dims: Dimensions, options: dict[str, Any]
) -> nn.Module:
    """Make entry `name` of `table` with `options`.

    Raises:
        SettingsError: the table has no such entry, the entry has no such option, or an option has another type.
    """
    if name not in table:
        raise SettingsError(unknown(kind.replace("_", "-"), name, list(table)))
    known = part_options(table[name])
    for option, value in options.items():
        if option not in known:
            raise SettingsError(f"{kind}={name}: " + unknown("option", option, list(known)))
        wanted = type(known[option])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise SettingsError(
                f"{kind}={name}: option {option} must be of type {wanted.__name__} (default {known[option]!r}), not {value!r}"
            )
    return table[name](dims, **options)


def part_options(part: Callable[..., nn.Module]) -> dict[str, Any]:
    """The options of a part and their defaults: every argument of its constructor after the first."""
    return {p.name: p.default for p in list(inspect.signature(part).parameters.values())[1:]}
