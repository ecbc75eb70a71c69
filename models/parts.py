"""Component registry: the dimensions that all parts of a network share, and making a part from its name and options.

A part (a feed-forward, an attention, a patch embedding ...) is a class in a registry. Its constructor takes the
Dimensions of the network. Every further argument needs a default and is an option of the part:
`--set model.<part>_options.<argument>=VALUE`. Unknown options and wrong types are rejected by the same signature.

Letters in all shapes: B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes,
S image side.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from common.errors import SettingsError, unknown


@dataclass(frozen=True)
class Dimensions:
    """Sizes that all parts of one network share."""

    num_classes: int  # K
    image_side: int  # S
    patch: int  # P
    width: int  # C
    depth: int
    heads: int  # H
    head_size: int  # D
    num_prefix: int  # CLS tokens before the patch tokens
    dropout: float

    @property
    def grid(self) -> int:
        """Number of patch tokens along one side of the image."""
        return self.image_side // self.patch

    @property
    def num_tokens(self) -> int:
        """T: patch tokens and CLS tokens."""
        return self.num_prefix + self.grid**2


def make_part(
    table: Mapping[str, Callable[..., nn.Module]], kind: str, name: str, dims: Dimensions, options: dict[str, Any]
) -> nn.Module:
    """Return a new instance of entry `name` of the registry `table`, made with `options`.

    Raises:
        SettingsError: unknown entry, unknown option, or an option of the wrong type.
    """
    if name not in table:
        raise SettingsError(unknown(kind.replace("_", "-"), name, list(table)))
    known = part_options(table[name])
    for option, value in options.items():
        if option not in known:
            raise SettingsError(f"{kind}={name}: " + unknown("option", option, list(known)))
        if known[option] is None or known[option] is inspect.Parameter.empty:
            continue  # the default does not tell the type
        wanted = type(known[option])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise SettingsError(
                f"{kind}={name}: option {option} must be of type {wanted.__name__} (default {known[option]!r}), "
                f"got {value!r}"
            )
    required = [option for option, default in known.items() if default is inspect.Parameter.empty]
    if missing := [option for option in required if option not in options]:
        raise SettingsError(f"{kind}={name} needs a value: --set model.{kind}_options.{missing[0]}=...")
    return table[name](dims, **options)


def part_options(part: Callable[..., nn.Module]) -> dict[str, Any]:
    """Return the options of a part with their defaults: every argument of its constructor after the first."""
    return {p.name: p.default for p in list(inspect.signature(part).parameters.values())[1:]}
