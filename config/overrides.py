"""Overrides on their way into the settings: a path must exist and a value must fit, or a sentence names both.

Used by `config/settings.py`, which knows where a setting lives; nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from common.errors import SettingsError, unknown

SEVERAL_TYPES = {"bf16.enabled": (False, True, "autocast", "auto")}  # settings whose values have more than one type


def merge_dataclass(target: Any, tree: Any, source: str, path: str) -> None:
    """Put a tree of overrides into a group of settings; `source` begins the sentence of a refusal."""
    names = [f.name for f in fields(target)]
    if not isinstance(tree, dict):
        raise SettingsError(
            f"{source}{path} is a group of settings ({', '.join(names)}); give one of them, for example {path}.{names[0]}"
        )
    # What others depend on comes first: another architecture starts from the defaults, not from a preset made for the
    # last one, and another feed_forward from its own options.
    for key, value in sorted(tree.items(), key=lambda item: (item[0] != "architecture", item[0].endswith("_options"))):
        if key not in names:
            raise SettingsError(source + unknown("setting", f"{path}.{key}", [f"{path}.{name}" for name in names]))
        current = getattr(target, key)
        if key == "architecture" and value != current:
            vars(target).update(vars(type(target)()))
        if f"{key}_options" in names and value != current:
            setattr(target, f"{key}_options", {})
        if isinstance(current, dict):  # options of one entry of a table: checked by the table, which knows its own
            if not isinstance(value, dict):
                raise SettingsError(
                    f"{source}{path}.{key} is a group; give one of its members, for example {path}.{key}.name=value"
                )
            setattr(target, key, {**current, **value})
        else:
            setattr(target, key, coerce(current, value, f"{source}{path}.{key}"))


def merge_dict(target: dict[str, Any], tree: Any, source: str, path: str) -> None:
    """Put a tree of overrides into nested dictionaries whose keys are fixed."""
    for key, value in tree.items():
        where = f"{path}.{key}" if path else key
        if key not in target:
            raise SettingsError(
                source + unknown("setting", where, [f"{path}.{name}" if path else name for name in target])
            )
        if isinstance(target[key], dict):
            if not isinstance(value, dict):
                raise SettingsError(f"{source}{where} is a group; its members are {', '.join(target[key])}")
            merge_dict(target[key], value, source, where)
        elif where in SEVERAL_TYPES:
            if not any(type(value) is type(choice) and value == choice for choice in SEVERAL_TYPES[where]):
                words = ", ".join(choice for choice in SEVERAL_TYPES[where] if isinstance(choice, str))
                raise SettingsError(
                    f"{source}{where} must be of type bool, or one of {words} (now {target[key]!r}), not {value!r}"
                )
            target[key] = value
        else:
            target[key] = coerce(target[key], value, f"{source}{where}")


def coerce(current: Any, value: Any, where: str) -> Any:
    """`value` as the type of `current`; an int fits where a float stands, nothing else changes type."""
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if current is not None and type(value) is not type(current):
        raise SettingsError(f"{where} must be of type {type(current).__name__} (now {current!r}), not {value!r}")
    return value
