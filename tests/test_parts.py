"""What every entry of every table of parts promises, and what single parts must equal.

    pytest tests/test_parts.py        no GPU, no data, some seconds

The tests loop over the tables: a new class and its line in a table are tested without a word here.
"""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import settings as settings_module
from attention import ATTENTIONS, Attention, HeadTokens, LocalitySelfAttention, MultiQuery, NormedAttention
from embedding import PATCH_EMBEDDINGS, POOLINGS, POSITIONS, Rotation
from feedforward import FEED_FORWARDS
from model import BLOCKS, TABLES, build_layers, build_model, count_parameters
from optimizers import parameter_groups
from parts import Dimensions, make_part, part_options
from settings import HERE, ModelSettings, SettingsError, resolve, table_names

TINY = ModelSettings(patch=4, width=16, depth=2, heads=2, head_size=8, feed_forward_options={}, dropout=0.0)
CLASSES, SIDE = 5, 16
# Trainable parameters of the tiny network with that entry in place of TINY's own. A change here is a change of what runs
# recorded so far mean: make it on purpose.
PARAMETERS = {
    "patch_embedding": {"linear": 7_655, "spt": 11_207, "conv_stem": 8_271},
    "position": {"learned": 11_207, "sin_cos": 10_935, "rotary": 10_935, "none": 10_935},
    "block": {"pre_norm": 11_207, "pair": 15_527, "macaron": 15_527},
    "attention": {"softmax": 11_205, "lsa": 11_207, "qk_norm": 11_237, "head_tokens": 11_589, "multi_query": 10_693},
    "feed_forward": {
        "mlp": 11_207, "geglu": 11_283, "swiglu": 11_283, "pair": 11_303, "mix": 11_227, "chain": 11_291,
        "conv_mlp": 12_487, "soft_moe": 24_489, "fff": 23_781, "fff_fan_out": 29_391,
    },
    "pooling": {"class_token": 11_207, "mean": 11_175, "sequence": 11_191},
}
PART_TABLES = {kind: table for kind, table in TABLES.items() if kind in PARAMETERS}
ENTRIES = [(kind, name) for kind, table in PART_TABLES.items() for name in table]


def dimensions(**changes) -> Dimensions:
    """Those of the tiny network, with changes."""
    dims = Dimensions(CLASSES, SIDE, patch=4, width=16, depth=2, heads=2, head_size=8, num_prefix=1, dropout=0.0)
    return replace(dims, **changes)


def tiny(**changes) -> nn.Sequential:
    """The tiny network with other settings, the same weights each time."""
    torch.manual_seed(0)
    return build_model(replace(TINY, **changes), CLASSES, SIDE)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 3, num_tokens: int = 17) -> Tensor:
    return torch.randn(count, num_tokens, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_shapes_are_kept_and_layers_hand_on_contiguous_tensors(kind, name):
    x = images()
    for layer in build_layers(replace(TINY, **{kind: name}), CLASSES, SIDE):
        x = layer(x)
        assert x.is_contiguous(), f"{type(layer).__name__} hands on a strided tensor, which a pipeline cannot send"
        assert x.shape in ((3, 16, 16), (3, 17, 16), (3, CLASSES))
    assert x.shape == (3, CLASSES)


@pytest.mark.parametrize("name", FEED_FORWARDS)
@pytest.mark.parametrize("num_prefix", [0, 1, 2])
def test_feed_forwards_keep_their_shape(name, num_prefix):
    dims = dimensions(num_prefix=num_prefix)
    x = tokens(num_tokens=dims.num_tokens)
    assert make_part(FEED_FORWARDS, "feed_forward", name, dims, {})(x).shape == x.shape


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_parameter_gets_a_finite_gradient(kind, name):
    model = tiny(**{kind: name})
    F.cross_entropy(model(images(8)), torch.arange(8) % CLASSES).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{parameter_name} has no part in the output"
        assert parameter.grad.isfinite().all(), f"{parameter_name} has a gradient that is not finite"


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in ENTRIES if kind in ("feed_forward", "attention")])
def test_every_parameter_of_a_part_changes_what_it_gives(kind, name):
    torch.manual_seed(0)
    part, x = make_part(PART_TABLES[kind], kind, name, dimensions(), {}), tokens(16)
    (part(x) * tokens(16).flip(0)).sum().backward()
    idle = [parameter_name for parameter_name, parameter in part.named_parameters() if not parameter.grad.any()]
    assert not idle, f"{', '.join(idle)}: gradient 0 in all places"


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_image_does_not_depend_on_its_batch_mates(kind, name):
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
    """DeepSpeed casts a module to bfloat16, PyTorch's own engines leave it as it is and autocast."""
    model = tiny(**{kind: name, "layer_scale": 0.1})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(images()).float(), torch.arange(3)).backward()
    scores = model.to(torch.bfloat16)(images().to(torch.bfloat16))
    assert scores.dtype == torch.bfloat16 and scores.isfinite().all()


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
def test_hints_for_the_optimiser_name_real_parameters_and_none_is_a_scalar(kind, name):
    model = tiny(**{kind: name, "layer_scale": 0.1})
    for module in model.modules():
        own = {parameter_name for parameter_name, _ in module.named_parameters(recurse=False)}
        hints = {*getattr(module, "no_weight_decay", ()), *getattr(module, "learning_rate_factors", ())}
        missing = hints - own
        assert all(hasattr(module, hint) and getattr(module, hint) is None for hint in missing), f"{type(module).__name__}: {missing}"
    assert all(parameter.ndim > 0 for parameter in model.parameters()), "DeepSpeed cannot broadcast a 0-dimensional parameter"
    grouped = [parameter for group in parameter_groups(model, 1e-3, 0.05) for parameter in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(model.parameters()))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_attentions_positions_and_poolings_combine(attention, position, pooling):
    """An attention without a place for rotations is refused with the rotary position, never silently left unturned."""
    changes = {"attention": attention, "position": position, "pooling": pooling, "depth": 1}
    if position == "rotary" and not hasattr(ATTENTIONS[attention](dimensions()), "rotate"):
        with pytest.raises(SettingsError, match="rotary"):
            tiny(**changes)
        return
    assert tiny(**changes).eval()(images()).isfinite().all()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rotary_reaches_every_attention(attention):
    with_, without = (tiny(attention=attention, position=position).eval() for position in ("rotary", "none"))
    with_.load_state_dict(without.state_dict())  # no parameters of its own
    assert not torch.allclose(with_(images()), without(images()), atol=1e-4)


