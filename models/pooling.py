"""Poolings: tokens (B, T, C) to one vector per image (B, C)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.parts import Dimensions


class ClassTokenPooling(nn.Module):
    """CLS token: a learned token whose final state is classified (arXiv 2010.11929)."""

    num_prefix = 1

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MeanPooling(nn.Module):
    """Mean of all tokens (global average pooling)."""

    num_prefix = 0

    def __init__(self, dims: Dimensions):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class SequencePooling(nn.Module):
    """Sequence (attention) pooling: softmax-weighted mean of tokens (arXiv 2104.05704, section 3.2).

    As all poolings here it comes before the last norm. The authors' code, and the networks `cct-*`, normalize first:
    there the norm of a token does not affect its weight.
    """

    num_prefix = 0

    def __init__(self, dims: Dimensions):
        super().__init__()
        self.score = nn.Linear(dims.width, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(x).softmax(dim=1)  # (B, T, 1)
        return (weights.transpose(1, 2) @ x).squeeze(1)


POOLINGS: dict[str, Any] = {"class_token": ClassTokenPooling, "mean": MeanPooling, "sequence": SequencePooling}
