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
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from parts import Dimensions


class MLP(nn.Module):
    """Two linear maps with GELU between; hidden 0 means 4 C (arXiv 2010.11929)."""

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

    def __init__(self, dims: Dimensions, hidden: int = 0):
        super().__init__()
        hidden = hidden or round(8 * dims.width / 3)
        self.expand = nn.Linear(dims.width, 2 * hidden)
        self.contract = nn.Linear(hidden, dims.width)
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.dropout(self.contract(self.dropout(value * F.gelu(gate))))


FEED_FORWARDS = {
    "mlp": MLP,
    "geglu": GEGLU,
}