def test_an_attention_without_rotation_is_refused_with_rotary(monkeypatch):
    class Plain(nn.Module):
        def __init__(self, dims: Dimensions):
            super().__init__()

    monkeypatch.setitem(ATTENTIONS, "plain", Plain)
    with pytest.raises(SettingsError, match=r"model\.attention=plain has no place for model\.position=rotary"):
        tiny(attention="plain", position="rotary")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("feed_forward", FEED_FORWARDS)
def test_every_feed_forward_fits_every_block(block, feed_forward):
    assert tiny(block=block, feed_forward=feed_forward, depth=1).eval()(images(1)).isfinite().all()


# What is refused, and how it is said


@pytest.mark.parametrize(("kind", "wrong", "meant"), [
    ("feed_forward", "gegelu", "geglu"), ("attention", "softmx", "softmax"), ("patch_embedding", "convstem", "conv_stem"),
    ("position", "sincos", "sin_cos"), ("pooling", "class-token", "class_token"), ("block", "macron", "macaron"),
])
def test_an_unknown_name_is_refused_with_the_nearest_one(kind, wrong, meant):
    with pytest.raises(SettingsError, match=f"'{wrong}'; did you mean '{meant}'"):
        tiny(**{kind: wrong})


@pytest.mark.parametrize("kind", [kind for kind in PART_TABLES if f"{kind}_options" in vars(TINY)])
def test_options_of_one_kind_are_refused_by_another_and_types_are_checked(kind):
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


@pytest.mark.parametrize(("changes", "said"), [
    ({"attention": "multi_query", "attention_options": {"kv_heads": 3}}, "kv_heads=3 does not divide model.heads=2"),
    ({"attention": "multi_query", "attention_options": {"kv_heads": 0}}, "kv_heads=0"),
    ({"attention": "qk_norm", "attention_options": {"norm": "rmss"}}, "did you mean 'rms'"),
    ({"attention": "head_tokens", "heads": 3}, "model.heads=3 does not divide model.width=16"),
    ({"position": "rotary", "head_size": 6}, "model.head_size that 4 divides, not 6"),
    ({"position": "sin_cos", "width": 18}, "model.width that 4 divides, not 18"),
    ({"patch_embedding": "conv_stem", "patch_embedding_options": {"layers": 1}}, "patch=4, layers=1"),
    ({"patch": 5}, "model.patch=5 does not divide the image side 16"),
    ({"feed_forward": "soft_moe", "feed_forward_options": {"experts": 0}}, "experts must be at least 1"),
])
def test_values_that_cannot_work_are_refused_by_name(changes, said):
    with pytest.raises(SettingsError, match=said.replace(".", r"\.")):
        tiny(**changes)


def test_options_reach_the_parts_from_the_command_line():
    settings = resolve("cpu", ["model.attention=multi_query", "model.attention_options.kv_heads=2", "model.position=rotary",
                               "model.position_options.base=50", "model.layer_scale=1e-4"])
    block = build_layers(settings.model, 10, 32)[1]
    assert block.attention.part.kv_heads == 2 and block.attention.scale[0].item() == pytest.approx(1e-4)
    angle = 50 ** -(1 / 8)  # second frequency of head_size 32, first row
    assert block.attention.part.rotate.sin[8, 1].item() == pytest.approx(math.sin(angle), rel=1e-5)


