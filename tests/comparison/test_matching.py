"""Equal treatment: sizes matched to the first variant, and marks for what cannot be made equal."""

from __future__ import annotations

import pytest
from comparisons import COMMON, VARIANTS

from comparison.experiment_file import read
from comparison.matching import match_sizes
from comparison.variant_costs import costs, unequal_costs

UNSIZED = VARIANTS.replace("model.feed_forward_options.hidden = 32\n", "")


@pytest.fixture
def read_text(tmp_path, tiny):
    (tmp_path / "tiny.toml").write_text(tiny.read_text())

    def read_text(text: str):
        (tmp_path / "gates.toml").write_text(text)
        return match_sizes(read(tmp_path / "gates.toml"), num_classes=10, image_side=32)

    return read_text


@pytest.mark.parametrize("quantity", ["parameters", "flops"])
@pytest.mark.parametrize("kind", ["geglu", "swiglu", "conv_mlp", "pair", "mix", "chain", "soft_moe"])
def test_every_part_with_a_hidden_size_is_matched_within_1_percent(read_text, quantity, kind):
    text = f'match = "{quantity}"\nmodel.width = 96\nmodel.feed_forward_options.hidden = 200\n'
    experiment = read_text(text + COMMON + UNSIZED.replace("geglu", kind))
    plain, other = (getattr(cost, quantity) for cost in costs(experiment, 10, 32))
    assert abs(other / plain - 1) <= 0.01
    assert unequal_costs(experiment, costs(experiment, 10, 32))["gated"] == []
    size = experiment.variants[1].settings.model.feed_forward_options["hidden"]
    assert any(override == f"model.feed_forward_options.hidden={size}" for override in experiment.variants[1].overrides)


EVEN = """from torch import nn


class Even(nn.Module):
    def __init__(self, dims, hidden: int = 64):
        super().__init__()
        if hidden % 64:
            raise ValueError("hidden must be a multiple of 64")
        self.layers = nn.Sequential(nn.Linear(dims.width, hidden), nn.GELU(), nn.Linear(hidden, dims.width))

    def forward(self, x):
        return self.layers(x)
"""


def test_a_part_that_takes_only_certain_sizes_gets_the_nearest_one_that_was_tried(read_text, tmp_path):
    (tmp_path / "mine.py").write_text(EVEN)
    text = 'match = "parameters"\nmodel.feed_forward_options.hidden = 90\n' + COMMON
    experiment = read_text(text + UNSIZED.replace("geglu", f"{tmp_path}/mine.py:Even"))
    assert experiment.variants[1].settings.model.feed_forward_options["hidden"] in (64, 128)
    assert unequal_costs(experiment, costs(experiment, 10, 32))["gated"]


def test_a_size_that_fits_is_kept(read_text):
    experiment = read_text('match = "parameters"\n' + COMMON + VARIANTS)
    assert experiment.variants[1].settings.model.feed_forward_options == {"hidden": 32}


def test_without_match_a_larger_variant_is_marked_in_plan_and_report(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + UNSIZED, "--dry-run")
    assert "* gated" in out and "  plain" in out
    assert "warning: gated is not equal to plain: parameters: 58,880 instead of 48,460 (1.22 x)" in out
    assert 'note: match = "parameters" in the experiment file resizes' in out
    assert ask('match = "parameters"\n' + COMMON + UNSIZED)[0] == 0
    out = ask('match = "parameters"\n' + COMMON + UNSIZED, "--dry-run")[1]
    assert "warning" not in out and out.count("finished") == 4


def test_a_variant_may_be_excluded_from_matching_and_is_marked(read_text):
    text = 'match = "parameters"\n' + COMMON + UNSIZED + 'match = "none"\n'
    experiment = read_text(text)
    assert experiment.variants[1].settings.model.feed_forward_options == {}
    (sentence,) = unequal_costs(experiment, costs(experiment, 10, 32))["gated"]
    assert sentence.startswith("parameters: ")


def test_a_variant_without_a_free_dimension_is_marked(read_text):
    tree = UNSIZED.replace('"geglu"', '"fff"') + "model.feed_forward_options.depth = 3\n"
    experiment = read_text('match = "parameters"\n' + COMMON + tree)
    assert unequal_costs(experiment, costs(experiment, 10, 32))["gated"][0].startswith("parameters: ")


def test_variants_that_matching_makes_the_same_are_refused(ask, invented):
    text = COMMON + UNSIZED.replace('"geglu"', '"mlp"') + "model.feed_forward_options.hidden = 96\n"
    assert ask(text, "--dry-run")[0] == 0
    code, _, err = ask('match = "parameters"\n' + text, "--dry-run")
    assert code == 1 and "have the same settings with match" in err and err.count("\n") == 1


def test_parts_that_another_optimizer_trains_are_marked(read_text):
    """With Muon, the neurons of a tree get AdamW, which an experiment file does not say."""
    tree = UNSIZED.replace('"geglu"', '"fff"') + "model.feed_forward_options.depth = 4\n"
    experiment = read_text(COMMON + 'optimizer.type = "Muon"\n' + tree)
    assert (
        "feed_forward matrices are trained by AdamW instead of Muon (not treated alike)"
        in (unequal_costs(experiment, costs(experiment, 10, 32))["gated"])
    )
    own_choice = COMMON + VARIANTS + 'optimizer.type = "Muon"\n'  # here the optimizer is the idea of the variant
    experiment = read_text(own_choice)
    assert unequal_costs(experiment, costs(experiment, 10, 32))["gated"] == []


def test_an_attention_that_muon_does_not_split_is_marked(read_text, tmp_path):
    """`split_qkv` has an effect on layers with `row_splits` only."""
    (tmp_path / "mine.py").write_text(
        "from models.attention import Attention\n\n\nclass Joint(Attention):\n"
        "    def __init__(self, dims):\n        super().__init__(dims)\n        del self.qkv.row_splits\n"
    )
    own = UNSIZED.replace("model.feed_forward", "model.attention").replace('"geglu"', f'"{tmp_path}/mine.py:Joint"')
    muon = 'optimizer.type = "Muon"\noptimizer.params.split_qkv = true\n'
    sentence = "attention matrices are trained by Muon instead of Muon (q, k, v split) (not treated alike)"
    own_choice = own + "optimizer.params.split_qkv = false\n"  # listed with the settings of the variant
    texts = (muon + own, muon.replace("true", "false") + own, muon + own_choice)
    for text, marks in zip((COMMON + text for text in texts), ([sentence], [], []), strict=True):
        experiment = read_text(text)
        assert unequal_costs(experiment, costs(experiment, 10, 32))["gated"] == marks
