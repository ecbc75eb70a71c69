"""Feed-forwards: trees in both evaluations and against plain Python, soft mixture of experts, combined kinds.

pytest tests/models/test_feed_forward.py        no GPU, no data, some seconds
"""

from __future__ import annotations

import math

import pytest
import torch
from networks import dimensions
from torch import Tensor, nn

from common.errors import SettingsError
from models.cost import count_parameters
from models.feed_forward import FEED_FORWARDS, MLP, SoftMoE
from models.parts import make_part
from models.tree_feed_forward import EVALUATIONS, FFF, FFFFanOut, Tree
from optim.optimizers import build_optimizer
from optim.param_groups import parameter_groups

TREES = [
    *[("fff", {"depth": depth}) for depth in (0, 1, 2, 5, 7)],
    ("fff", {"depth": 3, "dense": 8}),
    *[
        ("fff_fan_out", {"fan_out": fan_out, "depth": depth})
        for fan_out, depth in ((1, 0), (1, 3), (2, 4), (3, 3), (4, 3), (5, 2), (7, 1))
    ],
    ("fff_fan_out", {"fan_out": 3, "depth": 2, "dense": 8}),
]


def make(name: str, options: dict, **changes) -> nn.Module:
    torch.manual_seed(0)
    return make_part(FEED_FORWARDS, "feed_forward", name, dimensions(**changes), options)


def tokens(count: int = 8, num_tokens: int = 17, width: int = 16) -> Tensor:
    return torch.randn(count, num_tokens, width, generator=torch.Generator().manual_seed(1))


