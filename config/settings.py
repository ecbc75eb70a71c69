# PYTHON_ARGCOMPLETE_OK
"""Every setting of a run: where it lives, what it defaults to, how it is overridden, and what is refused.

A setting has one home. The model, the augmentation and the schedule have the dataclasses below; the engine (batch,
optimiser, clipping, precision, ZeRO) has `ds_config.json`; facts of the data have `dataset.json`; facts of a run are
flags of `train.py`. A preset (`presets/<name>.toml`) overrides any of them, `--set path=value` overrides the preset:

    --set optimizer.params.lr=3e-4 --set zero_optimization.stage=2      (ds_config.json)
    --set model.feed_forward=geglu --set model.feed_forward_options.hidden=384
    --set augmentation.crop_padding=2 --set schedule.warmup_fraction=0.1

A path that does not exist or a value of another type is an error that names it. Another `optimizer.type` starts from its
own parameters (`config/optimizer_defaults.py`). Nothing here imports PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from common.paths import DS_CONFIG, PRESETS
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.overrides import coerce, merge_dataclass, merge_dict

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass
class ModelSettings:
    """The network. Which names each table knows: `python model.py`."""

    architecture: str = "vit"
    patch: int = 4  # side of a square patch, pixels
    width: int = 512  # C
    depth: int = 4  # number of blocks
    heads: int = 6  # H
    head_size: int = 64  # D
    patch_embedding: str = "spt"
    position: str = "learned"
    block: str = "pre_norm"
    attention: str = "lsa"
    feed_forward: str = "mlp"
    pooling: str = "class_token"
    patch_embedding_options: dict[str, Any] = field(default_factory=dict)
    position_options: dict[str, Any] = field(default_factory=dict)
    attention_options: dict[str, Any] = field(default_factory=dict)
    feed_forward_options: dict[str, Any] = field(default_factory=lambda: {"hidden": 256})
    dropout: float = 0.1
    layer_scale: float = 0.0  # initial factor of every residual branch, learnt for each channel; 0: no such factor
    drop_path: float = (
        0.0  # stochastic depth: probability of skipping the last block's branches, rising linearly from 0
    )


@dataclass
class AugmentationSettings:
    """What a training image goes through, in this order; evaluation only resizes (where it must) and normalises."""

    resized_crop: bool = False  # crop a random part and resize it; else pad and crop
    resized_crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])  # share of the image's area
    resized_crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])  # width by height
    crop_padding: int = 4  # pixels of black added on each side before a random crop back to the image side
    flip: float = 0.5  # probability of a horizontal flip
    flip_mode: str = "random"  # random, or alternating: each image in every second epoch, half of them in the first
    policy: str = "none"  # none, rand_augment, trivial_augment, auto_augment (the CIFAR policy)
    rand_augment_ops: int = 2  # operations an image
    rand_augment_magnitude: int = 9  # bin 0..30
    brightness: float = 0.0  # colour jitter: factors between 1 - x and 1 + x
    contrast: float = 0.0
    saturation: float = 0.0
    erasing: float = 0.0  # probability of random erasing
    erasing_scale: list[float] = field(default_factory=lambda: [0.02, 0.33])  # share of the image's area
    erasing_ratio: list[float] = field(default_factory=lambda: [0.3, 3.3])  # height by width
    erasing_value: str = "zero"  # zero (the mean colour), or pixel (normal noise)
    repeats: int = 1  # copies of each image a batch, each augmented anew; an epoch then sees 1/repeats of the images
    mixup: float = 0.0  # alpha of the Beta distribution; 0 is off
    cutmix: float = 0.0  # alpha of the Beta distribution; 0 is off
    mix_probability: float = 1.0  # share of the images that are mixed at all
    cutmix_share: float = 0.5  # where both are on: share of the mixed images that get CutMix


@dataclass
class ScheduleSettings:
    """The learning rate as a factor of `optimizer.params.lr`, a function of the optimiser step alone."""

    shape: str = "cosine"  # cosine, linear, constant, trapezoid, step
    warmup_fraction: float = 0.05  # share of the run's steps over which the rate rises linearly
    warmup_start_factor: float = 0.0  # factor that it rises from, to 1
    final_factor: float = 0.01  # cosine, linear, trapezoid: factor at the last step
    hold_fraction: float = 0.0  # cosine, linear, trapezoid: share of the run's last steps that stay at final_factor
    cooldown_fraction: float = 0.2  # trapezoid: share of the run's steps over which the rate falls linearly
    milestones: list[float] = field(
        default_factory=lambda: [30 / 90, 60 / 90, 80 / 90]
    )  # step: shares of the run, ImageNet's
    milestone_factor: float = 0.1  # step: what the rate is multiplied by at each


@dataclass
class LossSettings:
    """Cross-entropy."""

    label_smoothing: float = 0.0


@dataclass
class EmaSettings:
    """The exponential moving average of the weights; where it is on, it is what is evaluated and handed over."""

    decay: float = 0.0  # share of the average that stays at a step; 0 is off
    warmup: bool = True  # a run's first averages are shorter: the decay is at most (1 + steps) / (10 + steps)


@dataclass
class ParallelSettings:
    """What some strategies need besides `ds_config.json`; a strategy refuses what it would not use."""

    stages: int = 2  # pipeline: parts that the layers are cut into; the processes are stages x replicas
    partition: str = (
        "parameters"  # pipeline: what the stages share evenly: parameters, layers (uniform) or measured time
    )
    topology: str = "ring"  # gossip: who averages with whom, a name of parallel/topologies.py
    gossip_order: str = "adapt_then_combine"  # gossip: step, then average; adapt_with_combine: average, then step
    moment_steps: int = 1  # gossip: steps whose mean gradient enters Adam's moments as one (AccumAdam); 1 is plain Adam
    local_steps: int = 32  # local: steps that each worker makes alone
    outer_lr: float = 0.7  # local: of the outer step, SGD with Nesterov momentum
    outer_momentum: float = 0.9
    patience_seconds: float = (
        120.0  # local with peers: longest wait for one that is alive but late, or stalls within an exchange
    )


@dataclass
class Settings:
    """The union: what a preset may contain and what is written to the run folder."""

    epochs: int = 100
    strategy: str = "zero"
    image_side: int = 0  # pixels the network sees; 0 is the dataset's own side
    compile: str = "auto"  # torch.compile: auto, on, off, or with CUDA graphs: reduce-overhead, max-autotune
    channels_last: bool = False  # images in memory with their channels side by side, which convolutions on GPUs prefer
    model: ModelSettings = field(default_factory=ModelSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    engine: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> Settings:
        """The inverse of `as_dict`. Raises SettingsError for keys this version does not know."""
        settings = cls(engine=copy.deepcopy(tree["engine"]))
        optimizer = settings.engine["optimizer"]  # a run of an earlier commit may lack parameters that were added since
        optimizer["params"] = {**OPTIMIZER_PARAMS.get(optimizer["type"], {}), **optimizer["params"]}
        for name in [f.name for f in fields(ModelSettings) if f.name.endswith("_options")]:
            setattr(settings.model, name, {})  # the tree says all
        _merge(settings, {key: value for key, value in tree.items() if key != "engine"})
        return settings


def resolve(preset: str | None, overrides: list[str], **run_facts: Any) -> Settings:
    """Defaults, then `ds_config.json`, then the preset, then `--set`, then the flags that were given.

    Args:
        preset: name of a file in `presets/`, or a path to such a file; None for the defaults alone.
        overrides: texts `path=value`.
        run_facts: fields of Settings given as flags (epochs, strategy); None means not given.

    Raises:
        SettingsError: unknown preset or path, or a value of the wrong type.
    """
    settings = Settings(engine=_read_engine_file())
    if preset is not None:
        _merge(settings, _read_preset(preset))
    # The optimiser's type first, wherever it stands: what others say of its parameters must not be lost when it comes later.
    for override in sorted(
        overrides, key=lambda text: not text.strip().removeprefix("engine.").startswith("optimizer.type")
    ):
        path, equals, text = override.partition("=")
        if not equals:
            raise SettingsError(f"--set {override}: write it as path=value, for example optimizer.params.lr=3e-4")
        tree: Any = _parse(text)
        for key in reversed(path.strip().split(".")):
            tree = {key: tree}
        _merge(settings, tree, source=f"--set {override}: ")
    for name, value in run_facts.items():
        if value is not None:
            setattr(settings, name, value)
    return settings


def preset_names() -> list[str]:
    """The presets that come with the project."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def _read_engine_file() -> dict[str, Any]:
    try:
        engine = json.loads(DS_CONFIG.read_text())
        given = engine["optimizer"]
        if given["type"] in OPTIMIZER_PARAMS:
            engine["optimizer"] = {"type": given["type"], "params": copy.deepcopy(OPTIMIZER_PARAMS[given["type"]])}
            merge_dict(engine["optimizer"]["params"], given["params"], f"{DS_CONFIG.name}: ", "optimizer.params")
        return engine
    except SettingsError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(f"{DS_CONFIG.name} cannot be read: {error}") from error


