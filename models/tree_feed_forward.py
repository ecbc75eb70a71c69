"""Fast feedforward networks (FFF): trees of neurons in which a token uses only the neurons on its path to a leaf.

`depth` counts the steps from the root to a leaf, so a tree has depth + 1 levels. Each node holds a group of neurons. A
neuron has an input row, a bias and an output row, as in an MLP. Its score for token x is `row_in . x + bias`; its
value is a function of the scores of its group; it adds `value * row_out` to the output. The scores of a node also
choose the child that the token visits next. That choice has no gradient: a neuron learns from the tokens that visit
it, and contributes 0 to all others.

Two evaluations give the same result and the same gradients (`evaluation`):
    mask    compute every neuron, then zero those off the path: two large products; cost grows with their number
    path    gather the rows of the visited neurons, level by level: cost grows with depth, but two rows are moved for
            each token and neuron
Measured at commit 5db9433 (results/LOG.md), width 512: on one CPU core `path` is faster from about 1,000 neurons on.
On a GPU (H200) it is faster from 1,000 to 4,000 neurons on in evaluation, and almost never in training. The two agree
up to rounding, so a token whose score is 0 up to rounding may take the other branch. On a GPU `path` accumulates
gradients in a nondeterministic order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from models.parts import Dimensions


class Level(nn.Module):
    """All nodes at one depth, with separate parameters, so that each depth can have its own learning rate."""

    def __init__(self, num_nodes: int, group: int, width: int, num_visited: int, learning_rate_factor: float):
        super().__init__()
        num_neurons = num_nodes * group
        self.rows_in = nn.Parameter(torch.empty(num_neurons, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.empty(num_neurons).uniform_(-(width**-0.5), width**-0.5))
        self.rows_out = nn.Parameter(torch.empty(num_neurons, width).uniform_(-(num_visited**-0.5), num_visited**-0.5))
        self.learning_rate_factors = dict.fromkeys(("rows_in", "bias", "rows_out"), learning_rate_factor)


class Tree(nn.Module):
    """Base class of both trees: `group` neurons and `branches` children per node.

    Subclasses define the value of a neuron and the choice of the child.
    """

    def __init__(
        self, dims: Dimensions, group: int, branches: int, depth: int, dense: int, evaluation: str, root_factor: float
    ):
        super().__init__()
        for name, value, allowed, least in (
            ("depth", depth, depth >= 0, "0"),
            ("fan_out", group, group >= 1, "1"),
            ("dense", dense, dense >= 0, "0"),
            ("root_factor", root_factor, root_factor > 0, "a number above 0, for example 0.1"),
        ):
            if not allowed:
                raise SettingsError(f"a feed-forward tree cannot have {name}={value}. Set it to {least} or more")
        if evaluation not in EVALUATIONS:
            raise SettingsError(unknown("evaluation", evaluation, list(EVALUATIONS)))
        self.group, self.branches, self.evaluation = group, branches, evaluation
        self.num_visited = (depth + 1) * group  # neurons that a token uses
        self.levels = nn.ModuleList(
            Level(branches**d, group, dims.width, self.num_visited, root_factor ** (1 - d / depth) if depth else 1.0)
            for d in range(depth + 1)
        )
        # A small MLP that every token uses; its output has no bias.
        self.dense_in = nn.Linear(dims.width, dense) if dense else None
        self.dense_out = nn.Linear(dense, dims.width, bias=False) if dense else None
        self.dropout = nn.Dropout(dims.dropout)

    def values(self, scores: Tensor) -> Tensor:
        """Return the factors of the output rows of a visited node, (..., group) -> (..., group)."""
        raise NotImplementedError

    def child(self, scores: Tensor) -> Tensor:
        """Return the index of the child that comes next, (..., group) -> (...), from 0."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (B T, C)
        y = EVALUATIONS[self.evaluation](self, tokens).view_as(x)
        if self.dense_in is not None and self.dense_out is not None:
            y = y + self.dense_out(F.gelu(self.dense_in(x)))
        return self.dropout(y)

    def every_neuron(self, tokens: Tensor) -> Tensor:
        """Evaluate every neuron and mask those off the path, (N, C) -> (N, C): the evaluation `mask`."""
        rows_in, bias, rows_out = (
            torch.cat([getattr(level, name) for level in self.levels]) for name in ("rows_in", "bias", "rows_out")
        )
        scores = F.linear(tokens, rows_in, bias).unflatten(1, (-1, self.group))  # (N, nodes, group)
        values = self.values(scores) * self.visited(scores).unsqueeze(-1)
        return values.flatten(1) @ rows_out

    def visited(self, scores: Tensor) -> Tensor:
        """Return which nodes a token visits, scores (N, nodes, group) -> (N, nodes)."""
        num_nodes = [self.branches**d for d in range(len(self.levels))]
        children = torch.arange(self.branches, device=scores.device)
        levels = [scores.new_ones(len(scores), 1, dtype=torch.bool)]
        for child in self.child(scores).split(num_nodes, dim=1)[:-1]:
            levels.append((levels[-1].unsqueeze(-1) & (child.unsqueeze(-1) == children)).flatten(1))
        return torch.cat(levels, dim=1)

    def path_only(self, tokens: Tensor) -> Tensor:
        """Evaluate only the neurons on the path, (N, C) -> (N, C): the evaluation `path`."""
        y = torch.zeros_like(tokens)
        node = tokens.new_zeros(len(tokens), dtype=torch.long)  # index within its level, from 0
        level: Any
        for level in self.levels:
            rows_in, rows_out = (
                F.embedding(node, rows.view(-1, self.group * rows.shape[1])).view(len(node), self.group, -1)
                for rows in (level.rows_in, level.rows_out)
            )
            scores = torch.einsum("nc,ngc->ng", tokens, rows_in) + F.embedding(node, level.bias.view(-1, self.group))
            y = y + torch.einsum("ng,ngc->nc", self.values(scores), rows_out)
            node = node * self.branches + self.child(scores)
        return y