def gradients(tree: Tree, x: Tensor, evaluation: str) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and the gradients of tokens and parameters under a random linear loss."""
    tree.evaluation = evaluation
    x = x.clone().requires_grad_()
    y = tree(x)
    towards = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return y.detach(), list(torch.autograd.grad((y * towards).sum(), [x, *tree.parameters()]))


@pytest.mark.parametrize(("name", "options"), TREES)
def test_masking_every_neuron_equals_visiting_the_path(name, options):
    tree = make(name, options)
    (by_mask, mask_gradients), (by_path, path_gradients) = (
        gradients(tree, tokens(), evaluation) for evaluation in ("mask", "path")
    )
    torch.testing.assert_close(by_mask, by_path, rtol=1e-5, atol=1e-5)
    for a, b in zip(mask_gradients, path_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, a.abs().max().item()))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


def one_token(tree: Tree, x: list[float]) -> tuple[list[float], int]:
    """The definition in plain Python: the output for one token, and the number of neurons that it used."""
    y, node, used = [0.0] * len(x), 0, 0
    for level in tree.levels:
        rows_in, bias, rows_out = level.rows_in.tolist(), level.bias.tolist(), level.rows_out.tolist()
        neurons = range(node * tree.group, (node + 1) * tree.group)
        scores = [sum(w * value for w, value in zip(rows_in[n], x, strict=True)) + bias[n] for n in neurons]
        if isinstance(tree, FFF):
            weights, child = [1.0], int(scores[0] > 0)
        else:
            weights = [tree.group * math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            child = scores.index(max(scores))
        for n, score, weight in zip(neurons, scores, weights, strict=True):
            y = [total + weight * gelu(score) * w for total, w in zip(y, rows_out[n], strict=True)]
            used += 1
        node = node * tree.branches + child
    return y, used


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(("name", "options"), [(name, options) for name, options in TREES if "dense" not in options])
def test_trees_equal_the_definition_token_by_token(name, options, evaluation):
    tree, x = make(name, {**options, "evaluation": evaluation}, width=6).double(), tokens(2, 5, width=6).double()
    expected = [[one_token(tree, token)[0] for token in image] for image in x.tolist()]
    torch.testing.assert_close(tree(x), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "options", "neurons", "visited"),
    [
        ("fff", {}, 255, 8),
        ("fff_fan_out", {}, 340, 16),  # the default sizes
        ("fff", {"depth": 2}, 7, 3),
        ("fff_fan_out", {"fan_out": 3, "depth": 2}, 39, 9),
    ],
)
def test_number_of_neurons_in_total_and_per_token(name, options, neurons, visited):
    tree = make(name, options)
    assert sum(len(level.bias) for level in tree.levels) == neurons
    assert tree.num_visited == visited == one_token(tree, tokens()[0, 0].tolist())[1]
    # The gradient of one token's output shows which neurons contributed to it.
    for token in tokens(1, 12)[0]:
        tree.zero_grad()
        tree(token.view(1, 1, -1)).sum().backward()
        assert sum(level.rows_out.grad.any(dim=1).sum() for level in tree.levels) == visited


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize(("name", "options"), TREES)
def test_every_level_learns_and_neurons_that_no_token_visits_have_gradient_zero(name, options, evaluation):
    tree = make(name, options)
    _, (_, *grads) = gradients(tree, tokens(), evaluation)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)
    few = gradients(make("fff", {"depth": 5}), tokens(1, 2), evaluation)[1][1:]
    visited = few[-3].any(dim=1).sum()  # leaves' rows in: two tokens, at most two leaves of 32
    assert 1 <= visited <= 2 and all(grad.isfinite().all() for grad in few)


def test_dense_rows_are_added_to_the_tree():
    tree, x = make("fff", {"depth": 3, "dense": 8}), tokens()
    alone = make("fff", {"depth": 3})
    alone.levels.load_state_dict(tree.levels.state_dict())
    dense = torch.nn.functional.gelu(x @ tree.dense_in.weight.T + tree.dense_in.bias) @ tree.dense_out.weight.T
    torch.testing.assert_close(tree(x), alone(x) + dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), [("fff", {}), ("fff_fan_out", {})])
def test_the_root_learns_slower_by_its_factor(name, options):
    tree = make(name, dict(depth=3, root_factor=0.125, dense=2, **options))
    rate_of = {id(p): group["lr"] for group in parameter_groups(tree, 0.8, 0.05) for p in group["params"]}
    for level, rate in zip(tree.levels, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert all(rate_of[id(p)] == pytest.approx(rate) for p in level.parameters())
    assert rate_of[id(tree.dense_in.weight)] == 0.8
    off = make(name, {"depth": 3})
    assert {group["lr"] for group in parameter_groups(off, 0.8, 0.05)} == {0.8}


def test_a_step_moves_the_root_by_its_factor():
    moved = {}
    for factor in (1.0, 0.25):
        tree = make("fff", {"depth": 2, "root_factor": factor})
        before = [level.rows_out.detach().clone() for level in tree.levels]
        optimizer = build_optimizer({"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0}}, tree, fused=False)
        tree(tokens()).square().mean().backward()
        optimizer.step()
        moved[factor] = [(level.rows_out - old).norm().item() for level, old in zip(tree.levels, before, strict=True)]
    assert [slow / full for slow, full in zip(moved[0.25], moved[1.0], strict=True)] == pytest.approx(
        [0.25, 0.5, 1.0], rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("fff", {"depth": -1}, "depth=-1"),
        ("fff", {"root_factor": 0.0}, "root_factor=0.0"),
        ("fff", {"dense": -1}, "dense=-1"),
        ("fff_fan_out", {"fan_out": 0}, "fan_out=0"),
        ("fff", {"evaluation": "paht"}, "did you mean 'path'"),
        ("mix", {"first": "gegelu"}, "did you mean 'geglu'"),
        ("chain", {"share": 1.0}, "share must be between 0 and 1, got 1.0"),
    ],
)
def test_invalid_option_values_raise_errors(name, options, said):
    with pytest.raises(SettingsError, match=said):
        make(name, options)


# Soft mixture of experts


@pytest.mark.parametrize("options", [{}, {"experts": 3, "slots": 2, "hidden": 5}, {"experts": 1, "slots": 1}])
def test_soft_experts_equal_the_definition(options):
    part, x = make("soft_moe", options).double(), tokens(2).double()
    with torch.no_grad():
        part.scale.fill_(3.0)
        for bias in (part.bias_expand, part.bias_contract):
            bias.normal_()
    for image, y in zip(x, part(x), strict=True):
        slot_vectors, num_slots = part.slot_vectors, len(part.slot_vectors) // part.experts
        scores = torch.stack(
            [
                torch.stack([3 * token.dot(slot) / token.norm() / slot.norm() for slot in slot_vectors])
                for token in image
            ]
        )
        outputs = []
        for s in range(len(slot_vectors)):
            weights = scores[:, s].exp() / scores[:, s].exp().sum()
            mean = sum(weight * token for weight, token in zip(weights, image, strict=True))
            e = s // num_slots
            hidden = torch.nn.functional.gelu(mean @ part.expand[e] + part.bias_expand[e, 0])
            outputs.append(hidden @ part.contract[e] + part.bias_contract[e, 0])
        for t in range(len(image)):
            weights = scores[t].exp() / scores[t].exp().sum()
            expected = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
            torch.testing.assert_close(y[t], expected, rtol=1e-9, atol=1e-9)


def test_soft_experts_have_as_many_slots_as_there_are_tokens():
    assert len(SoftMoE(dimensions()).slot_vectors) == 16  # 17 tokens over 4 experts
    assert len(SoftMoE(dimensions(), experts=100).slot_vectors) == 100  # at least one per expert


# Combined kinds, and sizes


@pytest.mark.parametrize("name", ["mix", "chain"])
@pytest.mark.parametrize("first", FEED_FORWARDS)
def test_any_two_kinds_mix_and_chain(name, first):
    x = tokens(2)
    for second in FEED_FORWARDS:
        part = make(name, {"first": first, "second": second}).eval()
        expected = part.first(x) + part.second(x) if name == "mix" else part.second(part.norm(part.first(x)))
        assert part(x).shape == x.shape and torch.equal(part(x), expected)


@pytest.mark.parametrize(
    ("kind", "hidden"),
    [
        *[(kind, 0) for kind in ("geglu", "swiglu", "conv_mlp", "pair", "mix", "chain")],
        ("pair", 96),
        ("mix", 96),
        ("chain", 96),
    ],
)
def test_sizes_are_those_of_one_mlp(kind, hidden):
    """At its usual size every dense kind has about the MLP's parameters; Pair, Mix and Chain at any."""
    mlp = count_parameters(make("mlp", {"hidden": hidden}, width=256))
    assert count_parameters(make(kind, {"hidden": hidden}, width=256)) == pytest.approx(mlp, rel=0.03)


