"""Any model of timm (github.com/huggingface/pytorch-image-models) by its name there: `model.architecture=timm:NAME`.

timm is imported only when such a name is used. Nothing is downloaded: weights come from
a file (see `models/initial_weights.py`). The model is one layer, so a pipeline engine cannot cut it into stages.
"""

from __future__ import annotations

import difflib
import sys

from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import ModelSettings
from models.layers import Architecture, uses_settings


class TimmNetwork(nn.Module):
    """Images (B, 3, S, S) -> class scores (B, K), by a model of timm."""

    name_prefixes = ("network.", "")  # our tensors "network.<name>" are timm's "<name>"

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        # timm gives, by a method of the model, full names; our optimisers ask each module for names of its own parameters.
        asked = [module for module in network.modules() if callable(getattr(module, "no_weight_decay", None))]
        full_names = {module: module.no_weight_decay() for module in asked}
        for module in full_names:
            module.no_weight_decay = set()
        for module, names in full_names.items():
            for full_name in names & {name for name, _ in module.named_parameters()}:
                owner, _, name = full_name.rpartition(".")
                owner = module.get_submodule(owner)
                owner.no_weight_decay = {*getattr(owner, "no_weight_decay", ()), name}
        reads_images = next(module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        for edge in (reads_images, *self.head_modules()):
            edge.is_input_or_output_layer = True

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def head_modules(self) -> list[nn.Module]:
        """What a change of the number of classes replaces."""
        heads = self.network.get_classifier()
        return list(heads) if isinstance(heads, (tuple, list)) else [heads]

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this model as timm's file has them, positions resampled to this image side, other dialects renamed."""
        convert = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        return convert(weights, self.network) if convert else weights


def timm_architecture(name: str) -> Architecture:
    """The architecture function of timm's model `name`."""

    @uses_settings("drop_path")
    def build(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
        return [TimmNetwork(create(name, settings.drop_path, num_classes, image_side))]

    build.__doc__ = f"timm's {name}."
    return build


def create(name: str, drop_path: float, num_classes: int, image_side: int) -> nn.Module:
    """timm's model `name`, freshly initialised. Raises SettingsError when that cannot be."""
    try:
        import timm
    except ImportError as error:
        raise SettingsError(
            f"model.architecture=timm:{name} needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    # Names with a colon ("hf-hub:...") would be fetched.
    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SettingsError(
            f"timm {timm.__version__} has no model '{name}'{hint} "
            "(all names: python -c 'import timm; print(*timm.list_models())')"
        )
    options = {"drop_path_rate": drop_path} if drop_path else {}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_side
    try:
        network = timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        raise SettingsError(
            f"timm:{name} cannot be made with {given or 'its defaults'}: {error or type(error).__name__}"
        ) from error
    if getattr(getattr(network, "patch_embed", None), "num_patches", 2) == 1:
        raise SettingsError(
            f"timm:{name} sees a {image_side}-pixel image as a single patch and could learn nothing of its layout; "
            "choose a model with a smaller patch, or larger images"
        )
    return network
