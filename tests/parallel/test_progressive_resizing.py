"""Progressive resizing: the first steps train on smaller images, under every strategy that can; evaluation does not."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import programs
import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_counts, largest_difference, network, perform, plain_loop, settings_for, train_and_save
from torch import nn

from common.errors import SettingsError
from config.settings import ResizingSettings, resolve
from model import TABLES, dimensions
from models.parts import Dimensions
from models.position import Rotation, resampled
from parallel.pipeline import Engine as Pipeline
from parallel.progressive_resizing import ProgressiveResizing
from training.console import Console
from training.resizing_check import check_resizing, choose_resizing

ON = ["resizing.initial_scale=0.5", "resizing.fraction=0.25"]
CONVOLUTIONS = [*ON, "model.feed_forward=conv_mlp"]  # they are applied to a grid of tokens, whose size changes
CASES = {
    "ddp": ("ddp", ON),
    "ddp, convolutions": ("ddp", CONVOLUTIONS),
    "ddp, accumulated": ("ddp", [*ON, "gradient_accumulation_steps=2"]),
    "zero 1": ("zero", CONVOLUTIONS),
    "zero 3": ("zero", [*ON, "zero_optimization.stage=3"]),
    "fsdp": ("fsdp", CONVOLUTIONS),
}


# --- one batch ------------------------------------------------------------------------------------------------------


def test_the_first_steps_have_smaller_images_and_the_others_the_full_ones():
    resizing = ProgressiveResizing(ResizingSettings(initial_scale=0.75, fraction=0.5), patch=4)
    images = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    small = resizing.resize(images, step=4, total_steps=10)
    expected = F.interpolate(images.float(), (24, 24), mode="bilinear", antialias=True).bfloat16()
    assert small.dtype == torch.bfloat16 and torch.equal(small, expected)
    assert resizing.resize(images, step=5, total_steps=10) is images
    assert (resizing.num_steps(10), resizing.pixel_share(32)) == (5, 0.5625)
    assert resizing.pixel_share(28) == (20 / 28) ** 2  # of the rounded side, not of the scale


@pytest.mark.parametrize(
    ("scale", "patch", "side", "expected"),
    [
        (0.75, 4, 32, 24),
        (0.7, 4, 32, 24),
        (0.5, 16, 224, 112),
        (0.01, 4, 32, 4),
        (0.999, 8, 32, 32),
        (1.0, 5, 32, 32),
        (0.9, 16, 30, 30),  # never more than the full side
    ],
)
def test_a_smaller_side_is_the_nearest_multiple_of_the_patch(scale, patch, side, expected):
    assert ProgressiveResizing(ResizingSettings(initial_scale=scale), patch).initial_side(side) == expected


@pytest.mark.parametrize("settings", [ResizingSettings(), ResizingSettings(initial_scale=0.5, fraction=0.0)])
def test_it_is_off_unless_asked_for(settings):
    resizing, images = ProgressiveResizing(settings, patch=4), torch.randn(2, 3, 8, 8)
    assert resizing.resize(images, step=0, total_steps=10) is images
    assert (resizing.is_on, resizing.num_steps(10), resizing.pixel_share(8)) == (False, 0, 1.0)


# --- engines --------------------------------------------------------------------------------------------------------


def trained() -> dict[str, dict]:
    import torch.distributed as dist

    results = {}
    with TemporaryDirectory() as folder:
        for name, (strategy, overrides) in CASES.items():
            results[name] = train_and_save(strategy, ["gradient_clipping=0.0", *overrides], Path(folder), look=True)
        dist.barrier()
    results["refusal"] = reference.refusal("pipeline", *ON, "parallel.stages=2")
    return results


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict:
    return perform(tmp_path_factory.mktemp("resizing") / "two", 2, reference.job, {}, {}, [f"{__name__}:trained"])


@pytest.mark.parametrize("case", CASES)
def test_engines_train_as_a_plain_loop_on_resized_images(on_two, case):
    """Of 20 steps, the first 5 have images of half the side; the evaluation after 4 steps has full ones."""
    settings = settings_for("gradient_clipping=0.0", *CASES[case][1])
    plain, found = plain_loop(settings), on_two[case]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert largest_difference(found["weights"], plain["weights"]) < 1e-4
    assert_counts(found["counts"], found["weights"], network(settings))
    assert "images of 0.5 x the side in the first 25% of the steps" in found["said"]


def test_the_pipeline_refuses_it(on_two):
    assert on_two["refusal"].startswith("strategy pipeline would not use resizing.initial_scale: what DeepSpeed sends")


# --- networks -------------------------------------------------------------------------------------------------------

PARTS = [(kind, name) for kind, table in TABLES.items() if kind not in ("architecture", "block") for name in table]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_takes_smaller_images(kind, name):
    options = ["model.feed_forward_options.depth=3"] if name.startswith("fff") else []
    small = ["model.width=16", "model.head_size=8", "model.heads=2"]
    settings = resolve("cpu", [*small, f"model.{kind}={name}", *options, "resizing.initial_scale=0.5"])
    check_resizing(settings, 10, 32)


@pytest.mark.parametrize("architecture", ["dhvt-t-4", "cct-7-3x1", "timm:vit_tiny_patch16_224"])
def test_a_network_of_one_size_is_refused(architecture):
    settings = resolve("cpu", [f"model.architecture={architecture}", "resizing.initial_scale=0.5"])
    with pytest.raises(SettingsError, match=r"was built for images of 32 pixels and fails on the 16 pixels .*scale=1$"):
        check_resizing(settings, 10, 32)


@pytest.mark.parametrize(
    ("override", "refusal", "reason"),
    [
        ("model.architecture=cct-7-3x1", None, "the network was built for images of 32 pixels and fails on the 24"),
        ("strategy=pipeline", Pipeline.resizing_refusal, "what DeepSpeed sends between stages has one shape"),
        ("model.patch=16", None, "in whole patches of 16 pixels, the side nearest to it is the full one of 32 pixels"),
        ("model.feed_forward=geglu", None, None),
    ],
)
def test_resizing_of_the_preset_is_turned_off_where_it_cannot_be_used(override, refusal, reason):
    settings, out = resolve("cpu", [override]), StringIO()
    choose_resizing(settings, [override], refusal, 10, 32, Console(out=out))
    if reason:
        assert f"resizing  off instead of the preset's initial_scale=0.75: {reason}" in out.getvalue()
        assert settings.resizing == ResizingSettings()
    else:
        assert not out.getvalue() and settings == resolve("cpu", [override])


def test_resizing_that_is_asked_for_is_not_turned_off():
    given = ["model.architecture=cct-7-3x1", "resizing.fraction=0.3"]
    with pytest.raises(SettingsError, match=r"resizing.initial_scale=0.75: the network was built .*scale=1$"):
        choose_resizing(resolve("cpu", given), given, None, 10, 32, Console(out=StringIO()))


@pytest.mark.parametrize(
    ("patch", "works"),
    [(16, r"--set resizing.initial_scale=0.5 \(16 pixels\), or --set resizing.initial_scale=1"),
     (32, r"--set resizing.initial_scale=1")],
)  # fmt: skip
def test_a_scale_without_effect_is_refused_where_it_is_asked_for(patch, works):
    given = [f"model.patch={patch}", "resizing.initial_scale=0.75"]
    with pytest.raises(SettingsError, match=rf"^resizing.initial_scale=0.75: in whole patches .* Choose {works}$"):
        choose_resizing(resolve("cpu", given), given, None, 10, 32, Console(out=StringIO()))
    check_resizing(resolve("cpu", ["model.patch=16", "resizing.initial_scale=0.5"]), 10, 32)


def test_train_py_records_that_the_resizing_of_the_preset_was_turned_off(shapes, tmp_path):
    words = ["--data-dir", shapes, "--runs-dir", tmp_path, "--name", "one-size", "--max-steps", 1, "--no-report"]
    network = ["--set", "model.architecture=lenet", "--set", "train_batch_size=8", "--set", "compile=off"]
    done = programs.run("train.py", "--preset", "cpu", *network, *words)
    assert "resizing  off instead of the preset's initial_scale=0.75: the network was built" in done.out
    facts = json.loads((tmp_path / "one-size" / "run.json").read_text())
    assert facts["settings"]["resizing"]["initial_scale"] == 1.0


class Own(nn.Module):
    """A part that takes one number of tokens, and reads values, so that it cannot run on the meta device."""

    def __init__(self, dims):
        super().__init__()
        self.num_tokens = dims.num_tokens

    def forward(self, x):
        assert float(x.sum()) is not None and x.shape[1] == self.num_tokens, "too few tokens"
        return x


def test_an_own_part_of_one_size_is_refused_with_its_reason():
    settings = resolve("cpu", ["resizing.initial_scale=0.5"])
    with mock.patch.dict(TABLES["feed_forward"], residual_conv=Own):
        with pytest.raises(SettingsError, match="too few tokens"):
            check_resizing(settings, 10, 32)
        settings.resizing = ResizingSettings()
        check_resizing(settings, 10, 32)


# --- positions ------------------------------------------------------------------------------------------------------


def test_a_smaller_grid_keeps_the_place_of_each_position():
    """Positions that are linear functions of the place stay so: token i of 2 is at 4 / 2 (i + 1/2) - 1/2 of 4."""
    place = torch.arange(4.0)
    grid = torch.stack([place.repeat_interleave(4), place.repeat(4)], dim=1)
    table = torch.cat([torch.full((1, 2), 9.0), grid])
    expected = torch.tensor([[9.0, 9.0], [0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]])
    assert torch.allclose(resampled(table, 1, 5), expected)
    assert resampled(table, 1, 17) is table
    with pytest.raises(ValueError, match="7 tokens are no square grid after 1 others"):
        resampled(table, 1, 7)


def test_rotary_positions_of_a_smaller_grid_turn_by_the_angle_of_their_place():
    """The first pair of channels turns by the row: in a grid of 2 of 4 by 0.5 and 2.5 radians."""
    rotation = Rotation(dims_of_16_pixels(), base=100.0)
    x = torch.zeros(1, 1, 4, 8)
    x[..., 0] = 1.0
    turned = rotation(x)
    rows = torch.tensor([0.5, 0.5, 2.5, 2.5])
    assert torch.allclose(turned[0, 0, :, 0], rows.cos()) and torch.allclose(turned[0, 0, :, 4], rows.sin())


def test_tokens_that_an_attention_adds_are_not_on_the_grid():
    """A grid of 3 of 4 with 8 head tokens has more tokens than the full grid."""
    rotation = Rotation(dims_of_16_pixels(), base=100.0)
    rotation.num_added = 8
    x = torch.randn(1, 1, 9 + 8, 8)
    alone = Rotation(dims_of_16_pixels(), base=100.0)
    assert torch.equal(rotation(x)[:, :, 9:], x[:, :, 9:])
    assert torch.equal(rotation(x)[:, :, :9], alone(x[:, :, :9]))


def dims_of_16_pixels() -> Dimensions:
    """Return the sizes of a network for images of 16 pixels, 4 x 4 tokens without a prefix."""
    return dimensions(resolve("cpu", ["model.head_size=8"]).model, 10, 16)