EVALUATIONS = {"mask": Tree.every_neuron, "path": Tree.path_only}


class FFF(Tree):
    """Fast feedforward (FFF) as in UltraFastBERT: binary tree, the sign of a score picks the child (arXiv 2311.10770).

    Depth 7 has 255 neurons, of which a token uses 8. The value of a neuron is GELU(score), as in an MLP. The FFF of
    arXiv 2308.14711 is another network: its nodes only route, by soft decisions in training, and its leaves are small
    MLPs. `dense` adds that many neurons that every token uses. `root_factor` multiplies the learning rate at the root
    and rises geometrically to 1 at the leaves. Below 1, decisions shared by all tokens change more slowly than those
    of few.
    """

    def __init__(
        self, dims: Dimensions, depth: int = 7, dense: int = 0, evaluation: str = "mask", root_factor: float = 1.0
    ):
        super().__init__(dims, 1, 2, depth, dense, evaluation, root_factor)

    def values(self, scores: Tensor) -> Tensor:
        return F.gelu(scores)

    def child(self, scores: Tensor) -> Tensor:
        return (scores.squeeze(-1) > 0).long()


class FFFFanOut(Tree):
    """FFF with groups of fan_out neurons per node: softmax weights their outputs, the largest score picks the child.

    Fan-out 4 and depth 3 have (1 + 4 + 16 + 64) groups of 4: 340 neurons, of which a token uses 16. The value of a
    neuron is fan_out * softmax(scores) * GELU(score), so a group with equal scores gives the same as without the
    softmax. Unlike a sign, the softmax has a gradient, so the decision learns. `dense`, `evaluation` and `root_factor`
    as for `fff`.
    """

    def __init__(
        self,
        dims: Dimensions,
        fan_out: int = 4,
        depth: int = 3,
        dense: int = 0,
        evaluation: str = "mask",
        root_factor: float = 1.0,
    ):
        super().__init__(dims, fan_out, fan_out, depth, dense, evaluation, root_factor)

    def values(self, scores: Tensor) -> Tensor:
        return self.group * scores.softmax(dim=-1) * F.gelu(scores)

    def child(self, scores: Tensor) -> Tensor:
        return scores.argmax(dim=-1)
