"""Fast feedforward networks: a tree of neurons in which a token uses only those on its way from the root to a leaf.

`depth` counts the steps down, so a tree has depth + 1 levels. Each node holds a group of neurons, and each neuron has a row
in, a bias and a row out, as in an MLP: its score for token x is `row_in . x + bias`, its value a function of the scores of its
group, and it adds `value * row_out`. The scores of a node also say which of its children the token visits next. That choice
has no gradient of its own; a neuron learns from the tokens that come through it, and is 0 to all others.

Two evaluations give the same result and the same gradients (`evaluation`):
    mask    compute every neuron, then set to 0 those off the path: two large products, work that grows with the tree
    path    gather the rows of the visited neurons level by level: work that grows with depth, but two rows moved a token and neuron
Which is faster where was measured at commit 5db9433 (results/LOG.md): at width 512 the path from about 1,000 neurons on for one
CPU core; for a GPU (H200) from 1,000 to 4,000 on in evaluation, and hardly ever in training. The two agree to rounding, so a
token whose score is 0 to the last digit may take the other branch; on a GPU, `path` adds up gradients in no fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from models.parts import Dimensions


class Level(nn.Module):
    """All nodes at one depth. Parameters of its own, so that a depth can have a learning rate of its own."""

    def __init__(self, num_nodes: int, group: int, width: int, num_visited: int, learning_rate_factor: float):
        super().__init__()
        num_neurons = num_nodes * group
        self.rows_in = nn.Parameter(torch.empty(num_neurons, width).uniform_(-(width**-0.5), width**-0.5))
        self.bias = nn.Parameter(torch.empty(num_neurons).uniform_(-(width**-0.5), width**-0.5))
        self.rows_out = nn.Parameter(torch.empty(num_neurons, width).uniform_(-(num_visited**-0.5), num_visited**-0.5))
        self.learning_rate_factors = dict.fromkeys(("rows_in", "bias", "rows_out"), learning_rate_factor)


class Tree(nn.Module):
    """What both trees share: `group` neurons a node, `branches` children a node. Subclasses say what a group gives and where it leads."""

    def __init__(
        self, dims: Dimensions, group: int, branches: int, depth: int, dense: int, evaluation: str, root_factor: float
    ):
        super().__init__()
        for name, value, allowed in (
            ("depth", depth, depth >= 0),
            ("fan_out", group, group >= 1),
            ("dense", dense, dense >= 0),
            ("root_factor", root_factor, root_factor > 0),
        ):
            if not allowed:
                raise SettingsError(f"a feed-forward tree cannot have {name}={value}")
        if evaluation not in EVALUATIONS:
            raise SettingsError(unknown("evaluation", evaluation, list(EVALUATIONS)))
        self.group, self.branches, self.evaluation = group, branches, evaluation
        self.num_visited = (depth + 1) * group  # neurons that a token uses
        self.levels = nn.ModuleList(
            Level(branches**d, group, dims.width, self.num_visited, root_factor ** (1 - d / depth) if depth else 1.0)
            for d in range(depth + 1)
        )
        # A small MLP, without a bias at its output: rows that every token uses.
        self.dense_in = nn.Linear(dims.width, dense) if dense else None
        self.dense_out = nn.Linear(dense, dims.width, bias=False) if dense else None
        self.dropout = nn.Dropout(dims.dropout)

    def values(self, scores: Tensor) -> Tensor:
        """(..., group) -> (..., group): what the neurons of a visited node multiply their rows out by."""
        raise NotImplementedError

    def child(self, scores: Tensor) -> Tensor:
        """(..., group) -> (...): which child of the node comes next, from 0."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # (B T, C)
        y = EVALUATIONS[self.evaluation](self, tokens).view_as(x)
        if self.dense_in is not None:
            y = y + self.dense_out(F.gelu(self.dense_in(x)))
        return self.dropout(y)

    def every_neuron(self, tokens: Tensor) -> Tensor:
        """The evaluation `mask`, (N, C) -> (N, C)."""
        rows_in, bias, rows_out = (
            torch.cat([getattr(level, name) for level in self.levels]) for name in ("rows_in", "bias", "rows_out")
        )
        scores = F.linear(tokens, rows_in, bias).unflatten(1, (-1, self.group))  # (N, nodes, group)
        values = self.values(scores) * self.visited(scores).unsqueeze(-1)
        return values.flatten(1) @ rows_out

    def visited(self, scores: Tensor) -> Tensor:
        """Scores (N, nodes, group) -> (N, nodes), true where the token comes through the node."""
        num_nodes = [self.branches**d for d in range(len(self.levels))]
        children = torch.arange(self.branches, device=scores.device)
        levels = [scores.new_ones(len(scores), 1, dtype=torch.bool)]
        for child in self.child(scores).split(num_nodes, dim=1)[:-1]:
            levels.append((levels[-1].unsqueeze(-1) & (child.unsqueeze(-1) == children)).flatten(1))
        return torch.cat(levels, dim=1)

    def path_only(self, tokens: Tensor) -> Tensor:
        """The evaluation `path`, (N, C) -> (N, C)."""
        y = torch.zeros_like(tokens)
        node = tokens.new_zeros(len(tokens), dtype=torch.long)  # of its level, from 0
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
    """Fast feedforward: a binary tree of neurons, the sign of each leads left or right (arXiv 2308.14711, 2311.10770).

    Depth 7 has 255 neurons, of which a token uses 8. A neuron gives GELU(score), as in an MLP.
    `dense` adds that many neurons that every token uses. `root_factor` is the root's share of the learning rate, rising
    geometrically to 1 at the leaves: under 1, the decisions that all tokens share change slower than those that few do.
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
    """FFF with groups of fan_out neurons: their softmax weighs what they give, the largest leads on to its child.

    Fan-out 4 and depth 3 have (1 + 4 + 16 + 64) groups of 4: 340 neurons, of which a token uses 16. A neuron gives
    fan_out * softmax(scores) * GELU(score), so that an undecided group counts as much as without the softmax; through it,
    unlike a sign, the decision learns. `dense`, `evaluation` and `root_factor` as for `fff`.
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
