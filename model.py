# PYTHON_ARGCOMPLETE_OK
"""The vision transformer and SL-ViT, the component registry TABLES, and `build_model`.

A network is a list of layers: `build_layers(settings, num_classes, image_side)`. `nn.Sequential(*layers)` is the plain
model; the pipeline strategy splits the same list into stages. Every layer maps one tensor to one tensor and is
independent of data files and processes. To add a network, write a function that returns such a list and add it to the
registry of `models/published/table.py`.

    python model.py                                    # list all registries
    python model.py --set model.feed_forward=geglu     # layers and parameters of one network
    python model.py --groups --set optimizer.type=Muon # its parameter groups: optimizer, learning rate, weight decay

B images, T tokens, C width, H heads, D head size, F hidden size, P patch, K classes, S image side.
"""

from __future__ import annotations

if __name__ == "__main__":  # before PyTorch is imported, so that --help and errors in settings are fast
    from config.command_line import run_cli
    from tools.describe_model import describe_model

    raise SystemExit(run_cli(describe_model))

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from config.own_parts import find_entry, is_own_part
from config.settings import ModelSettings
from models.activation_checkpointing import checkpoint_blocks
from models.attention import ATTENTIONS
from models.feed_forward import FEED_FORWARDS
from models.layers import Architecture, DropPath, check_fixed_patch, drop_path_rates, uses_settings
from models.option_values import blame_options
from models.parts import Dimensions, make_part
from models.patch_embedding import PATCH_EMBEDDINGS
from models.pooling import POOLINGS
from models.position import POSITIONS, NoPosition
from models.published.table import ARCHITECTURES as PUBLISHED
from models.published.table import get_architecture
from models.user_defined import own_architecture, own_branches


class Embed(nn.Module):
    """Input layer, images (B, 3, S, S) -> tokens (B, T, C): patch embedding, CLS token, position, dropout."""

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
        return self.dropout(self.position(x)).contiguous()  # pipeline stages send it, which needs contiguous memory


class ResidualBranch(nn.Module):
    """Residual branch, (B, T, C) -> same: x + residual_scale * drop_path(scale * part(norm(x))).

    A part with `own_norm` gets no LayerNorm before it.
    `layer_scale` is the initial value of `scale`, a learned factor per channel (arXiv 2103.17239); 0 omits it.
    """

    def __init__(
        self, dims: Dimensions, drop_path: float, layer_scale: float, part: nn.Module, residual_scale: float = 1.0
    ):
        super().__init__()
        self.norm = nn.Identity() if getattr(part, "own_norm", False) else nn.LayerNorm(dims.width)
        self.part = part
        self.scale = nn.Parameter(torch.full((dims.width,), float(layer_scale))) if layer_scale else None
        self.residual_scale = residual_scale
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.part(self.norm(x))
        if self.scale is not None:
            y = y * self.scale
        return torch.add(x, self.drop_path(y), alpha=self.residual_scale)


class Block(nn.Sequential):
    """Transformer block, (B, T, C) -> (B, T, C): the residual branches that an entry of BLOCKS returns, in sequence."""


# The functions of BLOCKS make the branches of one block. `branch` wraps a part; the other two return a new part per
# call.
WrapBranch = Callable[..., ResidualBranch]
MakePart = Callable[[], nn.Module]


def pre_norm(branch: WrapBranch, attention: MakePart, feed_forward: MakePart) -> dict[str, nn.Module]:
    """Pre-norm block: attention, then a feed-forward (arXiv 2010.11929)."""
    return {"attention": branch(attention()), "feed_forward": branch(feed_forward())}


def pair(branch: WrapBranch, attention: MakePart, feed_forward: MakePart) -> dict[str, nn.Module]:
    """Attention, then two feed-forwards; halve `hidden` for equal parameters."""
    return {"attention": branch(attention()), "first": branch(feed_forward()), "second": branch(feed_forward())}


