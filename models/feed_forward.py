"""The feed-forward registry: position-wise networks between two attention layers, (B, T, C) -> (B, T, C).

To add a feed-forward, write one class here and add one line to FEED_FORWARDS at the end:

    class Mine(nn.Module):
        \"\"\"One line that describes it.\"\"\"

        def __init__(self, dims: Dimensions, hidden: int = 0):      # arguments after `dims` are options
            ...

        def forward(self, x):                                        # (B, T, C) -> (B, T, C)
            ...

It then trains with `--set model.feed_forward=mine --set model.feed_forward_options.hidden=384`, and `--help`, the tests
and `compare.py` list it. The option hidden=0 means the usual size, which the class docstring names. The trees (FFF)
are in `models/tree_feed_forward.py`, dense convolutions in `models/convolutions.py`. A class with `own_norm = True`
gets no LayerNorm before it. For two feed-forwards per block see `--set model.block=pair` or `macaron`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from config.own_parts import find_entry
from models import depthwise_kernel
from models.convolutions import ResidualConvolution
from models.parts import Dimensions, make_part, part_options
from models.tree_feed_forward import FFF, FFFFanOut


class MLP(nn.Module):
    """Two-layer MLP with GELU; hidden=0 means 4 C (arXiv 2010.11929)."""

    # Number of C x F matrices, by which Mix, Chain and Pair choose sizes; 2 for a class without this attribute.
    num_matrices = 2

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or 4 * dims.width
        self.expand = nn.Linear(dims.width, hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(x)))))


class GEGLU(nn.Module):
    """Gated linear unit with GELU; hidden=0 means 8/3 C, the parameter count of the MLP (arXiv 2002.05202)."""

    num_matrices = 3
    gate: Callable[[Tensor], Tensor] = staticmethod(F.gelu)

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or round(8 * dims.width / 3)
        self.expand = nn.Linear(dims.width, 2 * hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.dropout(self.contract(self.dropout(value * self.gate(gate))))


class SwiGLU(GEGLU):
    """Gated linear unit with SiLU; hidden=0 means 8/3 C, the parameter count of the MLP (arXiv 2002.05202)."""

    gate = staticmethod(F.silu)


class ConvMLP(nn.Module):
    """MLP with a depthwise 3x3 convolution over the token grid; hidden=0 means 4 C (arXiv 2104.05707, 2210.05958).

    The convolution acts on the hidden channels and has a shortcut, as in DHVT. CLS tokens are not on the grid and
    bypass it: with pooling=class_token the convolution of the last block does not reach the scores. There is no
    BatchNorm, so the output for an image does not depend on the other images of its batch.
    """

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or 4 * dims.width
        self.num_prefix = dims.num_prefix
        self.expand = nn.Linear(dims.width, hidden)
        self.neighbours = DepthwiseResidual(hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        grid = math.isqrt(x.shape[1] - self.num_prefix)  # with progressive resizing it differs between steps
        return self.dropout(self.contract(self.dropout(self.neighbours(self.expand(x), grid, self.num_prefix))))


class DepthwiseResidual(nn.Conv2d):
    """The inside of a ConvMLP: GELU, then a depthwise 3x3 convolution with GELU and a shortcut.

    It subclasses Conv2d so that the module that owns the weights also uses them: ZeRO stage 3 gathers weights per
    module.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: int, num_prefix: int) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        if depthwise_kernel.is_chosen(x):
            return depthwise_kernel.conv_gelu(x, self.weight, self.bias, grid, num_prefix)
        return depthwise_kernel.plain(x, self.weight, self.bias, grid, num_prefix)