def test_soft_experts_in_a_pair_keep_the_size_of_earlier_runs():
    """The slot vectors do not come out of `hidden`, so that networks trained earlier still load."""
    pair = make("pair", {"kind": "soft_moe", "hidden": 64}, width=32)
    assert pair.first.expand.shape[-1] == round(0.5 * 2 * 64 / 8)


def test_pair_and_mix_split_the_hidden_size():
    part = make("mix", {"first": "mlp", "second": "mlp", "hidden": 40, "share": 0.25})
    assert (part.first.expand.out_features, part.second.expand.out_features) == (10, 30)
    pair = make("pair", {"kind": "geglu", "hidden": 48})
    assert pair.first.contract.in_features == pair.second.contract.in_features == 16
    x = tokens()
    torch.testing.assert_close(pair(x), pair.first(x) + pair.second(pair.norm(x + pair.first(x))))


def test_swiglu_and_geglu_differ_in_their_gate_alone():
    geglu, swiglu, x = make("geglu", {}), make("swiglu", {}), tokens()
    swiglu.load_state_dict(geglu.state_dict())
    value, gate = swiglu.expand(x).chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(x), swiglu.contract(value * gate * gate.sigmoid()))
    assert not torch.allclose(swiglu(x), geglu(x), atol=1e-4)


def test_the_convolution_sees_neighbors_on_the_grid_and_never_class_tokens():
    part, x = make("conv_mlp", {}, num_prefix=2), tokens(1, 18)
    base = part(x)

    def changed(token: int) -> set[int]:
        other = x.clone()
        other[0, token] += 1
        return {t for t in range(18) if not torch.allclose(part(other)[0, t], base[0, t], atol=1e-6)}

    assert changed(0) == {0} and changed(1) == {1}
    row, column = 1, 2  # of a 4 x 4 grid
    neighbors = {2 + 4 * r + c for r in (row - 1, row, row + 1) for c in (column - 1, column, column + 1)}
    assert changed(2 + 4 * row + column) == neighbors


def test_the_convolution_is_added_to_its_input():
    part, x = make("conv_mlp", {}, num_prefix=2), tokens(1, 18)
    with torch.no_grad():
        part.neighbours.weight.zero_()
        part.neighbours.bias.zero_()
    torch.testing.assert_close(part(x), part.contract(torch.nn.functional.gelu(part.expand(x))))


def test_mlp_equals_the_formula():
    part, x = MLP(dimensions(), hidden=7), tokens()
    assert count_parameters(part) == 16 * 7 + 7 + 7 * 16 + 16
    torch.testing.assert_close(part(x), part.contract(torch.nn.functional.gelu(part.expand(x))))


def test_a_fan_out_of_one_is_a_stack_of_neurons_that_all_tokens_use():
    tree, x = FFFFanOut(dimensions(), fan_out=1, depth=3), tokens()
    rows_in, bias, rows_out = (
        torch.cat([getattr(level, name) for level in tree.levels]) for name in ("rows_in", "bias", "rows_out")
    )
    torch.testing.assert_close(tree(x), torch.nn.functional.gelu(x @ rows_in.T + bias) @ rows_out, rtol=1e-5, atol=1e-6)