def macaron(branch: WrapBranch, attention: MakePart, feed_forward: MakePart) -> dict[str, nn.Module]:
    """Macaron block: half-step feed-forwards around attention (arXiv 1906.02762); halve `hidden` as for `pair`."""
    return {
        "before": branch(feed_forward(), residual_scale=0.5),
        "attention": branch(attention()),
        "after": branch(feed_forward(), residual_scale=0.5),
    }


def no_attention(branch: WrapBranch, attention: MakePart, feed_forward: MakePart) -> dict[str, nn.Module]:
    """Feed-forward only, an ablation of attention: tokens mix in convolutions and in the pooling only."""
    return {"feed_forward": branch(feed_forward())}


BLOCKS = {"pre_norm": pre_norm, "pair": pair, "macaron": macaron, "no_attention": no_attention}


class Head(nn.Module):
    """Output layer, tokens (B, T, C) -> class scores (B, K): pooling, LayerNorm, linear classifier."""

    def __init__(self, dims: Dimensions, pooling: nn.Module):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(dims.width)
        self.classify = nn.Linear(dims.width, dims.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.norm(self.pooling(x)))


def dimensions(settings: ModelSettings, num_classes: int, image_side: int) -> Dimensions:
    """Return the sizes that all parts of the ViT share. There are as many CLS tokens as the pooling's `num_prefix`.

    Raises:
        SettingsError: an image side that is not a multiple of the patch, or an unknown pooling.
    """
    s = settings
    if image_side % s.patch:
        raise SettingsError(f"model.patch={s.patch} does not divide the image side {image_side}. Set it to a divisor")
    num_prefix = getattr(find_entry(POOLINGS, "pooling", s.pooling), "num_prefix", 0)
    return Dimensions(num_classes, image_side, s.patch, s.width, s.depth, s.heads, s.head_size, num_prefix, s.dropout)


