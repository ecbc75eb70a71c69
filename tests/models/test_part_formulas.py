"""Parts against their definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from networks import SIDE, dimensions, images, tiny, tokens
from torch import Tensor, nn

from config.settings import resolve
from model import build_model
from models.attention import Attention, HeadTokens, LocalitySelfAttention, MultiQuery, NormedAttention
from models.cost import count_parameters
from models.layers import DropPath
from models.parts import make_part
from models.patch_embedding import PATCH_EMBEDDINGS
from models.pooling import POOLINGS
from models.position import POSITIONS, Rotation
from training.resizing_check import network_problem


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
        expected = [
            pixel(c, top + i + dy, left + j + dx)
            for dy, dx in shifts
            for c in range(3)
            for i in range(4)
            for j in range(4)
        ]
        assert patches[token].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", PATCH_EMBEDDINGS)
@pytest.mark.parametrize("patch", [2, 4])
def test_a_patch_embedding_makes_one_token_a_patch_row_by_row(name, patch):
    torch.manual_seed(0)
    choices = {"conv_stem": ({"layers": 2}, {"layers": 3}), "residual_stem": ({}, {"space_to_depth": True})}
    for options in choices.get(name, ({},)):
        part = make_part(PATCH_EMBEDDINGS, "patch_embedding", name, dimensions(patch=patch, width=24), options).eval()
        grid = SIDE // patch
        before, x = part(images(1)), images(1)
        assert before.shape == (1, grid**2, 24)
        x[:, :, -1, -1] += 1000  # the last pixel moves the last token most
        assert (part(x) - before).abs().sum(-1).argmax() == grid**2 - 1


def test_space_to_depth_and_a_convolution_are_a_strided_convolution_of_the_pixels():
    """A 3x3 convolution over squares of 2x2 pixels is one of 6x6 pixels with stride 2."""
    part = make_part(
        PATCH_EMBEDDINGS, "patch_embedding", "residual_stem", dimensions(patch=4), {"first": 4, "space_to_depth": True}
    )
    weight = part.steps[0].weight  # (A, 12, 3, 3); channel 4 c + 2 i + j is color c at row i and column j of the square
    assert weight.shape == (8, 12, 3, 3) and len(part.steps) == 1 + 1 + 3  # one stage less than without
    wide = weight.reshape(8, 3, 2, 2, 3, 3).permute(0, 1, 4, 2, 5, 3).reshape(8, 3, 6, 6)
    x = images(2)
    squares = torch.nn.functional.pixel_unshuffle(x, 2)
    expected = torch.nn.functional.conv2d(x, wide, stride=2, padding=2)
    torch.testing.assert_close(part.steps[0](squares), expected, rtol=1e-4, atol=1e-5)


def plain_attention(part: Attention, x: Tensor, temperature: float, diagonal: bool) -> Tensor:
    """Softmax attention written out for one image."""
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
    torch.testing.assert_close(
        lsa(x)[0], plain_attention(lsa, x, math.exp(0.3) * 8**-0.5, diagonal=False), rtol=1e-4, atol=1e-6
    )


def test_lsa_refuses_smaller_images_of_one_token():
    """With no token to attend to, attention would be zero or NaN."""
    lsa = LocalitySelfAttention(dimensions(num_prefix=0))
    with pytest.raises(ValueError, match="attention=lsa: no token attends to itself"):
        lsa(tokens(num_tokens=1))
    settings = resolve(None, ["model.patch=8", "model.pooling=mean", "resizing.initial_scale=0.25"])
    problem = network_problem(settings, 10, 32)
    assert problem is not None and "fails on the 8 pixels of the first steps (" in problem and "lsa" in problem


@pytest.mark.parametrize("kind", [Attention, LocalitySelfAttention, MultiQuery, NormedAttention, HeadTokens])
def test_attention_drops_weights_in_training_only(kind):
    part, x = kind(dimensions(dropout=0.5)), tokens()
    part.project_dropout.p = 0.0
    assert not torch.equal(part(x), part(x))
    assert torch.equal(part.eval()(x), part(x))


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
def test_qk_norm_makes_scores_independent_of_the_scale_of_tokens(norm):
    part = NormedAttention(dimensions(), norm=norm, qkv_std=1.0)  # far above the epsilon of the norm
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
        head_tokens.append(
            torch.cat([F.gelu(part.lift_norm(lifted[:8])), F.gelu(part.lift_norm(lifted[8:]))]) + part.head_position[h]
        )
    y = plain_attention(part, torch.cat([x, torch.stack(head_tokens)[None]], dim=1), 8**-0.5, diagonal=True)
    expected = torch.cat([y[:1] + y[17:].mean(0), y[1:17]])
    torch.testing.assert_close(part(x)[0], expected, rtol=1e-4, atol=1e-6)


def test_rotary_scores_depend_on_relative_position_and_class_tokens_are_not_rotated():
    dims = dimensions(image_side=32, head_size=16)  # a grid of 8 x 8
    rotate = Rotation(dims, base=100.0)
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    everywhere = torch.ones(1, 1, dims.num_tokens + 2, 1)  # two head tokens at the end
    turned_q, turned_k = rotate(everywhere * q)[0, 0], rotate(everywhere * k)[0, 0]
    for turned, vector in ((turned_q, q), (turned_k, k)):
        assert torch.equal(turned[0], vector) and torch.equal(turned[-2:], vector.expand(2, -1))
        torch.testing.assert_close(turned.norm(dim=-1), vector.norm().expand(len(turned)))
    scores = (turned_q[1:-2] @ turned_k[1:-2].T).view(8, 8, 8, 8)  # row and column of the query, of the key
    for dy, dx in ((0, 0), (1, 0), (0, 1), (2, -3), (-4, 2)):
        same = [scores[y, x, y + dy, x + dx] for y in range(8) for x in range(8) if 0 <= y + dy < 8 and 0 <= x + dx < 8]
        torch.testing.assert_close(torch.stack(same), same[0].expand(len(same)), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])  # along a row is not along a column


def test_fixed_positions_are_not_parameters_and_do_not_change_class_tokens():
    part = POSITIONS["sin_cos"](dimensions())
    added = part(torch.zeros(1, 17, 16))[0]
    assert not list(part.parameters()) and not part.state_dict()
    assert not added[0].any() and len({tuple(row) for row in added.tolist()}) == 17


def test_sequence_pooling_is_a_weighted_mean():
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


@pytest.mark.parametrize(("depth", "last"), [(3, (0.0, 0.2, 0.4)), (1, (0.4,))])
@pytest.mark.parametrize("block", ["pre_norm", "macaron"])
def test_stochastic_depth_rises_linearly_over_the_blocks(block, depth, last):
    blocks = [
        [1 - part.keep.item() for part in layer.modules() if isinstance(part, DropPath)]
        for layer in tiny(block=block, depth=depth, drop_path=0.4)
    ]
    rates = [found for found in blocks if found]
    assert len(rates) == depth and all(len(found) == len(rates[0]) >= 2 for found in rates)
    for found, expected in zip(rates, last, strict=True):
        assert found == pytest.approx([expected] * len(found))


def test_layer_scale_starts_blocks_near_the_identity():
    block, x = tiny(layer_scale=1e-6)[1].eval(), tokens()
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-4)
    assert not torch.allclose(tiny()[1].eval()(x), x, atol=1e-2)


def test_the_first_preset_keeps_its_parameter_count():
    assert count_parameters(build_model(resolve("spt-lsa", []).model, 100, 32)) == 4_417_608
