# PYTHON_ARGCOMPLETE_OK
"""Settings of a run: where each one is declared, how it is overridden, and which values are rejected.

The model, the augmentation and the schedule have the dataclasses of `config/setting_groups.py`; the engine (batch,
optimizer, clipping, precision, ZeRO) has `ds_config.json`; facts of the data have `dataset.json`; facts of a run are
flags of `train.py`. A preset (`presets/<name>.toml`) overrides any of them, `--set path=value` overrides the preset:

    --set optimizer.params.lr=3e-4 --set zero_optimization.stage=2      (ds_config.json)
    --set model.feed_forward=geglu --set model.feed_forward_options.hidden=384
    --set augmentation.crop_padding=2 --set schedule.warmup_fraction=0.1
    --set model.attention=path/to/mine.py:Attention     (a user-defined part, config/own_parts.py)

The order of a part's name and its options has no meaning. A path that does not exist, a value of another type and a
value out of range are errors that name the setting. Another `optimizer.type` starts from its own parameters
(`config/optimizer_defaults.py`), and another `schedule.shape` drops the preset's values that it does not use. Nothing
here imports PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from common.paths import DS_CONFIG, PRESETS
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.overrides import SEVERAL_TYPES, coerce, meant_path, merge_dataclass, merge_dict, path_of, paths_of
from config.own_parts import OwnPart, as_settings_hold_them, default_arguments, load
from config.schema import Declared, setting
from config.setting_groups import (
    ENGINE_SETTINGS,
    ENGINE_TYPES,
    AugmentationSettings,
    EmaSettings,
    LossSettings,
    ModelSettings,
    ParallelSettings,
    ResizingSettings,
    ScheduleSettings,
)
from config.toml_file import read_toml

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)  # .1, 5. and +1 too, which JSON rejects


@dataclass
class Settings:
    """All settings of a run: what a preset may contain and what is written to the run folder."""

    epochs: int = setting(100, "passes over the training split", "[1, inf)")
    strategy: str = setting("zero", "parallelism strategy", table=("parallel/strategies.py", "STRATEGIES"))
    image_side: int = setting(
        0, "side of the network's input images, in pixels; 0: the dataset's own side", "[0, 4096]"
    )
    compile: str = setting(
        "auto",
        "torch.compile: auto, on, off, or a mode with CUDA graphs (reduce-overhead, max-autotune; auto-graphs: "
        "reduce-overhead where possible, else auto)",
        choices=("auto", "on", "off", "auto-graphs", "reduce-overhead", "max-autotune"),
    )
    compile_evaluation: bool = setting(
        False, "compile the evaluation too; its count may then differ from evaluate.py's by rounding"
    )
    channels_last: bool = setting(
        False, "store images in channels-last memory format, which is faster for GPU convolutions"
    )
    model: ModelSettings = field(default_factory=ModelSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    resizing: ResizingSettings = field(default_factory=ResizingSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    engine: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Settings:
        """Inverse of `as_dict`. Raises SettingsError for keys that this version does not know."""
        settings = cls(engine=copy.deepcopy(tree["engine"]))
        optimizer = settings.engine["optimizer"]  # a run of an earlier commit may lack parameters that were added since
        optimizer["params"] = {**OPTIMIZER_PARAMS.get(optimizer["type"], {}), **optimizer["params"]}
        # The tree holds all options. Another architecture than that of `settings` would bring back the defaults.
        settings.model.architecture = tree["model"]["architecture"]
        for name in [f.name for f in fields(ModelSettings) if f.name.endswith("_options")]:
            setattr(settings.model, name, {})
        _merge(settings, {key: value for key, value in tree.items() if key != "engine"})
        return settings


def declared_settings() -> dict[str, Declared]:
    """The declaration of every setting, by the path that `--set` takes."""
    found: dict[str, Declared] = {}
    for top in fields(Settings):
        if "declared" in top.metadata:
            found[top.name] = top.metadata["declared"]
        elif top.name != "engine":
            group: Any = top.default_factory  # the dataclass
            for member in fields(group):
                found[f"{top.name}.{member.name}"] = member.metadata["declared"]
    return found | ENGINE_SETTINGS


def resolve(preset: str | None, overrides: list[str], **run_facts: Any) -> Settings:
    """Combine the defaults, `ds_config.json`, the preset, `--set` and the given flags; later ones win.

    Args:
        preset: name of a file in `presets/`, or a path to such a file; None for the defaults alone.
        overrides: texts `path=value`. Of the same path, the last one wins; otherwise their order has no meaning.
        run_facts: fields of Settings given as flags (epochs, strategy); None means not given.

    Raises:
        SettingsError: unknown preset or path, a value of the wrong type, or a value out of its declared range.
    """
    settings = Settings(engine=_read_engine_file())
    if preset is not None:
        tree, folder = _read_preset(preset)
        source = f"preset {preset}: "
        _merge(settings, as_settings_hold_them(tree, folder, source), source)
    for override in sorted(overrides, key=_rank):
        path, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: write it as path=value, for example optimizer.params.lr=3e-4")
        given: Any = as_typed(text)
        for key in reversed(path.strip().split(".")):
            given = {key: given}
        _merge(settings, as_settings_hold_them(given, source="--set "), source=f"--set {override}: ")
    for name, value in run_facts.items():
        if value is not None:
            setattr(settings, name, as_settings_hold_them(value))
    check_values(settings)
    return settings


def _rank(override: str) -> int:
    """Return 0 for what others depend on, 1 for names of parts and all other settings, 2 for options of parts.

    Applied in this order, nothing is lost that was given before the name that would discard it.
    """
    path = path_of(override)
    return 0 if path in ("optimizer.type", "schedule.shape", "model.architecture") else 1 + ("_options" in path)


def combine(preset: str, base: list[str], more: list[str]) -> tuple[list[str], list[str]]:
    """Return the overrides of two sources as one list for `resolve`, and those of `base` that it leaves out.

    Another part in `more` discards the options that `base` has for the former one, as it discards those of the preset.
    Another architecture discards all that `base` says about the network.
    """
    parts = {f"model.{f.name.removesuffix('_options')}" for f in fields(ModelSettings) if f.name.endswith("_options")}
    named = [[text for text in texts if path_of(text) in parts | {"model"}] for texts in (base, more)]
    if not named[1]:
        return [*base, *more], []
    try:
        before, after = resolve(preset, named[0]).model, resolve(preset, named[0] + named[1]).model
    except SettingsError:  # `resolve` of the whole list will say what is wrong
        return [*base, *more], []

    def is_discarded(override: str) -> bool:
        group, _, key = path_of(override).partition(".")
        if group != "model" or not key or key == "architecture":
            return False
        part, options, _ = key.partition("_options")
        is_other = bool(options) and getattr(before, part, None) != getattr(after, part, None)
        return is_other or before.architecture != after.architecture

    return [text for text in base if not is_discarded(text)] + more, [text for text in base if is_discarded(text)]


def check_values(settings: Settings) -> None:
    """Check every value against its declared range and choices.

    Raises SettingsError for the first that does not fit.
    """
    tree = settings.as_dict()
    tree |= tree.pop("engine")
    for path, declared in declared_settings().items():
        if problem := declared.problem(path, _value_at(tree, path)):
            raise SettingsError(problem)


def _value_at(tree: Any, path: str) -> Any:
    """Return the value at a dotted path of a tree; None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def check_keys(where: str, tree: dict[str, Any], own: Iterable[str]) -> None:
    """Raise SettingsError for a key at the top of a tree that is neither a setting nor one of the tree's `own` keys."""
    settings = Settings(engine=_read_engine_file())
    known = {*own, *_top_keys(settings)}
    for key, value in tree.items():
        if key not in known:
            raise SettingsError(f"{where}: " + _unknown_key("key", key, value, settings, list(own)))