def vit(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """Vision transformer (arXiv 2010.11929) whose parts are chosen by name.

    Raises:
        SettingsError: an unknown name, or an image side that is not a multiple of the patch.
    """
    s = settings
    make_block, dims = find_entry(BLOCKS, "block", s.block), dimensions(s, num_classes, image_side)
    if s.block_options and not is_own_part(s.block):
        raise SettingsError(f"model.block={s.block} has no options; remove model.block_options")
    patches = make_part(PATCH_EMBEDDINGS, "patch_embedding", s.patch_embedding, dims, s.patch_embedding_options)
    position = cast("NoPosition", make_part(POSITIONS, "position", s.position, dims, s.position_options))

    rotated: list[nn.Module] = []  # attentions that rotate queries and keys by position

    def attention() -> nn.Module:
        part = make_part(ATTENTIONS, "attention", s.attention, dims, s.attention_options)
        rotation: Any = position.rotation() if hasattr(position, "rotation") else None
        if rotation is not None:
            if not hasattr(part, "rotate"):
                raise SettingsError(
                    f"model.attention={s.attention} does not support model.position={s.position}, which acts inside "
                    "attention. Choose another position, for example learned"
                )
            part.rotate = rotation
            rotated.append(part)
            rotation.num_added = getattr(part, "num_added_tokens", 0)
        return part

    def feed_forward() -> nn.Module:
        return make_part(FEED_FORWARDS, "feed_forward", s.feed_forward, dims, s.feed_forward_options)

    def block(i: int) -> Block:
        branch = partial(ResidualBranch, dims, drop_path[i], s.layer_scale)
        if is_own_part(s.block):
            values = {"branch": branch, "attention": attention, "feed_forward": feed_forward}
            return Block(OrderedDict(own_branches(make_block, s.block, s.block_options, values)))
        return Block(OrderedDict(make_block(branch, attention, feed_forward)))

    drop_path = drop_path_rates(s.drop_path, s.depth)
    blocks = [block(i) for i in range(s.depth)]
    if not rotated and hasattr(position, "rotation") and position.rotation() is not None:
        raise SettingsError(
            f"model.position={s.position} acts inside attention, and model.block={s.block} has none. "
            "Choose another position, for example learned"
        )
    pooling = make_part(POOLINGS, "pooling", s.pooling, dims, s.pooling_options)
    return [Embed(dims, patches, position), *blocks, Head(dims, pooling)]


@uses_settings("drop_path")
def sl_vit(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """SL-ViT: ViT with SPT and LSA in its published size; 2.75 M parameters by our count (arXiv 2112.13492).

    It is `vit` with the published sizes and the authors' initialization. The patch is 4 pixels at image side 32 and 8
    at 64, as in the authors' code (aanna0701/SPT_LSA_ViT). Departures from that code:
    - one learned temperature per block, as in the paper; the code has one per head (99 of 2.75 M parameters);
    - the logarithm of the temperature is trained; the code trains the temperature;
    - stochastic depth rises linearly over the blocks; the code uses 0.1 in all of them;
    - weight decay applies to matrices only, and not to the CLS token or positions; the code decays all parameters.
    """
    patch = 4 if image_side <= 32 else 8
    check_fixed_patch(settings, patch, image_side)
    published = ModelSettings(
        architecture=settings.architecture,
        patch=patch,
        width=192,
        depth=9,
        heads=12,
        head_size=16,
        patch_embedding="spt",
        position="learned",
        attention="lsa",
        feed_forward="mlp",
        feed_forward_options={"hidden": 2 * 192},
        pooling="class_token",
        dropout=0.0,
        drop_path=settings.drop_path,
    )
    layers = vit(published, num_classes, image_side)
    for layer in layers:
        layer.apply(init_sl_vit)
    return layers


def init_sl_vit(module: nn.Module) -> None:
    """Initialize as the authors' code, for `apply`: Glorot for linear maps, N(0, 1) for CLS token and positions."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name in getattr(module, "no_weight_decay", ()):  # the CLS token and the position table
        if getattr(module, name) is not None:
            nn.init.normal_(getattr(module, name))


ARCHITECTURES: dict[str, Architecture] = {"vit": vit, "sl-vit": sl_vit, **PUBLISHED}

TABLES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "architecture": ARCHITECTURES,
    "patch_embedding": PATCH_EMBEDDINGS,
    "position": POSITIONS,
    "block": BLOCKS,
    "attention": ATTENTIONS,
    "feed_forward": FEED_FORWARDS,
    "pooling": POOLINGS,
}


def build_layers(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """Return the network as a list of layers, (B, 3, S, S) -> (B, K).

    Raises:
        SettingsError: an unknown name, a size that does not fit, or a setting that this architecture does not use.
    """
    build = get_architecture(settings.architecture, ARCHITECTURES)
    if is_own_part(settings.architecture):
        build = own_architecture(build, settings.architecture, settings.architecture_options)
    elif settings.architecture_options:
        raise SettingsError(
            f"model.architecture={settings.architecture} has no options; remove model.architecture_options"
        )
    used = getattr(build, "used_settings", None)  # None: all settings
    for field in fields(ModelSettings):
        chosen, default = getattr(settings, field.name), getattr(ModelSettings(), field.name)
        if used is not None and field.name not in {"architecture", "checkpoint_blocks", *used} and chosen != default:
            raise SettingsError(
                f"model.architecture={settings.architecture} does not use model.{field.name}={chosen}. "
                f"It only uses {', '.join(f'model.{name}' for name in sorted(used)) or 'its name'}: "
                f"remove model.{field.name}"
            )
    layers = build(settings, num_classes, image_side)
    if settings.checkpoint_blocks:
        checkpoint_blocks(layers, settings.architecture)
    if len(layers) > 1:  # a network of one layer marks its own modules
        ends: list[Any] = [layers[0], layers[-1]]
        for end in ends:
            end.is_input_or_output_layer = True
    return layers


def build_model(settings: ModelSettings, num_classes: int, image_side: int) -> nn.Sequential:
    """Return the plain model: the layers in sequence.

    Raises:
        SettingsError: an unknown name, or an option with a value that no network can have.
    """
    try:
        return nn.Sequential(*build_layers(settings, num_classes, image_side))
    except SettingsError:
        raise
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        blame_options(settings, error)
        raise
