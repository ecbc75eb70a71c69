"""Progressive resizing: the first steps train on smaller images, under every strategy that can; evaluation does not."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import assert_counts, largest_difference, network, perform, plain_loop, settings_for, train_and_save

from common.errors import SettingsError
from config.settings import ResizingSettings, resolve
from model import TABLES
from parallel.progressive_resizing import ProgressiveResizing
from training.resizing_check import check_resizing

ON = ["model.position=none", "model.pooling=mean", "resizing.initial_scale=0.5", "resizing.fraction=0.25"]
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
    assert (resizing.num_steps(10), resizing.pixel_share) == (5, 0.5625)


@pytest.mark.parametrize(
    ("scale", "patch", "side", "expected"),
    [(0.75, 4, 32, 24), (0.7, 4, 32, 24), (0.5, 16, 224, 112), (0.01, 4, 32, 4), (0.999, 8, 32, 32), (1.0, 5, 32, 32)],
)
def test_a_smaller_side_is_the_nearest_multiple_of_the_patch(scale, patch, side, expected):
    assert ProgressiveResizing(ResizingSettings(initial_scale=scale), patch).initial_side(side) == expected


@pytest.mark.parametrize("settings", [ResizingSettings(), ResizingSettings(initial_scale=0.5, fraction=0.0)])
def test_it_is_off_unless_asked_for(settings):
    resizing, images = ProgressiveResizing(settings, patch=4), torch.randn(2, 3, 8, 8)
    assert resizing.resize(images, step=0, total_steps=10) is images
    assert (resizing.is_on, resizing.num_steps(10), resizing.pixel_share) == (False, 0, 1.0)


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
    assert on_two["refusal"].startswith("strategy pipeline would not use resizing.initial_scale: DeepSpeed fixes")


# --- networks -------------------------------------------------------------------------------------------------------

ONE_SIZE = {("position", "learned"), ("position", "sin_cos"), ("position", "rotary")}
PARTS = [(kind, name) for kind, table in TABLES.items() if kind not in ("architecture", "block") for name in table]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_part_takes_both_sizes_or_is_refused(kind, name):
    options = ["model.feed_forward_options.depth=3"] if name.startswith("fff") else []
    settings = resolve(
        "cpu", ["model.width=16", "model.head_size=8", "model.heads=2", f"model.{kind}={name}", *options]
    )
    settings.resizing = ResizingSettings(initial_scale=0.5)
    if (kind, name) in ONE_SIZE:
        with pytest.raises(SettingsError, match=r"built for images of 32 pixels and fails on the 16 .*position=none"):
            check_resizing(settings, 10, 32)
        settings.resizing = ResizingSettings()
    check_resizing(settings, 10, 32)
