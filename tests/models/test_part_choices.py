"""Names and options of parts: error messages for invalid ones, and adding a new part."""

from __future__ import annotations

import importlib
import math
import shutil
from typing import Literal

import pytest
import torch
from networks import CLASSES, images, tiny
from torch import Tensor, nn

from common.errors import SettingsError
from common.paths import PROJECT
from config import catalog
from config.catalog import table_names
from config.settings import ModelSettings, resolve
from model import TABLES, build_layers
from models.feed_forward import FEED_FORWARDS
from models.parts import Dimensions, fits, part_options

PART_TABLES = {kind: table for kind, table in TABLES.items() if kind != "architecture"}


# Invalid names and options


@pytest.mark.parametrize(
    ("kind", "wrong", "meant"),
    [
        ("feed_forward", "gegelu", "geglu"),
        ("attention", "softmx", "softmax"),
        ("patch_embedding", "convstem", "conv_stem"),
        ("position", "sincos", "sin_cos"),
        ("pooling", "class-token", "class_token"),
        ("block", "macron", "macaron"),
    ],
)
def test_an_unknown_name_is_rejected_with_the_nearest_one(kind, wrong, meant):
    with pytest.raises(SettingsError, match=f"'{wrong}'; did you mean '{meant}'"):
        tiny(**{kind: wrong})


@pytest.mark.parametrize("kind", [kind for kind in PART_TABLES if kind != "block"])  # blocks here have no options
def test_options_of_another_part_and_wrong_types_are_rejected(kind):
    table = PART_TABLES[kind]
    every_option = {option: default for part in table.values() for option, default in part_options(part).items()}
    for name, part in table.items():
        own = part_options(part)
        assert all(type(default) in (int, float, str, bool) for default in own.values())
        for option, value in every_option.items():
            if option not in own:
                with pytest.raises(SettingsError, match=f"{kind}={name}: unknown option '{option}'"):
                    tiny(**{kind: name, f"{kind}_options": {option: value}})
        for option, default in own.items():
            with pytest.raises(SettingsError, match=f"option {option} must be of type {type(default).__name__}"):
                tiny(**{kind: name, f"{kind}_options": {option: ["a list"]}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"attention": "multi_query", "attention_options": {"kv_heads": 3}},
            "kv_heads=3 does not divide model.heads=2",
        ),
        ({"attention": "multi_query", "attention_options": {"kv_heads": 0}}, "kv_heads=0"),
        ({"attention_options": {"qkv_std": -0.02}}, "qkv_std must be at least 0, got -0.02"),
        ({"attention_options": {"qkv_std": math.nan}}, "qkv_std must be at least 0, got nan"),
        (
            {"attention": "multi_query", "attention_options": {"qkv_std": -0.02}},
            "qkv_std must be at least 0, got -0.02",
        ),
        ({"attention": "qk_norm", "attention_options": {"norm": "rmss"}}, "did you mean 'rms'"),
        ({"attention": "head_tokens", "heads": 3}, "model.heads=3 does not divide model.width=16"),
        (
            {"attention": "lsa", "patch": 16, "pooling": "mean"},
            "an image of 16 pixels is a single token at model.patch=16",
        ),
        ({"position": "rotary", "head_size": 6}, "needs a multiple of 4 as model.head_size, got 6"),
        (
            {"position": "rotary", "block": "no_attention"},
            "acts inside attention, and model.block=no_attention has none",
        ),
        ({"position": "rotary", "position_options": {"base": 0.0}}, "base must be above 0, got 0.0"),
        ({"position": "sin_cos", "width": 18}, "needs a multiple of 4 as model.width, got 18"),
        (
            {"patch_embedding": "conv_stem", "patch_embedding_options": {"layers": 1}},
            "needs 2 to 8 layers with model.patch=4, got 1. Set model.patch_embedding_options.layers to 2",
        ),
        ({"patch": 5}, "model.patch=5 does not divide the image side 16"),
        ({"feed_forward": "soft_moe", "feed_forward_options": {"experts": 0}}, "experts must be at least 1"),
    ],
)
def test_invalid_option_values_raise_errors(changes, said):
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        tiny(**changes)


