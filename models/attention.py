"""How tokens look at one another: the table of attentions, each (B, T, C) -> (B, T, C).

Most ideas change one of two methods of Attention: `heads_of`, which makes queries, keys and values, or `attend`, which
lets the queries find values. Between the two, queries and keys go through `rotate`: nothing, unless `model.position` acts
inside attention (rotary), when `vit()` puts its rotation there. An attention without `rotate` cannot be combined with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from models.parts import Dimensions


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V of (B, H, T, D) each; `mask` (T, T) is true where a token may look.

    PyTorch's fused kernel, except in bf16 on a CPU, where that kernel takes longer than fp32 does.
    """
    explicit = v.device.type == "cpu" and v.dtype == torch.bfloat16
    form = explicit_attention if explicit else F.scaled_dot_product_attention
    return form(q, k, v, attn_mask=mask, dropout_p=dropout)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """The same as two matrix products with a softmax between."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(v.dtype)  # under autocast the softmax is in float32
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ v


class Attention(nn.Module):
    """Multi-head self-attention with softmax over scaled dot products (arXiv 1706.03762)."""

    def __init__(self, dims: Dimensions):
        super().__init__()
        inner = dims.heads * dims.head_size
        self.heads, self.head_size, self.dropout = dims.heads, dims.head_size, dims.dropout
        self.qkv = nn.Linear(dims.width, 3 * inner, bias=False)
        self.rotate: nn.Module = nn.Identity()
        self.project = nn.Linear(inner, dims.width)
        self.project_dropout = nn.Dropout(dims.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        x = self.attend(self.rotate(q), self.rotate(k), v).transpose(1, 2).flatten(2)
        return self.project_dropout(self.project(x))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> queries, keys and values, (B, H, T, D) each."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.head_size)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, H, T, D) each -> (B, H, T, D); `mask` (T, T) is true where a token may look."""
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms, temperatures and rotations give float32
        return attend(q, k, v, mask, self.dropout if self.training else 0.0)


class LocalitySelfAttention(Attention):
    """LSA: a learnt temperature, and no token attends to itself (arXiv 2112.13492, section 3.2)."""

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        self.log_scale = nn.Parameter(torch.tensor([dims.head_size**-0.5]).log())
        self.register_buffer("others", ~torch.eye(dims.num_tokens, dtype=torch.bool), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        # The fixed scale, which PyTorch 2.0 cannot be told to leave out, is taken back before the learnt one.
        return super().attend(q * (self.log_scale.exp() * self.head_size**0.5), k, v, self.others)


class RMSNorm(nn.Module):
    """Scale to a root mean square of 1, then by a learnt vector (arXiv 1910.07467); PyTorch has its own only from 2.4 on."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.float().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype) * self.weight


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}


class NormedAttention(Attention):
    """Queries and keys normalised in each head, so that scores stay bounded; norm is "rms" or "layer" (arXiv 2010.04245, 2302.05442)."""

    def __init__(self, dims: Dimensions, norm: str = "rms"):
        super().__init__(dims)
        if norm not in NORMS:
            raise SettingsError("attention=qk_norm: " + unknown("norm", norm, list(NORMS)))
        self.q_norm, self.k_norm = NORMS[norm](dims.head_size), NORMS[norm](dims.head_size)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(x)
        return self.q_norm(q), self.k_norm(k), v


class HeadTokens(Attention):
    """One more token a head, made of the head's channels of the mean token, for heads to interact (arXiv 2210.05958, section 3.2).

    The head tokens attend and are attended to like others; then their mean goes to the class tokens, where there are any.
    """

    no_weight_decay = {"head_position"}

    def __init__(self, dims: Dimensions):
        super().__init__(dims)
        if dims.width % dims.heads:
            raise SettingsError(
                f"attention=head_tokens: model.heads={dims.heads} does not divide model.width={dims.width}"
            )
        self.num_prefix = dims.num_prefix
        self.lift = nn.Linear(dims.width // dims.heads, dims.width)
        self.lift_norm = nn.LayerNorm(dims.width // dims.heads)
        self.head_position = nn.Parameter(0.02 * torch.randn(dims.heads, dims.width))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.lift(x.mean(dim=1).view(B, self.heads, -1)).view(B, self.heads, self.heads, -1)  # (B, H, H, C / H)
        head_tokens = F.gelu(self.lift_norm(parts)).flatten(2) + self.head_position  # (B, H, C)
        tokens, head_tokens = super().forward(torch.cat([x, head_tokens], dim=1)).split([T, self.heads], dim=1)
        prefix, patches = tokens.split([self.num_prefix, T - self.num_prefix], dim=1)
        return torch.cat([prefix + head_tokens.mean(dim=1, keepdim=True), patches], dim=1)


class MultiQuery(Attention):
    """All heads share kv_heads heads of keys and values: 1 is multi-query (arXiv 1911.02150), more is grouped (arXiv 2305.13245)."""

    def __init__(self, dims: Dimensions, kv_heads: int = 1):
        super().__init__(dims)
        if kv_heads < 1 or dims.heads % kv_heads:
            raise SettingsError(f"attention=multi_query: kv_heads={kv_heads} does not divide model.heads={dims.heads}")
        self.kv_heads = kv_heads
        self.qkv = nn.Linear(dims.width, (dims.heads + 2 * kv_heads) * dims.head_size, bias=False)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(x).unflatten(2, (-1, self.head_size)).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        k, v = (shared.repeat_interleave(self.heads // self.kv_heads, dim=1) for shared in (k, v))
        return super().attend(q, k, v, mask)


ATTENTIONS = {
    "softmax": Attention,
    "lsa": LocalitySelfAttention,
    "qk_norm": NormedAttention,
    "head_tokens": HeadTokens,
    "multi_query": MultiQuery,
}
