"""Properties that every entry of every part registry has.

    pytest tests/models/test_parts.py        no GPU, no data, some seconds

The tests loop over the registries, so a new entry is tested without changes here.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import CLASSES, SIDE, TINY, dimensions, images, tiny, tokens
from torch import nn

from common.errors import SettingsError
from model import BLOCKS, TABLES, build_layers, build_model
from models.attention import ATTENTIONS
from models.cost import count_parameters
from models.feed_forward import FEED_FORWARDS
from models.parts import Dimensions, make_part
from models.pooling import POOLINGS
from models.position import POSITIONS
from optim.param_groups import parameter_groups
from parallel.buffers import normalize_in_fp32

# Trainable parameters of the tiny network with that entry instead of TINY's own. A change makes recorded runs
# incomparable: change a number only on purpose.
PARAMETERS = {
    "patch_embedding": {
        "linear": 7_655,
        "spt": 11_207,
        "conv_stem": 8_271,
        "residual_stem": 470_695,
        "pool_stem": 109_591,
    },
    "position": {"learned": 11_207, "sin_cos": 10_935, "rotary": 10_935, "none": 10_935},
    "block": {"pre_norm": 11_207, "pair": 15_527, "macaron": 15_527, "no_attention": 9_061},
    "attention": {"softmax": 11_205, "lsa": 11_207, "qk_norm": 11_237, "head_tokens": 11_589, "multi_query": 10_693},
    "feed_forward": {
        "mlp": 11_207,
        "geglu": 11_283,
        "swiglu": 11_283,
        "pair": 11_303,
        "mix": 11_227,
        "chain": 11_291,
        "conv_mlp": 12_487,
        "residual_conv": 16_231,
        "soft_moe": 24_489,
        "fff": 23_781,
        "fff_fan_out": 29_391,
    },
    "pooling": {"class_token": 11_207, "mean": 11_175, "sequence": 11_191},
}
PART_TABLES = {kind: table for kind, table in TABLES.items() if kind in PARAMETERS}
ENTRIES = [(kind, name) for kind, table in PART_TABLES.items() for name in table]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_layers_keep_shapes_and_return_contiguous_tensors(kind, name):
    x = images()
    for layer in build_layers(replace(TINY, **{kind: name}), CLASSES, SIDE):
        x = layer(x)
        assert x.is_contiguous(), f"{type(layer).__name__} returns a strided tensor, which a pipeline cannot send"
        assert x.shape in ((3, 16, 16), (3, 17, 16), (3, CLASSES))
    assert x.shape == (3, CLASSES)


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_feed_forwards_keep_their_shape(name, num_prefix):
    dims = dimensions(num_prefix=num_prefix)
    x = tokens(num_tokens=dims.num_tokens)
    assert make_part(FEED_FORWARDS, "feed_forward", name, dims, {})(x).shape == x.shape


class Own(nn.Identity):
    """A user-defined part: an option whose default does not tell its type, and one without a default."""

    def __init__(self, dims: Dimensions, size: int, act: str | None = None):
        super().__init__()
        self.act = act


def test_an_option_with_the_default_none_takes_a_value_and_one_without_default_must_have_one():
    table, dims = {"own": Own}, dimensions()
    assert make_part(table, "feed_forward", "own", dims, {"act": "gelu", "size": 3}).act == "gelu"
    with pytest.raises(SettingsError, match="feed_forward=own needs a value: --set model.feed_forward_options.size="):
        make_part(table, "feed_forward", "own", dims, {})


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_parameter_gets_a_finite_gradient(kind, name):
    model = tiny(**{kind: name})
    F.cross_entropy(model(images(8)), torch.arange(8) % CLASSES).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} does not affect the output"
        assert parameter.grad.isfinite().all(), f"{parameter_name} has a non-finite gradient"


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, name in ENTRIES if kind in ("feed_forward", "attention")]
)
def test_every_parameter_of_a_part_affects_its_output(kind, name):
    torch.manual_seed(0)
    part, x = make_part(PART_TABLES[kind], kind, name, dimensions(), {}), tokens(16)
    (part(x) * tokens(16).flip(0)).sum().backward()
    idle = [parameter_name for parameter_name, parameter in part.named_parameters() if not parameter.grad.any()]
    assert not idle, f"{', '.join(idle)}: gradient is 0 everywhere"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_image_does_not_depend_on_other_images_of_its_batch(kind, name):
    model = tiny(**{kind: name}).eval()
    x = images(4)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x)[[3, 1]], model(x[[3, 1]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_evaluation_is_deterministic_and_weights_round_trip(kind, name):
    changes = {kind: name, "dropout": 0.5, "drop_path": 0.5, "layer_scale": 0.1}
    model = tiny(**changes).eval()
    scores = model(images())
    assert torch.equal(scores, model(images()))
    torch.manual_seed(99)
    other = build_model(replace(TINY, **changes), CLASSES, SIDE).eval()
    assert not torch.equal(scores, other(images()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(scores, other(images()))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_half_precision_runs_by_casting_and_by_autocast(kind, name):
    """DeepSpeed casts parameters to bf16 but not buffers; PyTorch engines use autocast."""
    model = tiny(**{kind: name, "layer_scale": 0.1, "drop_path": 0.5})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(images()).float(), torch.arange(3)).backward()
    normalize_in_fp32(model)
    for parameter in model.parameters():
        parameter.data, parameter.grad = parameter.data.bfloat16(), None
    scores = model(images().to(torch.bfloat16))
    F.cross_entropy(scores.float(), torch.arange(3)).backward()
    assert (
        scores.dtype == torch.bfloat16
        and scores.isfinite().all()
        and all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    )


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_parameter_counts_are_those_recorded(kind, name):
    count = count_parameters(tiny(**{kind: name}))
    if name not in PARAMETERS[kind]:
        warnings.warn(f"model.{kind}={name} has {count:,} parameters here: record it in PARAMETERS", stacklevel=1)
        return
    assert count == PARAMETERS[kind][name]


def test_recorded_counts_are_of_entries_that_exist():
    for kind, counts in PARAMETERS.items():
        assert set(counts) <= set(TABLES[kind])


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_optimizer_hints_name_parameters_and_no_parameter_is_a_scalar(kind, name):
    model = tiny(**{kind: name, "layer_scale": 0.1})
    for module in model.modules():
        own = {parameter_name for parameter_name, _ in module.named_parameters(recurse=False)}
        hints = {*getattr(module, "no_weight_decay", ()), *getattr(module, "learning_rate_factors", ())}
        missing = hints - own
        assert all(hasattr(module, hint) and getattr(module, hint) is None for hint in missing), (
            f"{type(module).__name__}: {missing}"
        )
    assert all(parameter.ndim > 0 for parameter in model.parameters()), (
        "DeepSpeed cannot broadcast a 0-dimensional parameter"
    )
    grouped = [parameter for group in parameter_groups(model, 1e-3, 0.05) for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_attentions_positions_and_poolings_combine(attention, position, pooling):
    """An attention without `rotate` is rejected with the rotary position, never silently left unrotated."""
    changes = {"attention": attention, "position": position, "pooling": pooling, "depth": 1}
    if position == "rotary" and not hasattr(ATTENTIONS[attention](dimensions()), "rotate"):
        with pytest.raises(SettingsError, match="rotary"):
            tiny(**changes)
        return
    assert tiny(**changes).eval()(images()).isfinite().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rotary_reaches_every_attention(attention):
    with_, without = (tiny(attention=attention, position=position).eval() for position in ("rotary", "none"))
    with_.load_state_dict(without.state_dict())  # rotary has no parameters
    assert not torch.allclose(with_(images()), without(images()), atol=1e-4)


def test_an_attention_without_rotate_is_rejected_with_rotary(monkeypatch):
    class Plain(nn.Module):
        def __init__(self, dims: Dimensions):
            super().__init__()

    monkeypatch.setitem(ATTENTIONS, "plain", Plain)
    with pytest.raises(SettingsError, match=r"model\.attention=plain does not support model\.position=rotary"):
        tiny(attention="plain", position="rotary")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_every_feed_forward_fits_every_block(block, feed_forward):
    assert tiny(block=block, feed_forward=feed_forward, depth=1).eval()(images(1)).isfinite().all()