@pytest.mark.parametrize(("patch", "fitting"), [(3, 1), (6, 2), (512, 256)])
def test_a_patch_that_no_convolution_stem_has_is_answered_with_one_that_works(patch, fitting):
    settings = ModelSettings(patch_embedding="conv_stem", patch_embedding_options={"layers": 8}, patch=patch)
    side = 512 if patch == 512 else 5 * patch
    with pytest.raises(SettingsError, match=f"power of 2 up to 256 .* got {patch}. Set model.patch to {fitting}"):
        build_layers(settings, CLASSES, side)
    settings.patch = fitting
    with torch.device("meta"):
        build_layers(settings, CLASSES, side)


@pytest.mark.parametrize("attention", sorted(TABLES["attention"]))
@pytest.mark.parametrize(("options", "expected"), [({}, 0.02), ({"qkv_std": 0.1}, 0.1), ({"qkv_std": 0.0}, 48**-0.5)])
def test_the_standard_deviation_of_queries_keys_and_values(attention, options, expected):
    """0 stands for PyTorch's uniform weights up to 1 / sqrt(C), thus 1 / sqrt(3 C)."""
    torch.manual_seed(0)
    part = tiny(attention=attention, attention_options=options, width=16, heads=8, head_size=64)[1].attention.part
    for weight in part.qkv.weight.split(part.qkv.row_splits):
        assert weight.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("value", "wanted", "expected"),
    [
        (3, int, True),
        (True, int, False),
        (3, float, True),
        (True, float, False),
        ("a", str, True),
        (None, str | None, True),
        (2.5, str | None, False),
        ([1, 2], list[int], True),
        ([1, 0.5], list[int], False),
        ({}, dict[str, int], True),
        ("rms", Literal["rms", "layer"], True),
        ("rmss", Literal["rms", "layer"], False),
        ("a", nn.Module, True),  # no setting can have this type, so the part itself has to check
    ],
)
def test_a_value_fits_the_annotation_of_an_option(value, wanted, expected):
    assert fits(value, wanted) is expected


def test_options_reach_the_parts_from_the_command_line():
    settings = resolve(
        "cpu-quick",
        [
            "model.attention=multi_query",
            "model.attention_options.kv_heads=2",
            "model.position=rotary",
            "model.position_options.base=50",
            "model.layer_scale=1e-4",
        ],
    )
    block = build_layers(settings.model, 10, 32)[1]
    assert block.attention.part.kv_heads == 2 and block.attention.scale[0].item() == pytest.approx(1e-4)
    angle = 50 ** -(1 / 16)  # second frequency of head_size 64, first row
    assert block.attention.part.rotate.sin[8, 1].item() == pytest.approx(math.sin(angle), rel=1e-5)


# A new part: one class and one line


class Mine(nn.Module):
    """Multiply each token by a learned factor per channel."""

    def __init__(self, dims: Dimensions, start: float = 1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((dims.width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_new_part_needs_one_class_and_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(FEED_FORWARDS, "mine", Mine)
    model = tiny(feed_forward="mine", feed_forward_options={"start": 2.0})
    assert model[1].feed_forward.part.factor[0] == 2.0
    assert tiny(feed_forward="mix", feed_forward_options={"first": "mine"})(images()).shape == (3, CLASSES)

    source = (PROJECT / "models/feed_forward.py").read_text()
    source = source.replace(
        "FEED_FORWARDS = {", 'class Mine(nn.Module):\n    """Mine alone."""\n\n\nFEED_FORWARDS = {\n    "mine": Mine,'
    )
    (tmp_path / "models").mkdir()
    (tmp_path / "models/feed_forward.py").write_text(source)
    shutil.copy(PROJECT / "models/tree_feed_forward.py", tmp_path / "models")
    monkeypatch.setattr(catalog, "PROJECT", tmp_path)
    assert table_names("models/feed_forward.py", "FEED_FORWARDS")["mine"] == "Mine alone."


@pytest.mark.parametrize(
    ("file", "table"),
    [
        ("models/feed_forward.py", "FEED_FORWARDS"),
        ("models/attention.py", "ATTENTIONS"),
        ("models/patch_embedding.py", "PATCH_EMBEDDINGS"),
        ("models/position.py", "POSITIONS"),
        ("models/pooling.py", "POOLINGS"),
        ("model.py", "BLOCKS"),
    ],
)
def test_the_help_shows_every_entry_with_its_first_line(file, table):
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    shown = table_names(file, table)
    assert shown == {name: part.__doc__.splitlines()[0] for name, part in getattr(module, table).items()}
    assert all(shown.values())
