"""SL-ViT (arXiv 2112.13492): a small vision transformer with shifted patch tokenization (SPT) and locality self-attention (LSA).

It is the project's own `vit` with the published sizes and the authors' initialisation. Two differences from their code: the
temperature is one a block, as in the paper, where the code has one a head (99 parameters of 2.75 M at depth 9); stochastic
depth rises over the blocks, where the code has 0.1 in all. The authors' patch is 4 pixels at 32 and 8 at 64.
"""

from __future__ import annotations

from torch import nn

from config.settings import ModelSettings
from models.layers import honours


@honours("drop_path")
def sl_vit(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
    """SL-ViT: the vit with SPT and LSA in its published size; 2.75 M parameters (arXiv 2112.13492)."""
    from model import vit  # model imports the table of architectures

    published = ModelSettings(
        architecture=settings.architecture,
        patch=4 if image_side <= 32 else 8,
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
        layer.apply(init_weights)
    return layers


def init_weights(module: nn.Module) -> None:
    """For `apply`: as in the authors' code, linear maps after Glorot; class token and positions from a standard normal."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    for name in getattr(module, "no_weight_decay", ()):  # the class token and the position table
        if getattr(module, name) is not None:
            nn.init.normal_(getattr(module, name))
