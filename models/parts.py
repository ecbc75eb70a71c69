"""Component registry: the dimensions that all parts of a network share, and making a part from its name and options.

A part (a feed-forward, an attention, a patch embedding ...) is a class in a registry. Its constructor takes the
Dimensions of the network. Every further argument needs a default and is an option of the part:
`--set model.<part>_options.<argument>=VALUE`. Unknown options and wrong types are rejected by the same signature: an
option has the type of its annotation, or of its default where it has none. A user-defined part, `FILE.py:NAME`, may be
any callable that takes the Dimensions and returns a module.

Letters in all shapes: B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes,
S image side.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Union

from torch import nn

from common.errors import SettingsError, unknown
from config.own_parts import OwnPart, describe, find_entry


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
        SettingsError: unknown entry, unknown option, an option of the wrong type, or a user-defined part that cannot be
            made.
    """
    entry = find_entry(table, kind.replace("_", "-"), name)
    checked = check_options(entry, kind, name, options)
    own = OwnPart.parse(name)
    if own is None:
        return entry(dims, **checked)
    try:
        part = entry(dims, **checked)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:
        raise UnusablePart(
            f"{kind}={name}: making it failed: {describe(error, own)}; it is called with the Dimensions of the "
            "network and its options"
        ) from error
    if not isinstance(part, nn.Module):
        raise UnusablePart(f"{kind}={name}: it must return a torch.nn.Module, not {type(part).__name__}")
    return part


class UnusablePart(SettingsError):
    """A user-defined part that cannot be made, or that does not compute what its place in the network needs."""


def part_options(part: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a part with their defaults: every argument of its constructor after the first one."""
    return {p.name: p.default for p in _option_parameters(part, skipped=1) if p.kind is not p.VAR_KEYWORD}


def check_options(
    part: Callable[..., Any], kind: str, name: str, options: Mapping[str, Any], passed: Sequence[str] | int = 1
) -> dict[str, Any]:
    """Return the options as the part takes them: lists become tuples, whole numbers floats where the type says so.

    Args:
        passed: the arguments that are no options: their names, or how many come first.

    Raises:
        SettingsError: unknown option, an option of the wrong type, or none for an argument without a default.
    """
    skipped = passed if isinstance(passed, int) else 0
    parameters = [p for p in _option_parameters(part, skipped) if isinstance(passed, int) or p.name not in passed]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    known = {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD}
    annotations = _annotations(part)
    checked = {}
    for option, value in options.items():
        if option not in known:
            if not takes_any:
                raise SettingsError(f"{kind}={name}: " + unknown("option", option, list(known)))
            checked[option] = value
            continue
        default = known[option].default
        wanted = annotations.get(option, Any)
        if wanted is Any and default is not None and default is not inspect.Parameter.empty:
            wanted = type(default)
        if not fits(value, wanted):
            shown = "" if default is inspect.Parameter.empty else f" (default {default!r})"
            raise SettingsError(
                f"{kind}={name}: option {option} must be of type {_type_name(wanted)}{shown}, got {value!r}"
            )
        checked[option] = _converted(value, wanted)
    required = [option for option, p in known.items() if p.default is inspect.Parameter.empty]
    missing = [option for option in required if option not in options]
    if missing and not isinstance(passed, int):
        raise SettingsError(
            f"{kind}={name}: the argument {missing[0]} has no default and is none of {', '.join(passed)}, which are "
            f"passed by name; rename it, or set it with --set model.{kind}_options.{missing[0]}=..."
        )
    if missing:
        raise SettingsError(f"{kind}={name} needs a value: --set model.{kind}_options.{missing[0]}=...")
    return checked


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a setting has the type that an annotation names; a type that no setting can have fits all."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, choice) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if wanted in (None, type(None)):
        return value is None
    if _is_tuple(wanted) or wanted is list or origin in (list, Sequence):
        return isinstance(value, list) and all(fits(item, arguments[0] if arguments else Any) for item in value)
    if wanted is dict or origin in (dict, Mapping):
        return isinstance(value, dict)
    if wanted is float:
        return type(value) in (int, float)
    return type(value) is wanted if wanted in (int, str, bool) else True


def _converted(value: Any, wanted: Any) -> Any:
    choices = typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if isinstance(value, list) and any(map(_is_tuple, choices)):
        return tuple(value)
    return float(value) if type(value) is int and float in choices and int not in choices else value


def _is_tuple(wanted: Any) -> bool:
    return wanted is tuple or typing.get_origin(wanted) is tuple


def _type_name(wanted: Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)


def _option_parameters(part: Callable[..., Any], skipped: int) -> list[inspect.Parameter]:
    """Return the parameters after the first `skipped`, without `*args`."""
    positional = 0
    found = []
    for parameter in inspect.signature(part).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        if parameter.kind is not parameter.KEYWORD_ONLY and positional < skipped:
            positional += 1
            continue
        found.append(parameter)
    return found


def _annotations(part: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a part's arguments; empty where they cannot be evaluated."""
    target = part.func if isinstance(part, partial) else part
    try:
        return typing.get_type_hints(vars(target).get("__init__", target) if isinstance(target, type) else target)
    except Exception:  # noqa: BLE001 (an annotation may name what is imported for type checkers alone)
        return {}