class SoftMoE(nn.Module):
    """Soft mixture of experts: MLPs on slots, which are weighted means of all tokens of an image (arXiv 2308.00951).

    Dispatch and combine weights are softmaxes of the same scores, over the tokens and over the slots. Every expert
    gets a gradient from every image, and no token is dropped. The scores are scaled cosines (section 2.3 of the
    paper). hidden=0 means 4 C per expert. slots=0 means T / experts per expert, so that all experts cost as much as
    one MLP.
    """

    num_matrices = 8  # 2 for each of 4 experts
    no_weight_decay = {"bias_expand", "bias_contract"}
    muon_matrices = {"expand", "contract"}  # one matrix per expert

    def __init__(self, dims: Dimensions, hidden: int = 0, experts: int = 4, slots: int = 0):
        super().__init__()
        if experts < 1:
            raise SettingsError(f"feed_forward=soft_moe: experts must be at least 1, got {experts}")
        C, hidden, slots = dims.width, hidden or 4 * dims.width, slots or max(1, dims.num_tokens // experts)
        self.experts = experts
        self.slot_vectors = nn.Parameter(torch.randn(experts * slots, C) * C**-0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.expand = nn.Parameter(torch.empty(experts, C, hidden).uniform_(-(C**-0.5), C**-0.5))
        self.bias_expand = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.contract = nn.Parameter(torch.empty(experts, hidden, C).uniform_(-(hidden**-0.5), hidden**-0.5))
        self.bias_contract = nn.Parameter(torch.zeros(experts, 1, C))
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        scores = (
            F.normalize(x, dim=-1) @ (self.scale * F.normalize(self.slot_vectors, dim=-1)).T
        )  # (B, T, slots of all experts)
        slots = scores.softmax(dim=1).transpose(1, 2) @ x
        slots = slots.unflatten(1, (self.experts, -1))  # (B, experts, slots, C)
        slots = self.dropout(F.gelu(slots @ self.expand + self.bias_expand)) @ self.contract + self.bias_contract
        return self.dropout(scores.softmax(dim=2) @ slots.flatten(1, 2))


class Pair(nn.Module):
    """Two feed-forwards of one kind, the second on the normalized sum of input and first; hidden=0 means 4 C in total.

    `hidden` has the same meaning as in Mix. For two feed-forwards on the residual stream of the block, use
    `model.block=pair` or `macaron`.
    """

    def __init__(self, dims: Dimensions, kind: str = "mlp", hidden: int = 0):
        super().__init__()
        self.first = build_at_share(kind, dims, hidden, 0.5)
        self.norm = nn.LayerNorm(dims.width)
        self.second = build_at_share(kind, dims, hidden, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return first + self.second(self.norm(x + first))


class Mix(nn.Module):
    """Sum of two kinds of feed-forward with the parameters of one MLP in total; hidden=0 means 4 C.

    `hidden` is the hidden size of the MLP that has as many parameters as both together; `share` is the share of the
    first one. A kind without an option `hidden`, such as a tree, keeps its own size. Mix and Chain are our reading of
    the idea "mix or chain CSC-I", a term without a published definition: two feed-forwards per block, in parallel or
    in sequence.
    """

    def __init__(
        self, dims: Dimensions, first: str = "mlp", second: str = "geglu", hidden: int = 0, share: float = 0.5
    ):
        super().__init__()
        self.first = build_at_share(first, dims, hidden, share)
        self.second = build_at_share(second, dims, hidden, 1 - share)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


class Chain(nn.Module):
    """Two kinds of feed-forward in sequence, with a LayerNorm between them; sizes as in Mix, 4 C in total."""

    def __init__(
        self, dims: Dimensions, first: str = "mlp", second: str = "geglu", hidden: int = 0, share: float = 0.5
    ):
        super().__init__()
        self.first = build_at_share(first, dims, hidden, share)
        self.norm = nn.LayerNorm(dims.width)
        self.second = build_at_share(second, dims, hidden, 1 - share)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))


def build_at_share(kind: str, dims: Dimensions, hidden: int, share: float) -> nn.Module:
    """Return a feed-forward with `share` of the parameters of an MLP of size `hidden` (0: 4 C).

    A kind without an option `hidden` keeps its own size. The slot vectors of `soft_moe` come on top, 4 to 27 % of an
    MLP: taking them from `hidden` would change the shapes of networks that have been trained.

    Raises:
        SettingsError: `share` is not between 0 and 1, `hidden` is negative, or `kind` is unknown.
    """
    if hidden < 0:
        raise SettingsError(f"model.feed_forward_options.hidden must be >= 0, got {hidden}")
    if not 0 < share < 1:
        raise SettingsError(f"model.feed_forward_options.share must be between 0 and 1, got {share}")
    options = {}
    part = find_entry(FEED_FORWARDS, "feed-forward", kind)
    if "hidden" in part_options(part):
        rows = share * MLP.num_matrices * (hidden or 4 * dims.width)  # the budget in rows of C weights
        options["hidden"] = max(1, round(rows / getattr(part, "num_matrices", MLP.num_matrices)))
    return make_part(FEED_FORWARDS, "feed_forward", kind, dims, options)


FEED_FORWARDS = {
    "mlp": MLP,
    "geglu": GEGLU,
    "swiglu": SwiGLU,
    "pair": Pair,
    "mix": Mix,
    "chain": Chain,
    "conv_mlp": ConvMLP,
    "residual_conv": ResidualConvolution,
    "soft_moe": SoftMoE,
    "fff": FFF,
    "fff_fan_out": FFFFanOut,
}
