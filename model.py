# PYTHON_ARGCOMPLETE_OK
"""The networks, each as a list of layers: `build_layers(settings, num_classes, image_side)`.

`nn.Sequential(*layers)` is the plain model; a pipeline engine cuts the same list into stages. Every layer maps one
tensor to one tensor, and no layer knows of data files or of processes. To add a network, write a function that returns
such a list and add it to ARCHITECTURES.

    python model.py                                    # what every table holds
    python model.py --set model.feed_forward=geglu     # layers and parameters of one network
    python model.py --groups --set optimizer.type=Muon # which of them decay, learn slower, are trained by whom

B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes, S image side.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported: --help and mistyped settings answer at once
    from command_line import in_one_sentence
    from describe import describe_model

    raise SystemExit(in_one_sentence(describe_model))

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from torch import Tensor, nn

from architectures import ARCHITECTURES as PUBLISHED
from architectures import find
from architectures.layers import Architecture, DropPath
from attention import ATTENTIONS
from embedding import PATCH_EMBEDDINGS, POOLINGS, POSITIONS
from feedforward import FEED_FORWARDS
from parts import Dimensions, make_part
from settings import ModelSettings, SettingsError, unknown


class Embed(nn.Module):
    """Images (B, 3, S, S) -> tokens (B, T, C): patches, class tokens before them, positions, dropout."""

    no_weight_decay = {"class_token"}

    def __init__(self, dims: Dimensions, patches: nn.Module, position: nn.Module):
        super().__init__()
        self.patches, self.position = patches, position
        self.class_token = nn.Parameter(0.02 * torch.randn(dims.num_prefix, dims.width)) if dims.num_prefix else None
        self.dropout = nn.Dropout(dims.dropout)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.dropout(self.position(x)).contiguous()  # stages send it over a wire, which wants it contiguous


class Branch(nn.Module):
    """One residual step, (B, T, C) -> (B, T, C): x + share * drop_path(scale * part(norm(x))).

    A part with `own_norm` normalises itself: there is no norm before it.
    `layer_scale` is the initial value of `scale`, a learnt factor for each channel (arXiv 2103.17239); 0 leaves it out.
    """

    def __init__(self, dims: Dimensions, drop_path: float, layer_scale: float, part: nn.Module, share: float = 1.0):
        super().__init__()
        self.norm = nn.Identity() if getattr(part, "own_norm", False) else nn.LayerNorm(dims.width)
        self.part = part
        self.scale = nn.Parameter(torch.full((dims.width,), float(layer_scale))) if layer_scale else None
        self.share = share
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.norm(x))
        if self.scale is not None:
            y = y * self.scale
        return torch.add(x, self.drop_path(y), alpha=self.share)


class Block(nn.Sequential):
    """A block of the network, (B, T, C) -> (B, T, C): the branches that one of BLOCKS names, one after the other."""


# The functions of BLOCKS make the branches of one block: `branch` wraps a part, the other two make a new part at each call.
Wrap = Callable[..., Branch]
Make = Callable[[], nn.Module]


def pre_norm(branch: Wrap, attention: Make, feed_forward: Make) -> dict[str, nn.Module]:
    """Attention, then a feed-forward (arXiv 2010.11929)."""
    return {"attention": branch(attention()), "feed_forward": branch(feed_forward())}


def pair(branch: Wrap, attention: Make, feed_forward: Make) -> dict[str, nn.Module]:
    """Attention, then two feed-forwards; at equal parameters each has half the hidden size."""
    return {"attention": branch(attention()), "first": branch(feed_forward()), "second": branch(feed_forward())}


def macaron(branch: Wrap, attention: Make, feed_forward: Make) -> dict[str, nn.Module]:
    """A feed-forward before attention and one after, each counting half (arXiv 1906.02762); at equal parameters as `pair`."""
    return {"before": branch(feed_forward(), share=0.5), "attention": branch(attention()), "after": branch(feed_forward(), share=0.5)}


def no_attention(branch: Wrap, attention: Make, feed_forward: Make) -> dict[str, nn.Module]:
    """A feed-forward alone, to see what attention gives: tokens meet in convolutions and in the pooling only."""
    return {"feed_forward": branch(feed_forward())}


BLOCKS = {
    "pre_norm": pre_norm,
    "pair": pair,
    "macaron": macaron,
    "no_attention": no_attention,
}


class Head(nn.Module):
    """Tokens (B, T, C) -> class scores (B, K)."""

    def __init__(self, dims: Dimensions, pooling: nn.Module):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(dims.width)
        self.classify = nn.Linear(dims.width, dims.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.norm(self.pooling(x)))


def vit(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """Vision transformer (arXiv 2010.11929) whose parts are chosen by name.

    Raises:
        SettingsError: a name is in no table, or the image side is no multiple of the patch.
    """
    s = settings
    if image_side % s.patch:
        raise SettingsError(f"model.patch={s.patch} does not divide the image side {image_side}")
    for kind, name, table in (("pooling", s.pooling, POOLINGS), ("block", s.block, BLOCKS)):
        if name not in table:
            raise SettingsError(unknown(kind, name, list(table)))
    dims = Dimensions(num_classes, image_side, s.patch, s.width, s.depth, s.heads, s.head_size, POOLINGS[s.pooling].num_prefix, s.dropout)
    patches = make_part(PATCH_EMBEDDINGS, "patch_embedding", s.patch_embedding, dims, s.patch_embedding_options)
    position = make_part(POSITIONS, "position", s.position, dims, s.position_options)

    def attention() -> nn.Module:
        part, rotation = make_part(ATTENTIONS, "attention", s.attention, dims, s.attention_options), position.rotation()
        if rotation is not None:
            if not hasattr(part, "rotate"):
                raise SettingsError(f"model.attention={s.attention} has no place for model.position={s.position}, which acts inside it")
            part.rotate = rotation
        return part

    def feed_forward() -> nn.Module:
        return make_part(FEED_FORWARDS, "feed_forward", s.feed_forward, dims, s.feed_forward_options)

    def block(i: int) -> Block:
        branch = partial(Branch, dims, s.drop_path * i / max(1, s.depth - 1), s.layer_scale)
        return Block(OrderedDict(BLOCKS[s.block](branch, attention, feed_forward)))

    blocks = [block(i) for i in range(s.depth)]
    return [Embed(dims, patches, position), *blocks, Head(dims, make_part(POOLINGS, "pooling", s.pooling, dims, {}))]


ARCHITECTURES: dict[str, Architecture] = {"vit": vit, **PUBLISHED}

TABLES = {
    "architecture": ARCHITECTURES,
    "patch_embedding": PATCH_EMBEDDINGS,
    "position": POSITIONS,
    "block": BLOCKS,
    "attention": ATTENTIONS,
    "feed_forward": FEED_FORWARDS,
    "pooling": POOLINGS,
}


def build_layers(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """The network as a list of layers, (B, 3, S, S) -> (B, K).

    Raises:
        SettingsError: an unknown name, a size that does not fit, or a setting that this architecture would not use.
    """
    build = find(settings.architecture, ARCHITECTURES)
    honoured = getattr(build, "honours", None)  # None: all of them
    for field in fields(ModelSettings):
        chosen, default = getattr(settings, field.name), getattr(ModelSettings(), field.name)
        if honoured is not None and field.name not in {"architecture", *honoured} and chosen != default:
            raise SettingsError(f"model.architecture={settings.architecture} would not use model.{field.name}={chosen}: "
                                f"its name fixes everything but {', '.join(sorted(honoured)) or 'nothing'}")
    layers = build(settings, num_classes, image_side)
    if len(layers) > 1:  # a network in one layer marks its own
        layers[0].is_edge = layers[-1].is_edge = True
    return layers


def build_model(settings: ModelSettings, num_classes: int, image_side: int) -> nn.Sequential:
    """The plain model: the layers in sequence."""
    return nn.Sequential(*build_layers(settings, num_classes, image_side))


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
