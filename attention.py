"""How tokens look at one another: the table of attentions, each (B, T, C) -> (B, T, C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts import Dimensions


class Attention(nn.Module):
    """Multi-head self-attention with softmax over scaled dot products (arXiv 1706.03762)."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        inner = dims.heads * dims.head_size
        self.heads, self.dropout = dims.heads, dims.dropout
        self.qkv = nn.Linear(dims.width, 3 * inner, bias=False)
        self.project = nn.Linear(inner, dims.width)
        self.project_dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        x = self.mix(q, k, v).transpose(1, 2).reshape(B, T, -1)
        return self.project_dropout(self.project(x))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, D) each -> (B, H, T, D)."""
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)


class LocalitySelfAttention(Attention):
    """LSA: a learnt temperature, and no token attends to itself (arXiv 2112.13492, section 3.2)."""

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        self.log_scale = nn.Parameter(torch.tensor([dims.head_size**-0.5]).log())
        self.register_buffer("others", ~torch.eye(dims.num_tokens, dtype=torch.bool), persistent=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q * self.log_scale.exp(), k, v, attn_mask=self.others, dropout_p=dropout, scale=1.0)


ATTENTIONS = {
    "softmax": Attention,
    "lsa": LocalitySelfAttention,
}
