"""Attention modules, each (B, T, C) -> (B, T, C), and the registry ATTENTIONS.

Most ideas change one of two methods of `Attention`: `heads_of` computes q, k and v, and `attend` computes the attention
output from them. Between the two, `rotate` is applied to q and k. It is the identity unless `model.position` acts
inside attention (rotary): then `vit()` sets it. An attention without an attribute `rotate` cannot be combined with
rotary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError, unknown
from models.layers import trunc_normal
from models.parts import Dimensions


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for q, k, v of shape (B, H, T, D).

    `mask` (T, T) is true where a query may attend to a key. PyTorch's fused kernel is used, except in bf16 on a CPU,
    where that kernel is slower than fp32.
    """
    explicit = v.device.type == "cpu" and v.dtype == torch.bfloat16
    form = explicit_attention if explicit else F.scaled_dot_product_attention
    return form(q, k, v, attn_mask=mask, dropout_p=dropout)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """Compute the same as two matrix products with a softmax between them."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    weights = scores.softmax(dim=-1).to(v.dtype)  # under autocast the softmax is in float32
    return (F.dropout(weights, dropout_p) if dropout_p else weights) @ v


class Attention(nn.Module):
    """Multi-head self-attention: softmax over scaled dot products (arXiv 1706.03762).

    `qkv_std` is the standard deviation of the initial weights of queries, keys and values: 0.02 in timm and the papers.
    0 is PyTorch's initialization of linear maps: 1 / sqrt(3 C), 0.042 at width 192.
    """

    def __init__(self, dims: Dimensions, qkv_std: float = 0.02):
        super().__init__()
        inner = dims.heads * dims.head_size
        self.heads, self.head_size, self.dropout = dims.heads, dims.head_size, dims.dropout
        self.qkv = nn.Linear(dims.width, 3 * inner, bias=False)
        self.set_up_qkv([inner] * 3, qkv_std)
        self.rotate: nn.Module = nn.Identity()
        self.project = nn.Linear(inner, dims.width)
        self.project_dropout = nn.Dropout(dims.dropout)

    def set_up_qkv(self, rows: list[int], std: float) -> None:
        """Initialize the weights with `std` unless it is 0; record the rows of queries, keys and values for Muon.

        Raises:
            SettingsError: a negative `std`.
        """
        if not 0 <= std < math.inf:
            raise SettingsError(f"model.attention_options.qkv_std must be at least 0, got {std}. Set it to 0.02")
        self.qkv.row_splits = tuple(rows)  # type: ignore[assignment]  # modules take any attribute
        if std:
            trunc_normal(self.qkv.weight, std)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        x = self.attend(self.rotate(q), self.rotate(k), v).transpose(1, 2).flatten(2)
        return self.project_dropout(self.project(x))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, (B, H, T, D) each, of tokens (B, T, C)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, self.head_size)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention output (B, H, T, D); `mask` (T, T) is true where a query may attend to a key."""
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, norms, temperatures and rotations return float32
        return attend(q, k, v, mask, self.dropout if self.training else 0.0)


class LocalitySelfAttention(Attention):
    """Locality self-attention (LSA): learned temperature, masked diagonal (arXiv 2112.13492, section 3.2).

    The logarithm of the temperature is trained, so that it stays positive. The authors' code trains the temperature
    itself, which AdamW changes sqrt(D) times as fast at the start, relative to its value.

    Raises:
        SettingsError: an image of one token, which has no other to attend to. A smaller image of such a network raises
            ValueError in the forward pass.
    """

    others: Tensor

    def __init__(self, dims: Dimensions, qkv_std: float = 0.02):
        super().__init__(dims, qkv_std)
        if dims.num_tokens < 2:
            raise SettingsError(
                f"attention=lsa: no token attends to itself, and an image of {dims.image_side} pixels is a single "
                f"token at model.patch={dims.patch}. Choose a smaller model.patch, or another attention, for example "
                "softmax"
            )
        self.log_scale = nn.Parameter(torch.tensor([dims.head_size**-0.5]).log())
        self.register_buffer("others", ~torch.eye(dims.num_tokens, dtype=torch.bool), persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if q.shape[2] < 2:
            raise ValueError("attention=lsa: no token attends to itself, and such a small image is a single token")
        # PyTorch 2.0 has no `scale` argument: undo its fixed scale, then apply the learned one.
        return super().attend(
            q * (self.log_scale.exp() * self.head_size**0.5), k, v, self.others[: q.shape[2], : q.shape[2]]
        )


class RMSNorm(nn.Module):
    """Root mean square normalization with learned scale (arXiv 1910.07467); torch.nn.RMSNorm needs PyTorch 2.4."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.float().square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype) * self.weight


NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}


class NormedAttention(Attention):
    """QK normalization: queries and keys normalized per head, which bounds the scores (arXiv 2010.04245, 2302.05442).

    `norm` is "rms" (RMSNorm) or "layer" (LayerNorm).
    """

    def __init__(self, dims: Dimensions, norm: str = "rms", qkv_std: float = 0.02):
        super().__init__(dims, qkv_std)
        if norm not in NORMS:
            raise SettingsError("attention=qk_norm: " + unknown("norm", norm, list(NORMS)))
        self.q_norm, self.k_norm = NORMS[norm](dims.head_size), NORMS[norm](dims.head_size)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().heads_of(x)
        return self.q_norm(q), self.k_norm(k), v


class HeadTokens(Attention):
    """Head tokens (HI-MHSA): one extra token per head, made from its channels (arXiv 2210.05958, section 3.2).

    A head token is computed from the mean token. Head tokens take part in attention like all others. Their mean is then
    added to the CLS token, if there is one.
    """

    no_weight_decay = {"head_position"}

    def __init__(self, dims: Dimensions, qkv_std: float = 0.02):
        super().__init__(dims, qkv_std)
        if dims.width % dims.heads:
            raise SettingsError(
                f"attention=head_tokens: model.heads={dims.heads} does not divide model.width={dims.width}. "
                f"Set model.heads to a divisor of {dims.width}"
            )
        self.num_prefix, self.num_added_tokens = dims.num_prefix, dims.heads
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
    """Multi-query (arXiv 1911.02150) or, with kv_heads > 1, grouped-query attention (arXiv 2305.13245)."""

    def __init__(self, dims: Dimensions, kv_heads: int = 1, qkv_std: float = 0.02):
        super().__init__(dims)
        if kv_heads < 1 or dims.heads % kv_heads:
            raise SettingsError(f"attention=multi_query: kv_heads={kv_heads} does not divide model.heads={dims.heads}")
        self.kv_heads = kv_heads
        rows = [heads * dims.head_size for heads in (dims.heads, kv_heads, kv_heads)]
        self.qkv = nn.Linear(dims.width, sum(rows), bias=False)
        self.set_up_qkv(rows, qkv_std)

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
