"""The networks, each as a list of layers: `build_layers(settings, num_classes, image_side)`.

`nn.Sequential(*layers)` is the plain model; a pipeline engine cuts the same list into stages. Every layer maps one
tensor to one tensor, and no layer knows of data files or of processes. To add a network, write a function that returns
such a list and add it to ARCHITECTURES.

    python model.py                                    # what every table holds
    python model.py --set model.feed_forward=geglu     # layers and parameters of one network

B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes, S image side.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from attention import ATTENTIONS
from embedding import PATCH_EMBEDDINGS, POOLINGS, POSITIONS
from feedforward import FEED_FORWARDS
from parts import Dimensions, make_part, part_options
from settings import ModelSettings, SettingsError, resolve, unknown


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


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, C) -> (B, T, C): x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, dims: Dimensions, attention: nn.Module, feed_forward: nn.Module, drop_path: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dims.width)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dims.width)
        self.feed_forward = feed_forward
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.feed_forward(self.feed_forward_norm(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, a residual branch is left out for a random share of the images (arXiv 1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        return x * x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(keep) / keep


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
    if s.pooling not in POOLINGS:
        raise SettingsError(unknown("pooling", s.pooling, list(POOLINGS)))
    dims = Dimensions(num_classes, image_side, s.patch, s.width, s.depth, s.heads, s.head_size, POOLINGS[s.pooling].num_prefix, s.dropout)
    patches = make_part(PATCH_EMBEDDINGS, "patch_embedding", s.patch_embedding, dims, s.patch_embedding_options)
    blocks = [
        Block(
            dims,
            make_part(ATTENTIONS, "attention", s.attention, dims, s.attention_options),
            make_part(FEED_FORWARDS, "feed_forward", s.feed_forward, dims, s.feed_forward_options),
            drop_path=s.drop_path * i / max(1, s.depth - 1),
        )
        for i in range(s.depth)
    ]
    position = make_part(POSITIONS, "position", s.position, dims, {})
    return [Embed(dims, patches, position), *blocks, Head(dims, make_part(POOLINGS, "pooling", s.pooling, dims, {}))]


ARCHITECTURES = {
    "vit": vit,
}

TABLES = {
    "architecture": ARCHITECTURES,
    "patch_embedding": PATCH_EMBEDDINGS,
    "position": POSITIONS,
    "attention": ATTENTIONS,
    "feed_forward": FEED_FORWARDS,
    "pooling": POOLINGS,
}


def build_layers(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """The network as a list of layers, (B, 3, S, S) -> (B, K). Raises SettingsError for what cannot be built."""
    if settings.architecture not in ARCHITECTURES:
        raise SettingsError(unknown("architecture", settings.architecture, list(ARCHITECTURES)))
    return ARCHITECTURES[settings.architecture](settings, num_classes, image_side)


def build_model(settings: ModelSettings, num_classes: int, image_side: int) -> nn.Sequential:
    """The plain model: the layers in sequence."""
    return nn.Sequential(*build_layers(settings, num_classes, image_side))


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description="List the tables of parts, or describe one network.")
    parser.add_argument("--preset", help="start from this preset")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting, for example model.width=192")
    parser.add_argument("--classes", type=int, default=100, help="number of classes (default: 100)")
    parser.add_argument("--image-side", type=int, default=32, help="pixels (default: 32)")
    args = parser.parse_args()
    if args.preset is None and not args.set:
        for kind, table in TABLES.items():
            print(f"\nmodel.{kind}")
            for name, part in table.items():
                options = ", ".join(f"{k}={v!r}" for k, v in part_options(part).items()) if kind != "architecture" else ""
                print(f"  {name:12} {(part.__doc__ or '').splitlines()[0]}" + (f"  [{options}]" if options else ""))
        return
    model = build_model(resolve(args.preset, args.set).model, args.classes, args.image_side)
    for i, layer in enumerate(model):
        print(f"{i:3} {type(layer).__name__:10} {count_parameters(layer):>12,} parameters")
    print(f"    {'total':10} {count_parameters(model):>12,} parameters")


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        raise SystemExit(f"error: {error}") from None