# A new idea: one class and one line


class Mine(nn.Module):
    """Each token by a learnt factor for each channel."""

    def __init__(self, dims: Dimensions, start: float = 1.0):
        super().__init__()
        self.factor = nn.Parameter(torch.full((dims.width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_a_new_class_and_one_line_are_all_it_takes(monkeypatch, tmp_path):
    monkeypatch.setitem(FEED_FORWARDS, "mine", Mine)
    model = tiny(feed_forward="mine", feed_forward_options={"start": 2.0})
    assert model[1].feed_forward.part.factor[0] == 2.0
    assert tiny(feed_forward="mix", feed_forward_options={"first": "mine"})(images()).shape == (3, CLASSES)

    source = (HERE / "feedforward.py").read_text()
    source = source.replace("FEED_FORWARDS = {", 'class Mine(nn.Module):\n    """Mine alone."""\n\n\nFEED_FORWARDS = {\n    "mine": Mine,')
    (tmp_path / "feedforward.py").write_text(source)
    shutil.copy(HERE / "feedforward_trees.py", tmp_path)
    monkeypatch.setattr(settings_module, "HERE", tmp_path)
    assert table_names("feedforward.py", "FEED_FORWARDS")["mine"] == "Mine alone."


@pytest.mark.parametrize(("file", "table"), [
    ("feedforward.py", "FEED_FORWARDS"), ("attention.py", "ATTENTIONS"), ("embedding.py", "PATCH_EMBEDDINGS"),
    ("embedding.py", "POSITIONS"), ("embedding.py", "POOLINGS"), ("model.py", "BLOCKS"),
])
def test_the_help_shows_every_entry_with_its_first_line(file, table):
    module = __import__(file.removesuffix(".py"))
    shown = table_names(file, table)
    assert shown == {name: part.__doc__.splitlines()[0] for name, part in getattr(module, table).items()}
    assert all(shown.values())


# Single parts against their definition


def test_shifted_patches_equal_the_pixels_of_five_shifted_images():
    dims = dimensions(patch=4)
    part = PATCH_EMBEDDINGS["spt"](dims)
    part.norm, part.project = nn.Identity(), nn.Identity()
    x = images(1)
    patches = part(x)[0]

    def pixel(channel: int, y: int, x_: int) -> float:
        return x[0, channel, y, x_].item() if 0 <= y < SIDE and 0 <= x_ < SIDE else 0.0

    shifts = [(0, 0), (-2, -2), (-2, 2), (2, -2), (2, 2)]
    for token in (0, 3, 5, 12, 15):
        top, left = 4 * (token // 4), 4 * (token % 4)
        expected = [pixel(c, top + i + dy, left + j + dx) for dy, dx in shifts for c in range(3) for i in range(4) for j in range(4)]
        assert patches[token].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("patch", [2, 4])
def test_a_patch_embedding_makes_one_token_a_patch_row_by_row(name, patch):
    for options in ({"layers": 2}, {"layers": 3}) if name == "conv_stem" else ({},):
        part = make_part(PATCH_EMBEDDINGS, "patch_embedding", name, dimensions(patch=patch, width=24), options).eval()
        grid = SIDE // patch
        before, x = part(images(1)), images(1)
        assert before.shape == (1, grid**2, 24)
        x[:, :, -1, -1] += 1000  # the last pixel moves the last token most
        assert (part(x) - before).abs().sum(-1).argmax() == grid**2 - 1


def plain_attention(part: Attention, x: Tensor, temperature: float, diagonal: bool) -> Tensor:
    """Softmax attention written out, for one image."""
    q, k, v = part.qkv(x)[0].view(-1, 3, 2, 8).unbind(1)
    heads = []
    for h in range(2):
        scores = q[:, h] @ k[:, h].T * temperature
        if not diagonal:
            scores.fill_diagonal_(-math.inf)
        heads.append(scores.softmax(-1) @ v[:, h])
    return part.project(torch.cat(heads, dim=1))


def test_softmax_and_lsa_equal_the_formula():
    x, softmax, lsa = tokens(1), Attention(dimensions()), LocalitySelfAttention(dimensions())
    torch.testing.assert_close(softmax(x)[0], plain_attention(softmax, x, 8**-0.5, diagonal=True), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        lsa.log_scale += 0.3
    torch.testing.assert_close(lsa(x)[0], plain_attention(lsa, x, math.exp(0.3) * 8**-0.5, diagonal=False), rtol=1e-4, atol=1e-6)


def test_multi_query_shares_keys_and_values():
    plain, grouped = Attention(dimensions()), MultiQuery(dimensions(), kv_heads=2)
    grouped.load_state_dict(plain.state_dict())
    torch.testing.assert_close(grouped(tokens()), plain(tokens()))  # as many as heads: the plain attention
    single = MultiQuery(dimensions(), kv_heads=1)
    q, k, v = plain.qkv.weight.view(3, 2, 8, 16).unbind(0)
    with torch.no_grad():  # both heads of a plain attention are given the shared keys and values
        plain.qkv.weight.copy_(torch.cat([q.flatten(0, 1), k[0], k[0], v[0], v[0]]))
        single.qkv.weight.copy_(torch.cat([q.flatten(0, 1), k[0], v[0]]))
    single.project.load_state_dict(plain.project.state_dict())
    torch.testing.assert_close(single(tokens()), plain(tokens()))


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_normed_queries_make_scores_blind_to_the_size_of_tokens(norm):
    part = NormedAttention(dimensions(), norm=norm)
    q, k, v = part.heads_of(tokens())
    larger_q, larger_k, _ = part.heads_of(100 * tokens())
    torch.testing.assert_close(q, larger_q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(k, larger_k, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(q.square().mean(-1), torch.ones(3, 2, 17), rtol=1e-3, atol=1e-3)


def test_head_tokens_equal_the_formula():
    part, x = HeadTokens(dimensions()), tokens(1)
    mean = x[0].mean(0)
    head_tokens = []
    for h in range(2):
        lifted = part.lift(mean[8 * h : 8 * h + 8])
        head_tokens.append(torch.cat([F.gelu(part.lift_norm(lifted[:8])), F.gelu(part.lift_norm(lifted[8:]))]) + part.head_position[h])
    y = plain_attention(part, torch.cat([x, torch.stack(head_tokens)[None]], dim=1), 8**-0.5, diagonal=True)
    expected = torch.cat([y[:1] + y[17:].mean(0), y[1:17]])
    torch.testing.assert_close(part(x)[0], expected, rtol=1e-4, atol=1e-6)


def test_rotary_scores_depend_on_the_distance_alone_and_class_tokens_do_not_turn():
    dims = dimensions(image_side=32, head_size=16)  # a grid of 8 x 8
    rotate = Rotation(dims, base=100.0)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    everywhere = torch.ones(1, 1, dims.num_tokens + 2, 1)  # two head tokens behind
    turned_q, turned_k = rotate(everywhere * q)[0, 0], rotate(everywhere * k)[0, 0]
    for turned, vector in ((turned_q, q), (turned_k, k)):
        assert torch.equal(turned[0], vector) and torch.equal(turned[-2:], vector.expand(2, -1))
        torch.testing.assert_close(turned.norm(dim=-1), vector.norm().expand(len(turned)))
    scores = (turned_q[1:-2] @ turned_k[1:-2].T).view(8, 8, 8, 8)  # row and column of the query, of the key
    for dy, dx in ((0, 0), (1, 0), (0, 1), (2, -3), (-4, 2)):
        same = [scores[y, x, y + dy, x + dx] for y in range(8) for x in range(8) if 0 <= y + dy < 8 and 0 <= x + dx < 8]
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])  # along a row is not along a column


def test_fixed_positions_are_no_parameters_and_leave_class_tokens_alone():
    part = POSITIONS["sin_cos"](dimensions())
    added = part(torch.zeros(1, 17, 16))[0]
    assert not list(part.parameters()) and not part.state_dict()
    assert not added[0].any() and len({tuple(row) for row in added.tolist()}) == 17


def test_sequence_pooling_is_a_mean_by_learnt_weights():
    part, x = POOLINGS["sequence"](dimensions(num_prefix=0)), tokens()
    weights = (x @ part.score.weight[0]).softmax(dim=1)
    torch.testing.assert_close(part(x), (weights.unsqueeze(-1) * x).sum(1))
    nn.init.zeros_(part.score.weight)
    torch.testing.assert_close(part(x), x.mean(1))


def test_macaron_halves_its_feed_forwards_around_attention():
    block, x = tiny(block="macaron")[1].eval(), tokens()
    x1 = x + 0.5 * block.before.part(block.before.norm(x))
    x2 = x1 + block.attention.part(block.attention.norm(x1))
    torch.testing.assert_close(block(x), x2 + 0.5 * block.after.part(block.after.norm(x2)))


def test_layer_scale_starts_blocks_near_the_identity():
    block, x = tiny(layer_scale=1e-6)[1].eval(), tokens()
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-4)
    assert not torch.allclose(tiny()[1].eval()(x), x, atol=1e-2)


def test_the_first_preset_keeps_its_parameter_count():
    assert count_parameters(build_model(resolve("spt-lsa", []).model, 100, 32)) == 4_417_608
