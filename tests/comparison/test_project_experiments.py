"""Experiment files of the project: all can be planned, and their costs are counted."""

from __future__ import annotations

import pytest
from project_files import project_files

from common.paths import PROJECT
from comparison.experiment_file import read
from comparison.matching import match_sizes
from comparison.paired_tests import seeds_needed
from comparison.planning import Data, make_task
from comparison.variant_costs import cost_of, costs
from config.settings import ResizingSettings

EXPERIMENTS = [PROJECT / name for name in project_files(".toml") if name.startswith("experiments/")]
OTHER_QUESTIONS = ("attention-defaults", "space-to-depth")  # besides the eight ideas and the recipes


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_can_be_planned_at_both_sizes(path, size):
    experiment = match_sizes(read(path, size), num_classes=100, image_side=32)
    found = costs(experiment, num_classes=100, image_side=32)
    assert len(found) == len(experiment.variants) and all(cost.parameters > 0 and cost.flops > 0 for cost in found)
    if size == "full":  # the first system's network, and enough seeds to confirm something
        for variant, cost in zip(experiment.variants, found, strict=True):
            assert variant.name != "mlp" or cost.parameters == 4_417_608
        assert experiment.seeds >= seeds_needed(len(experiment.variants) - 1)


def test_all_eight_ideas_are_in_one_experiment():
    variants = {variant.name for variant in read(PROJECT / "experiments" / "eight-ideas.toml").variants}
    ideas = [path for path in EXPERIMENTS if "recipe" not in path.name and path.stem not in OTHER_QUESTIONS]
    others = {variant.name for path in ideas for variant in read(path).variants} - {"fff-mask"}  # which is fff
    assert len(ideas) == 9 and variants == others


def test_flops_are_those_of_the_matrix_products():
    """An MLP's hidden neuron costs one product in and one out for each of the 64 tokens, each C multiply-adds of 2."""
    experiment = read(PROJECT / "experiments" / "hidden-size.toml", "small")
    usual, small = costs(experiment, 100, 32)
    assert usual.flops - small.flops == 2 * (4 * 128 - 256) * 64 * 128 * 2 * 2
    assert usual.parameters - small.parameters == 2 * (4 * 128 - 256) * (2 * 128 + 1)


def test_the_flops_of_a_run_count_the_smaller_images_of_its_first_steps():
    experiment = read(PROJECT / "experiments" / "hidden-size.toml", "small")
    variant = experiment.variants[0]
    plain = cost_of(variant, 100, 32)
    variant.settings.resizing = ResizingSettings(initial_scale=0.5, fraction=0.25)
    cost = cost_of(variant, 100, 32)
    assert plain.training_flops(100, 400, 8) == 3 * 8 * 100 * plain.flops and cost.flops == plain.flops
    # The matrix products and convolutions act on a quarter of the tokens; the products of attention on a sixteenth.
    assert 0.2 < cost.initial_flops / cost.flops < 0.26
    assert cost.training_flops(100, 400, 8) == 3 * 8 * 100 * cost.initial_flops
    assert cost.training_flops(101, 400, 8) == 3 * 8 * (100 * cost.initial_flops + cost.flops)


def test_a_planned_run_asks_for_the_resizing_of_its_preset_so_that_no_variant_trains_without():
    experiment = read(PROJECT / "experiments" / "space-to-depth.toml", "small")
    experiment.variants[0].settings.resizing = ResizingSettings(initial_scale=0.75)
    data = Data(PROJECT, 45_000, 100, 32, None)
    asks = [
        "resizing.initial_scale=0.75" in make_task(experiment, v, 0, data, PROJECT, 400).arguments
        for v in experiment.variants
    ]
    assert asks == [True, False]
