"""User-defined networks and blocks, `FILE.py:NAME`: called by the names of their arguments, and their results checked.

Parts inside a block (attention, feed-forward, ...) need nothing of this: `make_part` makes them like any other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from common.errors import SettingsError
from config.own_parts import OwnPart, call_by_name, describe
from config.settings import ModelSettings
from models.layers import Architecture
from models.parts import UnusablePart, check_options

NETWORK_ARGUMENTS = ("settings", "num_classes", "image_side")
BLOCK_ARGUMENTS = ("branch", "attention", "feed_forward")


def own_architecture(entry: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Architecture:
    """Return a user-defined network as an architecture.

    Args:
        entry: a class or a function that takes any of NETWORK_ARGUMENTS by name, and its options. It returns the
            network as one module, or as a list of layers, which the strategy `pipeline` splits into stages.
        options: `model.architecture_options`.

    Raises:
        SettingsError: an option that it does not have, or of another type.
    """
    checked = check_options(entry, "architecture", name, options, passed=NETWORK_ARGUMENTS)

    def build(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
        values = dict(zip(NETWORK_ARGUMENTS, (settings, num_classes, image_side), strict=True))
        found = _call(f"model.architecture={name}", name, entry, {**values, **checked})
        layers = list(found) if isinstance(found, (list, tuple)) else [found]
        _check_modules(f"model.architecture={name}", layers, "a torch.nn.Module or a list of them")
        return layers

    used = getattr(entry, "used_settings", None)
    if used is None and "settings" not in inspect.signature(entry).parameters:
        used = ()
    if used is not None:
        build.used_settings = frozenset(used) | {"architecture_options"}  # type: ignore[attr-defined]
    return build


def own_branches(
    entry: Callable[..., Any], name: str, options: Mapping[str, Any], arguments: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Return the residual branches of a user-defined block.

    Args:
        arguments: values for BLOCK_ARGUMENTS; the block names those that it needs.

    Raises:
        SettingsError: an option or an argument that does not fit.
        UnusablePart: it fails, or does not return a dictionary of modules.
    """
    checked = check_options(entry, "block", name, options, passed=BLOCK_ARGUMENTS)
    found = _call(f"model.block={name}", name, entry, {**arguments, **checked})
    expected = "a dictionary of torch.nn.Module, such as those that branch(...) returns"
    _check_modules(f"model.block={name}", list(found.values()) if isinstance(found, dict) else [found], expected)
    if not isinstance(found, dict):
        raise UnusablePart(f"model.block={name} must return {expected}, not {type(found).__name__}")
    return found


def _call(label: str, name: str, entry: Callable[..., Any], values: dict[str, Any]) -> Any:
    own = OwnPart.parse(name)
    assert own is not None  # only user-defined parts come here
    try:
        return call_by_name(label, entry, **values)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:
        raise UnusablePart(f"{label}: making it failed: {describe(error, own)}") from error


def _check_modules(label: str, found: list[Any], expected: str) -> None:
    if wrong := [part for part in found if not isinstance(part, nn.Module)]:
        raise UnusablePart(f"{label} must return {expected}, not {type(wrong[0]).__name__}")
    if not found:
        raise UnusablePart(f"{label} must return {expected}, not an empty list")