def preset_names() -> list[str]:
    """The presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _read_engine_file() -> dict[str, Any]:
    try:
        engine = json.loads(DS_CONFIG.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{DS_CONFIG.name} cannot be read: {error}. Restore it with git checkout") from error
    _check_engine_file(engine)
    engine["gradient_clipping"] = float(engine["gradient_clipping"])
    given = engine["optimizer"]
    if given["type"] in OPTIMIZER_PARAMS:
        engine["optimizer"] = {"type": given["type"], "params": copy.deepcopy(OPTIMIZER_PARAMS[given["type"]])}
        merge_dict(engine["optimizer"]["params"], given["params"], f"{DS_CONFIG.name}: ", "optimizer.params")
    return engine


def _check_engine_file(engine: Any) -> None:
    """Raise SettingsError for a key of `ds_config.json` that is missing, of another type, or not supported."""
    for path, kind in ENGINE_TYPES.items():
        value = _value_at(engine, path)
        if value is None:
            raise SettingsError(f"{DS_CONFIG.name} lacks {path}; add it, or restore the file with git checkout")
        words = [word for word in SEVERAL_TYPES.get(path, ()) if isinstance(word, str)]
        if type(value) is not kind and value not in words and (type(value), kind) != (int, float):
            more = f", or one of {', '.join(words)}" if words else ""
            raise SettingsError(f"{DS_CONFIG.name}: {path} must be of type {kind.__name__}{more}, not {value!r}")
    for name in ("fp16", "amp"):
        if _value_at(engine, f"{name}.enabled"):
            raise SettingsError(f"{DS_CONFIG.name}: {name} is not supported; remove it, and choose bf16.enabled")


def _switch_optimizer(engine: dict[str, Any], wanted: Any, source: str) -> None:
    """Start another optimizer from its own parameters: those of `ds_config.json` if named there, else the defaults."""
    if not isinstance(wanted, str) or wanted == engine["optimizer"]["type"]:
        return
    if own := OwnPart.parse(wanted):
        engine["optimizer"] = {"type": wanted, "params": default_arguments(load(own))}
        return
    if wanted not in OPTIMIZER_PARAMS:
        raise SettingsError(source + unknown("optimizer.type", wanted, list(OPTIMIZER_PARAMS)))
    default = _read_engine_file()["optimizer"]
    engine["optimizer"] = (
        default if default["type"] == wanted else {"type": wanted, "params": copy.deepcopy(OPTIMIZER_PARAMS[wanted])}
    )


def _read_preset(preset: str) -> tuple[dict[str, Any], Path]:
    """Return the tree of a preset and the folder of its file."""
    path = Path(preset).expanduser() if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if preset.endswith(".toml") and not path.is_file():
        raise SettingsError(
            f"preset file {preset} does not exist; give the path of a .toml file or one of the names: "
            f"{', '.join(preset_names())}"
        )
    if preset not in preset_names() and not preset.endswith(".toml"):
        raise SettingsError(unknown("preset", preset, preset_names()))
    return read_toml(path, f"preset {path}"), path.parent


def as_typed(text: str) -> Any:
    """Read a value as typed: JSON where it parses (numbers, true, lists, "quoted"), otherwise the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if NUMBER.fullmatch(text):
            return int(text) if text.lstrip("+").isdecimal() else float(text)
        return {"True": True, "False": False, "None": None}.get(text, text)


