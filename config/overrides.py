"""Overrides of settings: a path must exist and a value must have the right type, or an error names both.

Used by `config/settings.py`, which knows where a setting is declared. Nothing here imports PyTorch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from common.errors import SettingsError, unknown
from config.setting_groups import ScheduleSettings

SEVERAL_TYPES = {
    "bf16.enabled": (False, True, "autocast", "masters", "auto")
}  # settings whose values have more than one type
# What other projects and papers call a setting; the keys are in lower case with underscores.
ALIASES = {
    "learning_rate": "optimizer.params.lr",
    "batch_size": "train_batch_size",
    "batch": "train_batch_size",
    "bs": "train_batch_size",
    "amp": "bf16.enabled",
    "fp16": "bf16.enabled",
    "precision": "bf16.enabled",
    "mixed_precision": "bf16.enabled",
    "wd": "optimizer.params.weight_decay",
    "opt": "optimizer.type",
    "optim": "optimizer.type",
    "optimizer": "optimizer.type",
    "optimiser": "optimizer.type",
    "model": "model.architecture",
    "arch": "model.architecture",
    "net": "model.architecture",
    "layers": "model.depth",
    "num_layers": "model.depth",
    "num_heads": "model.heads",
    "dim": "model.width",
    "embed_dim": "model.width",
    "patch_size": "model.patch",
    "img_size": "image_side",
    "image_size": "image_side",
    "warmup": "schedule.warmup_fraction",
    "warmup_epochs": "schedule.warmup_fraction",
    "warmup_steps": "schedule.warmup_fraction",
    "warmup_ratio": "schedule.warmup_fraction",
    "scheduler": "schedule.shape",
    "lr_scheduler": "schedule.shape",
    "schedule": "schedule.shape",
    "sched": "schedule.shape",
    "min_lr": "schedule.final_factor",
    "smoothing": "loss.label_smoothing",
    "clip_grad": "gradient_clipping",
    "grad_clip": "gradient_clipping",
    "accumulation": "gradient_accumulation_steps",
    "accum_iter": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "model_ema": "ema.decay",
    "ema": "ema.decay",
    "zero_stage": "zero_optimization.stage",
    "stage": "zero_optimization.stage",
    "aa": "augmentation.policy",
    "reprob": "augmentation.erasing",
    "activation": "model.feed_forward",
    "ffn": "model.feed_forward",
}
NOT_SETTINGS = ("device", "resume", "type", "enabled", "checkpoint", "output", "workers")  # no setting means these


def path_of(override: str) -> str:
    """The path of an override `path=value`, without the prefix `engine.` that a key of ds_config.json may have."""
    return override.partition("=")[0].strip().removeprefix("engine.")


def sets(path: str, overrides: list[str]) -> bool:
    """Whether one of the overrides `path=value` sets this path."""
    return any(path_of(text) == path for text in overrides)


def paths_of(tree: dict[str, Any]) -> list[str]:
    """The path of every setting in the tree of a Settings, as `--set` takes it; options of a part count as one."""

    def walk(tree: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in tree.items():
            is_group = isinstance(value, dict) and not key.endswith("_options")
            found += walk(value, f"{prefix}{key}.") if is_group else [f"{prefix}{key}"]
        return found

    tree = dict(tree)
    return walk({**tree.pop("engine"), **tree}, "")


def meant_path(name: str, paths: list[str]) -> str | None:
    """The path of the setting that a user means by `lr`, `weight-decay` or `model.width`; None where nothing fits."""
    name = name.lower().replace("-", "_")
    if name in ALIASES and ALIASES[name] in paths:
        return ALIASES[name]
    if name in NOT_SETTINGS:
        return None
    exact = [path for path in paths if path == name or path.endswith(f".{name}") or path == f"{name}.enabled"]
    return exact[0] if exact else None


def merge_dataclass(target: Any, tree: Any, source: str, path: str) -> None:
    """Apply a tree of overrides to a group of settings; `source` begins the error message."""
    members = {f.name: f for f in fields(target)}
    names = list(members)
    if not isinstance(tree, dict):
        raise SettingsError(
            f"{source}{path} is a group of settings ({', '.join(names)}); "
            f"give one of them, for example {path}.{names[0]}"
        )
    # Settings that others depend on come first: another architecture starts from the defaults instead of a preset made
    # for the previous one, another feed_forward from its own options, another shape without what it does not use.
    for key, value in sorted(
        tree.items(), key=lambda item: (item[0] not in ("architecture", "shape"), item[0].endswith("_options"))
    ):
        if key not in names:
            raise SettingsError(source + unknown("setting", f"{path}.{key}", [f"{path}.{name}" for name in names]))
        current = getattr(target, key)
        value = members[key].metadata["declared"].aliases.get(value, value) if isinstance(value, str) else value
        if key == "architecture" and value != current:
            vars(target).update(vars(type(target)()))
        if f"{key}_options" in names and value != current:
            setattr(target, f"{key}_options", {})
        if isinstance(current, dict):  # options of one entry of a registry, which checks them itself
            if not isinstance(value, dict):
                raise SettingsError(
                    f"{source}{path}.{key} is a group; give one of its members, for example {path}.{key}.name=value"
                )
            setattr(target, key, {**current, **value})
        else:
            setattr(target, key, coerce(current, value, f"{source}{path}.{key}"))
        if isinstance(target, ScheduleSettings) and key == "shape" and value != current:
            for name in target.unused():
                setattr(target, name, getattr(ScheduleSettings(), name))


def merge_dict(target: dict[str, Any], tree: Any, source: str, path: str) -> None:
    """Apply a tree of overrides to nested dictionaries with fixed keys."""
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
    """Return `value` as the type of `current`: an int becomes a float where needed; nothing else changes type."""
    if isinstance(current, float) and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise SettingsError(f"{where} must be a finite number, got {value}") from None
    if current is not None and type(value) is not type(current):
        raise SettingsError(f"{where} must be of type {type(current).__name__} (now {current!r}), not {value!r}")
    return value
