"""config/settings.py: paths must exist, values must fit, later sources win, and settings survive JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from typing import Any

import pytest

from common.errors import SettingsError, unknown
from common.paths import PROJECT
from config.catalog import check_names, table_names
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.schema import INTERVAL
from config.setting_groups import ENGINE_SETTINGS, ScheduleSettings
from config.settings import Settings, combine, declared_settings, preset_names, resolve
from optim import lr_schedule
from optim.lr_schedule import SCHEDULES


@pytest.fixture
def preset(tmp_path):
    """Write a preset and return what `--preset` would be given."""

    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("override", "named", "suggested"),
    [
        ("model.widht=64", "model.widht", "model.width"),
        ("optimizer.params.learning_rate=1", "optimizer.params.learning_rate", None),
        ("optimizer.param.lr=1", "optimizer.param", "optimizer.params"),
        ("zero_optimization.stages=1", "zero_optimization.stages", "zero_optimization.stage"),
        ("shedule.shape=linear", "shedule", "schedule"),
        ("engine.train_batch=4", "train_batch", "train_batch_size"),
        ("epoch=4", "epoch", "epochs"),
    ],
)
def test_a_path_that_does_not_exist_is_refused_and_the_nearest_suggested(override, named, suggested):
    with pytest.raises(SettingsError) as refusal:
        resolve(None, [override])
    assert f"unknown setting '{named}'" in str(refusal.value) and override in str(refusal.value)
    assert suggested is None or f"did you mean '{suggested}'?" in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "named", "wanted"),
    [
        ("model.width=wide", "model.width", "int"),
        ("model.width=64.5", "model.width", "int"),
        ("model.width=true", "model.width", "int"),
        ("model.feed_forward=3", "model.feed_forward", "str"),
        ("model.dropout=true", "model.dropout", "float"),
        ("optimizer.params.lr=fast", "optimizer.params.lr", "float"),
        ("optimizer.params.betas=0.9", "optimizer.params.betas", "list"),
        ("bf16.enabled=1", "bf16.enabled", "bool"),
        ("train_batch_size=128.0", "train_batch_size", "int"),
        ("epochs=ten", "epochs", "int"),
    ],
)
def test_a_value_of_another_type_is_refused(override, named, wanted):
    with pytest.raises(SettingsError, match=f"{named} must be of type {wanted}"):
        resolve(None, [override])


@pytest.mark.parametrize(
    "override",
    ["model=vit", "optimizer=AdamW", "zero_optimization.offload_optimizer=cpu", "model.feed_forward_options=384"],
)
def test_a_group_cannot_be_given_a_value(override):
    with pytest.raises(SettingsError, match="is a group"):
        resolve(None, [override])


def test_an_override_without_a_value_is_refused():
    with pytest.raises(SettingsError, match="path=value"):
        resolve(None, ["model.width"])


def test_values_are_read_as_typed():
    settings = resolve(
        None,
        [
            "optimizer.params.lr=3e-4",
            "optimizer.params.betas=[0.8, 0.95]",
            "bf16.enabled=true",
            "augmentation.flip=1",
            'model.feed_forward="geglu"',
            "zero_optimization.stage=2",
            " model.width =96",
            "model.dropout=.1",
            "model.drop_path=+1e-3",
            "gradient_clipping=5.",
            "model.depth=+3",
        ],
    )
    assert (settings.model.dropout, settings.model.drop_path, settings.model.depth) == (0.1, 1e-3, 3)
    assert settings.engine["gradient_clipping"] == 5.0
    assert settings.engine["optimizer"]["params"] == {
        "lr": 3e-4,
        "betas": [0.8, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.05,
    }
    assert settings.engine["bf16"]["enabled"] is True and settings.engine["zero_optimization"]["stage"] == 2
    assert settings.model.feed_forward == "geglu" and settings.model.width == 96
    flip = settings.augmentation.flip
    assert flip == 1.0 and isinstance(flip, float)  # an int becomes a float where one is needed


def test_a_preset_beats_the_defaults_set_beats_the_preset_and_flags_beat_all(preset):
    mine = preset(
        "epochs = 7\n[model]\nwidth = 40\ndepth = 3\n[engine]\ntrain_batch_size = "
        "32\n[engine.optimizer.params]\nlr = 0.5\n"
    )
    default, settings = (
        resolve(None, []),
        resolve(mine, ["model.width=80", "train_batch_size=16", "epochs=8"], epochs=9, strategy=None),
    )
    assert (settings.model.depth, settings.model.width, settings.epochs) == (3, 80, 9)
    assert settings.engine["train_batch_size"] == 16 and settings.engine["optimizer"]["params"]["lr"] == 0.5
    assert (settings.model.heads, settings.strategy) == (default.model.heads, default.strategy)
    assert settings.engine["bf16"] == default.engine["bf16"]
    assert resolve(mine, ["model.width=80", "model.width=88"]).model.width == 88  # the last override wins


def test_resolving_twice_gives_independent_settings():
    before = resolve(None, []).as_dict()
    resolve(
        None, ["optimizer.params.lr=9.0", "model.feed_forward_options.hidden=9", "optimizer.params.betas=[0.1, 0.1]"]
    )
    assert resolve(None, []).as_dict() == before


def test_a_preset_is_checked_like_any_other_source(preset):
    with pytest.raises(
        SettingsError, match=r"preset .*mine.toml: unknown setting 'model.widht'; did you mean 'model.width'"
    ):
        resolve(preset("[model]\nwidht = 3"), [])
    with pytest.raises(SettingsError, match=r"mine.toml is not valid TOML"):
        resolve(preset("[model"), [])
    with pytest.raises(SettingsError, match="unknown preset 'cpuu'; did you mean 'cpu'"):
        resolve("cpuu", [])
    with pytest.raises(SettingsError, match=r"schedule.final_factor must be in \[0, 1\], got -0.1"):
        resolve(preset("[schedule]\nfinal_factor = -0.1"), [])


@pytest.mark.parametrize("name", preset_names())
def test_presets_that_come_with_the_project_resolve(name):
    assert resolve(name, []).epochs > 0


def test_another_feed_forward_starts_from_its_own_defaults():
    assert resolve(None, ["model.feed_forward=geglu"]).model.feed_forward_options == {}
    same = resolve(None, ["model.feed_forward=mlp"]).model
    assert same.feed_forward_options == {"hidden": 256}  # the same name: no option is dropped
    for order in (1, -1):
        overrides = ["model.feed_forward=geglu", "model.feed_forward_options.hidden=384"][::order]
        assert resolve(None, overrides).model.feed_forward_options == {"hidden": 384}


def test_options_before_the_name_of_their_part_are_kept():
    words = ["model.feed_forward_options.hidden=384", "model.depth=3", "model.feed_forward=geglu"]
    for order in (words, words[::-1]):
        found = resolve("cpu", order).model
        assert (found.feed_forward, found.feed_forward_options, found.depth) == ("geglu", {"hidden": 384}, 3)
    assert resolve("cpu", ["model.depth=3", "model.architecture=cct"]).model.depth == 3
    assert resolve("cpu", ["model.depth=3", "model.architecture=cct", "model.depth=4"]).model.depth == 4


def test_a_source_that_names_another_part_leaves_out_the_options_of_the_former():
    base = ["model.feed_forward=geglu", "model.feed_forward_options.hidden=384", "model.depth=3"]
    same = [*base, "model.feed_forward=geglu"]
    assert combine("cpu", base, same[3:]) == (same, [])
    kept, left_out = combine("cpu", base, ["model.feed_forward=mlp"])
    assert left_out == [base[1]] and resolve("cpu", kept).model.feed_forward_options == {}
    kept, left_out = combine("cpu", base, ["model.architecture=cct"])
    assert left_out == base and resolve("cpu", kept).model == resolve("cpu", ["model.architecture=cct"]).model


def test_another_optimizer_starts_from_its_own_parameters(preset):
    for name, params in OPTIMIZER_PARAMS.items():
        assert resolve(None, [f"optimizer.type={name}"]).engine["optimizer"] == {"type": name, "params": params}
    given = [
        "optimizer.params.momentum=0.5",
        "optimizer.params.lr=1",
        "optimizer.type=SGD",
    ]  # the type comes first wherever it stands
    assert resolve(None, given).engine["optimizer"]["params"] == {**OPTIMIZER_PARAMS["SGD"], "momentum": 0.5, "lr": 1.0}
    mine = preset('[engine.optimizer]\ntype = "Lion"\n[engine.optimizer.params]\nlr = 0.25\n')
    assert resolve(mine, []).engine["optimizer"] == {"type": "Lion", "params": {**OPTIMIZER_PARAMS["Lion"], "lr": 0.25}}
    assert (
        resolve(mine, ["optimizer.type=Lion"]).engine["optimizer"]["params"]["lr"] == 0.25
    )  # the optimizer that was already chosen
    assert resolve(mine, ["engine.optimizer.type=AdamW"]).engine["optimizer"] == resolve(None, []).engine["optimizer"]


@pytest.mark.parametrize("shape", SCHEDULES)
@pytest.mark.parametrize("name", preset_names())
def test_another_schedule_takes_no_value_of_the_preset_that_it_does_not_use(name, shape):
    before, after = resolve(name, []).schedule, resolve(name, [f"schedule.shape={shape}"]).schedule
    lr_schedule.check(after)
    for field in dataclasses.fields(ScheduleSettings):
        if field.name != "shape" and (shape == before.shape or field.name not in after.unused()):
            assert getattr(after, field.name) == getattr(before, field.name)


@pytest.mark.parametrize("order", [1, -1])
def test_a_given_value_that_the_given_schedule_does_not_use_stays(order):
    given = ["schedule.final_factor=0.2", "schedule.shape=step"]
    with pytest.raises(SettingsError, match=r"schedule.shape=step does not use schedule.final_factor=0.2. Remove it"):
        lr_schedule.check(resolve("cpu", given[::order]).schedule)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optimizer.type=SGDD"], "unknown optimizer.type 'SGDD'; did you mean 'SGD'"),
        (
            ["optimizer.type=SGD", "optimizer.params.beta=0.9"],
            r"unknown setting 'optimizer.params.beta'.*known: .*optimizer.params.nesterov",
        ),
        (["optimizer.params.momentum=0.9"], "unknown setting 'optimizer.params.momentum'"),
        (["optimizer.type=SGD", "optimizer.params.nesterov=1"], "optimizer.params.nesterov must be of type bool"),
        (["optimizer.type=3"], "optimizer.type must be of type str"),
    ],
)
def test_a_parameter_of_another_optimizer_is_rejected(overrides, sentence):
    with pytest.raises(SettingsError, match=sentence):
        resolve(None, overrides)


@pytest.fixture
def engine_file(tmp_path, monkeypatch):
    """Return the content of ds_config.json, and a function that writes it back into a copy that is read instead."""
    from config import settings

    engine = json.loads(settings.DS_CONFIG.read_text())
    monkeypatch.setattr(settings, "DS_CONFIG", tmp_path / "ds_config.json")
    return engine, lambda: settings.DS_CONFIG.write_text(json.dumps(engine))


def test_ds_config_json_declares_the_default_optimizer(engine_file):
    engine, write = engine_file
    engine["optimizer"] = {"type": "SGD", "params": {"lr": 0.3}}
    write()
    assert resolve(None, []).engine["optimizer"] == {
        "type": "SGD",
        "params": {"lr": 0.3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    }
    for name, value, sentence in (
        ("lr", -1.0, "optimizer.params.lr must be >= 0, got -1.0"),
        ("betas", [0.9, 0.99], "ds_config.json: unknown setting 'optimizer.params.betas'"),
    ):
        engine["optimizer"]["params"][name] = value
        write()
        with pytest.raises(SettingsError, match=sentence):
            resolve(None, [])


@pytest.mark.parametrize("path", [path for path in ENGINE_SETTINGS if not path.startswith("optimizer.params.")])
def test_a_key_of_ds_config_json_that_is_missing_or_of_another_type_is_one_sentence(engine_file, path):
    engine, write = engine_file
    *groups, name = path.split(".")
    group = engine
    for key in groups:
        group = group[key]
    group[name] = []
    write()
    with pytest.raises(SettingsError, match=rf"^ds_config.json: {path} must be of type \w+.*, not \[\]$"):
        resolve(None, [])
    del group[name]
    write()
    with pytest.raises(SettingsError, match=f"^ds_config.json lacks {path}; add it"):
        resolve(None, [])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zero_optimization": {"stage": 1}}, " lacks zero_optimization.offload_optimizer.device"),
        ({"bf16": {"enabled": "yes"}}, ": bf16.enabled must be .*, or one of autocast, masters, auto, not 'yes'"),
        ({"optimizer": {"type": "AdamW"}}, " lacks optimizer.params"),
        ({"fp16": {"enabled": True}}, ": fp16 is not supported; remove it, and choose bf16.enabled"),
    ],
)
def test_an_edit_of_ds_config_json_that_cannot_work_is_one_sentence(engine_file, change, sentence):
    engine, write = engine_file
    engine |= change
    write()
    with pytest.raises(SettingsError, match=f"^ds_config.json{sentence}"):
        resolve(None, [])


def test_a_whole_number_in_ds_config_json_may_be_a_float(engine_file):
    engine, write = engine_file
    engine |= {"gradient_clipping": 1, "bf16": {"enabled": "auto"}}
    write()
    assert resolve(None, ["gradient_clipping=0.5"]).engine["gradient_clipping"] == 0.5


def test_a_preset_may_name_options_before_the_kind_they_belong_to(preset):
    model = resolve(preset('[model]\nfeed_forward_options = { hidden = 12 }\nfeed_forward = "geglu"\n'), []).model
    assert (model.feed_forward, model.feed_forward_options) == ("geglu", {"hidden": 12})


def test_resolved_settings_survive_a_round_trip_through_json():
    settings = resolve(
        "cpu",
        [
            "model.feed_forward=geglu",
            "model.feed_forward_options.hidden=24",
            "optimizer.params.lr=2.0",
            "schedule.shape=linear",
        ],
    )
    again = Settings.from_dict(json.loads(json.dumps(settings.as_dict())))
    assert again == settings
    again.engine["optimizer"]["params"]["lr"] = 1.0
    assert settings.engine["optimizer"]["params"]["lr"] == 2.0


@pytest.mark.parametrize("name", preset_names())
def test_presets_with_muon_split_queries_keys_and_values_unless_measured_otherwise(name):
    optimizer = resolve(name, []).engine["optimizer"]
    if optimizer["type"] == "Muon":
        assert optimizer["params"]["split_qkv"] is (name not in ("speedrun", "cifar10-fast"))


def test_options_of_a_replaced_part_are_dropped_and_stay_dropped_in_a_reopened_run(preset):
    mine = preset(
        '[model]\nwidth = 40\nfeed_forward = "mlp"\nfeed_forward_options = { hidden = 12 }\n'
        "attention_options = { a = 1 }\n"
    )
    changed = resolve(mine, ["model.feed_forward=geglu"])
    assert changed.model.feed_forward_options == {} and changed.model.attention_options == {"a": 1}
    assert changed.model.width == 40
    other = resolve(mine, ["model.architecture=lenet"])
    assert other.model.width == resolve(None, []).model.width and other.model.attention_options == {}
    own = preset(f'[model]\narchitecture = "{__file__}:preset"\nfeed_forward = "geglu"\n')
    network = resolve(own, ["model.feed_forward=mlp"])
    assert network.model.feed_forward_options == {}
    for settings in (changed, other, network, resolve(mine, [])):
        assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


def test_a_run_of_another_version_is_rejected_by_the_name_of_the_setting():
    tree = resolve(None, []).as_dict()
    tree["model"]["wings"] = 2
    with pytest.raises(SettingsError, match=r"unknown setting 'model.wings'"):
        Settings.from_dict(tree)


def test_every_default_is_of_the_type_it_is_declared_as():
    for group in dataclasses.fields(Settings):
        value = getattr(Settings(), group.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else []:
            assert type(getattr(value, field.name)).__name__ == str(field.type).split("[")[0], (
                f"{group.name}.{field.name}"
            )


# --- declared ranges and choices -----------------------------------------------------------------------------------


def outside(declared) -> list:
    """Values that a declared interval excludes."""
    if not declared.within:
        return []
    opening, low, high, closing = INTERVAL.fullmatch(declared.within).groups()
    values = [math.nan, math.inf]
    if low != "-inf":
        values += [float(low) - 1, -1e30] + ([float(low)] if opening == "(" else [])
    if high != "inf":
        values += [float(high) + 0.5, 1e30] + ([float(high)] if closing == ")" else [])
    return values


def optimizer_with(path: str) -> list[str]:
    """The override that chooses an optimizer with the parameter at `path`."""
    name = path.removeprefix("optimizer.params.")
    chosen = next(kind for kind, params in OPTIMIZER_PARAMS.items() if name in params) if name != path else "AdamW"
    return [f"optimizer.type={chosen}"]


@pytest.mark.parametrize("path", [path for path, what in declared_settings().items() if what.within])
def test_a_number_out_of_its_declared_range_is_one_sentence(path):
    declared = declared_settings()[path]
    settings = resolve(None, optimizer_with(path))
    default: Any = settings.as_dict() | settings.engine
    for key in path.split("."):
        default = default[key]
    for value in outside(declared):
        if isinstance(default, int) and math.isfinite(value):
            value = math.floor(value) if value < 1 else math.ceil(value)
        elif isinstance(default, int):
            continue  # refused by its type
        given = [value] * len(default) if isinstance(default, list) else value
        with pytest.raises(SettingsError, match=re.escape(path) + " must") as refusal:
            resolve(None, [*optimizer_with(path), f"{path}={json.dumps(given)}"])
        assert "got" in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train_batch_size=0", "train_batch_size must be >= 1, got 0"),
        ("loss.label_smoothing=1.5", r"loss.label_smoothing must be in \[0, 1\], got 1.5"),
        ("model.dropout=NaN", r"model.dropout must be in \[0, 1\), got nan"),
        ("model.depth=0", r"model.depth must be in \[1, 1000\], got 0"),
        ("optimizer.params.lr=-1.0", "optimizer.params.lr must be >= 0, got -1.0"),
        ("optimizer.params.lr=1e999", "optimizer.params.lr must be >= 0, got inf"),
        ("optimizer.params.betas=[0.9]", r"optimizer.params.betas must be a list of 2 numbers, got \[0.9\]"),
        ('augmentation.erasing_scale=["a", 1]', "augmentation.erasing_scale must be a list of 2 numbers"),
        ("schedule.shape=cosin", "unknown schedule.shape 'cosin'; did you mean 'cosine'"),
        ("augmentation.policy=randaugment", "unknown augmentation.policy 'randaugment'; did you mean 'rand_augment'"),
        ("optimizer.type=adamw", "unknown optimizer.type 'adamw'; did you mean 'AdamW'"),
        ("lr=1e-3", "unknown setting 'lr'; did you mean 'optimizer.params.lr'"),
        ("engine=3", "engine is a group"),
        ("optimizer.params.lr=" + "9" * 400, "must be a finite number"),
    ],
)
def test_a_senseless_value_is_one_sentence(override, sentence):
    with pytest.raises(SettingsError, match=sentence):
        resolve(None, [override])


def test_unknown_names_are_found_without_importing_a_registry():
    for override, sentence in [
        ("model.feed_forward=MLP", "unknown feed-forward 'MLP'; did you mean 'mlp'"),
        ("model.architecture=resnet-50", "unknown architecture 'resnet-50'; did you mean 'resnet50'"),
        ("strategy=fdsp", "unknown strategy 'fdsp'; did you mean 'fsdp'"),
    ]:
        with pytest.raises(SettingsError, match=sentence):
            check_names(resolve(None, [override]))
    for name in ("vit", "sl-vit", "lenet", "timm:resnet18"):
        check_names(resolve(None, [f"model.architecture={name}"]))


def test_declared_choices_are_those_of_the_registries():
    from image_data.augmentation import FLIPS, POLICIES
    from optim.lr_schedule import SCHEDULES
    from parallel.compile import CHOICES

    declared = declared_settings()
    for path, names in [
        ("schedule.shape", SCHEDULES),
        ("augmentation.policy", POLICIES),
        ("augmentation.flip_mode", FLIPS),
        ("compile", CHOICES),
    ]:
        assert set(declared[path].choices) == set(names), path


def test_wsd_is_another_name_of_trapezoid():
    assert resolve(None, ["schedule.shape=wsd"]).schedule == resolve(None, ["schedule.shape=trapezoid"]).schedule


def test_names_of_a_table_are_read_without_importing_it():
    from models.feed_forward import FEED_FORWARDS

    assert set(table_names("models/feed_forward.py", "FEED_FORWARDS")) == set(FEED_FORWARDS)
    with pytest.raises(LookupError, match="NOTHING"):
        table_names("models/feed_forward.py", "NOTHING")


def test_the_sentence_for_an_unknown_name_lists_the_known_ones():
    assert (
        unknown("fruit", "aple", ["pear", "apple"])
        == "unknown fruit 'aple'; did you mean 'apple'? (known: apple, pear)"
    )
    assert "did you mean" not in unknown("fruit", "xyz", ["pear", "apple"])


def test_a_mistyped_setting_is_reported_without_loading_pytorch():
    heavy = "any(name.split('.')[0] in ('torch', 'deepspeed') for name in sys.modules)"
    code = f"import sys, config.settings; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=60).returncode == 0