def _merge(settings: Settings, tree: dict[str, Any], source: str = "") -> None:
    """Apply a tree of overrides to the settings; keys that are no field of Settings belong to the engine."""
    known = {f.name for f in fields(Settings)}
    for key, value in tree.items():
        if key == "engine":
            if not isinstance(value, dict):
                raise SettingsError(f"{source}engine is a group; its members are {', '.join(settings.engine)}")
            optimizer = value.get("optimizer")
            _switch_optimizer(settings.engine, optimizer.get("type") if isinstance(optimizer, dict) else None, source)
            merge_dict(settings.engine, value, source, "")
        elif key in known:
            current = getattr(settings, key)
            if dataclasses.is_dataclass(current):
                merge_dataclass(current, value, source, key)
            else:
                setattr(settings, key, coerce(current, value, f"{source}{key}"))
        elif key in settings.engine:
            _merge(settings, {"engine": {key: value}}, source)
        else:
            raise SettingsError(source + _unknown_key("setting", key, value, settings, []))


def _unknown_key(kind: str, key: str, value: Any, settings: Settings, own: list[str]) -> str:
    """Return the sentence for a key that is neither the top of a setting's path nor one of `own`."""
    meant = meant_path(key, paths_of(settings.as_dict())) if not isinstance(value, dict) else None
    if meant:
        return f"unknown {kind} '{key}'; did you mean '{meant}'?"
    return unknown(kind, key, [*own, *_top_keys(settings)])


def _top_keys(settings: Settings) -> set[str]:
    return {f.name for f in fields(Settings)} | set(settings.engine)
