"""Comparison of settings trees: dotted paths, differences, changes from the defaults."""

from __future__ import annotations

from typing import Any

from common.errors import SettingsError
from config.settings import Settings, resolve


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the dotted paths of a tree of settings with their values."""
    if not isinstance(tree, dict) or not tree:
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}.{key}" if path else key)]


def changed_settings(settings: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return what differs from the defaults: path, value, default (None for a setting without a default)."""
    defaults = dict(leaves(resolve(None, []).as_dict()))
    return [(path, value, defaults.get(path)) for path, value in leaves(settings) if value != defaults.get(path)]


def comparable(facts: dict[str, Any], key: str) -> Any:
    """Return a fact of run.json for comparison; a run older than a setting had that setting's default.

    Settings that this version cannot read are returned as they are, None where there are none.
    """
    if key == "settings":
        try:
            return Settings.from_dict(facts["settings"]).as_dict()
        except (SettingsError, TypeError, KeyError, AttributeError):
            pass
    return facts.get(key)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the differences between two trees of settings, one readable text per leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted(old.keys() | new.keys())
            for text in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if old == new else [f"{path} was {old!r}, is {new!r}"]
