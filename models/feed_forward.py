"""The drawer of feed-forwards: what happens to each token between two attentions.

To try an idea, write one class here and add one line to FEED_FORWARDS at the end:

    class Mine(nn.Module):
        \"\"\"One line that says what it is.\"\"\"

        def __init__(self, dims: Dimensions, hidden: int = 0):      # every argument after `dims` is an option
            ...

        def forward(self, x):                                        # (B, T, C) -> (B, T, C)
            ...

It then trains with `--set model.feed_forward=mine --set model.feed_forward_options.hidden=384`, and the help, the tests
and `compare.py` know it. An option `hidden` of 0 stands for the field's usual size, which the class docstring names.
The trees (FFF) are in `models/tree_feed_forward.py`, dense convolutions in `models/convolutions.py`. A class that says
`own_norm = True` gets no LayerNorm before it. Two feed-forwards a block, macaron or in a row: `--set model.block=`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models import depthwise_kernel
from models.convolutions import ResidualConvolution
from models.parts import Dimensions, make_part, part_options
from models.tree_feed_forward import FFF, FFFFanOut


class MLP(nn.Module):
    """Two linear maps with GELU between; hidden 0 means 4 C (arXiv 2010.11929)."""

    num_matrices = 2  # of C x F weights: what Mix, Chain and Pair size their members by; a class that names none has 2

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or 4 * dims.width
        self.expand = nn.Linear(dims.width, hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(F.gelu(self.expand(x)))))


class GEGLU(nn.Module):
    """A linear map gated by the GELU of another; hidden 0 means 8/3 C, the MLP's parameter count (arXiv 2002.05202)."""

    num_matrices = 3
    gate = staticmethod(F.gelu)

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
    """A linear map gated by the SiLU of another; hidden 0 means 8/3 C, the MLP's parameter count (arXiv 2002.05202)."""

    gate = staticmethod(F.silu)


class ConvMLP(nn.Module):
    """MLP with a depthwise 3x3 convolution over the token grid between its maps; hidden 0 means 4 C (arXiv 2104.05707, 2210.05958).

    The convolution has a shortcut around it, as DHVT's has; class tokens have no place on the grid and pass it by, so with
    pooling=class_token the convolution of the last block reaches no score. There is no BatchNorm: an image's output does
    not depend on the images that share its batch.
    """

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or 4 * dims.width
        self.num_prefix, self.grid = dims.num_prefix, dims.grid
        self.expand = nn.Linear(dims.width, hidden)
        self.neighbours = Neighbours(hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.contract(self.dropout(self.neighbours(self.expand(x), self.grid, self.num_prefix))))


class Neighbours(nn.Conv2d):
    """The inside of a ConvMLP: GELU, a depthwise 3x3 convolution with GELU, and the shortcut around it.

    A convolution that does more, so that the weights are used by the module that owns them: ZeRO gathers them for that.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor, grid: int, num_prefix: int) -> Tensor:
        if depthwise_kernel.usable(x):
            return depthwise_kernel.conv_gelu(x, self.weight, self.bias, grid, num_prefix)
        return depthwise_kernel.plain(x, self.weight, self.bias, grid, num_prefix)


class SoftMoE(nn.Module):
    """Soft mixture of experts: each MLP works on slots, weighted means of all tokens of one image (arXiv 2308.00951).

    Weights in and out are softmaxes of the same scores, over the tokens and over the slots: every expert gets a gradient
    from every image, and nothing is dropped. The scores are scaled cosines (section 2.3 of the paper).
    hidden 0 means 4 C in each expert; slots 0 means T / experts for each, so that all together cost one MLP's time.
    """

    num_matrices = 8  # with 4 experts
    no_weight_decay = {"bias_expand", "bias_contract"}
    muon_matrices = {"expand", "contract"}  # one an expert

    def __init__(self, dims: Dimensions, hidden: int = 0, experts: int = 4, slots: int = 0):
        super().__init__()
        if experts < 1:
            raise SettingsError(f"feed_forward=soft_moe: experts must be at least 1, not {experts}")
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
    """Two feed-forwards of one kind, the second on the normalised sum of input and first; hidden 0 means 4 C for both together.

    `hidden` counts as in Mix. For two on the block's own residual stream, see `model.block`: `pair` and `macaron`.
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
    """The sum of two kinds of feed-forward that share the parameters of one MLP; hidden 0 means 4 C.

    `hidden` is the hidden size of the MLP whose parameter count both together have, `share` the first one's part of it;
    a kind that has no option `hidden`, such as a tree, keeps its own size. This and Chain are our reading of the idea
    "mix or chain CSC-I", a term that is defined nowhere: two different feed-forwards in one block, side by side or in a row.
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
    """One kind of feed-forward, a LayerNorm, then another kind; sizes as in Mix, and like it a reading of "mix or chain CSC-I"."""

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
    """A feed-forward with `share` of the parameters of an MLP of `hidden` (0: 4 C), where its kind has an option `hidden`."""
    if not 0 < share < 1:
        raise SettingsError(f"feed_forward_options.share must lie between 0 and 1, not {share}")
    options = {}
    if kind in FEED_FORWARDS and "hidden" in part_options(FEED_FORWARDS[kind]):
        of_one_matrix = share * MLP.num_matrices * (hidden or 4 * dims.width)
        options["hidden"] = max(
            1, round(of_one_matrix / getattr(FEED_FORWARDS[kind], "num_matrices", MLP.num_matrices))
        )
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