def _switch_optimizer(engine: dict[str, Any], wanted: Any, source: str) -> None:
    """Another optimiser starts from its own parameters: those of `ds_config.json` where it is named there, else its defaults."""
    if not isinstance(wanted, str) or wanted == engine["optimizer"]["type"]:
        return
    if wanted not in OPTIMIZER_PARAMS:
        raise SettingsError(source + unknown("optimizer.type", wanted, list(OPTIMIZER_PARAMS)))
    default = _read_engine_file()["optimizer"]
    engine["optimizer"] = (
        default if default["type"] == wanted else {"type": wanted, "params": copy.deepcopy(OPTIMIZER_PARAMS[wanted])}
    )


def _read_preset(preset: str) -> dict[str, Any]:
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not path.is_file():
        raise SettingsError(unknown("preset", preset, preset_names()))
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SettingsError(f"preset {path} is not valid TOML: {error}") from error


def _parse(text: str) -> Any:
    """A value as a person types it: JSON where it parses (numbers, true, lists, "quoted"), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def _merge(settings: Settings, tree: dict[str, Any], source: str = "") -> None:
    """Put a tree of overrides into the settings; keys that are no field of Settings belong to the engine."""
    known = {f.name for f in fields(Settings)}
    for key, value in tree.items():
        if key == "engine":
            optimizer = value.get("optimizer") if isinstance(value, dict) else None
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
            raise SettingsError(source + unknown("setting", key, sorted(known | set(settings.engine))))
