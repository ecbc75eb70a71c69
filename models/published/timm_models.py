"""Any model of timm (github.com/huggingface/pytorch-image-models) by its name: `model.architecture=timm:NAME`.

timm is imported only when such a name is used. Building a model downloads nothing: weights come from `--init-weights`
(see `models/pretrained.py`). The model is one layer, so the pipeline strategy cannot split it into stages.
"""

from __future__ import annotations

import copy
import difflib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import ModelSettings
from models.layers import Architecture, uses_settings


class TimmNetwork(nn.Module):
    """Images (B, 3, S, S) -> class scores (B, K), by a model of timm."""

    name_prefixes = ("network.", "")  # our tensors "network.<name>" are timm's "<name>"

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network: Any = network
        reads_images = next(module for module in network.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))
        for edge in (reads_images, *self.head_modules()):
            edge.is_input_or_output_layer = True  # type: ignore[assignment]  # modules take any attribute

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def head_modules(self) -> list[nn.Module]:
        """Return the modules that a change of the number of classes replaces."""
        heads = self.network.get_classifier()
        return list(heads) if isinstance(heads, (tuple, list)) else [heads]

    def adapt_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert weights as timm does: resample positions to this image side, rename tensors of older formats."""
        convert = getattr(sys.modules[type(self.network).__module__], "checkpoint_filter_fn", None)
        return convert(weights, self.network) if convert else weights


def timm_architecture(name: str) -> Architecture:
    """Return the architecture function of timm's model `name`."""

    @uses_settings("drop_path")
    def build(settings: ModelSettings, num_classes: int, image_side: int) -> list[nn.Module]:
        return [TimmNetwork(create(name, settings.drop_path, num_classes, image_side))]

    build.__doc__ = f"{name} of timm."
    return build


def hub_repository(name: str) -> str:
    """Return the repository of timm's pretrained weights `name`, such as `vit_tiny_patch16_224[.augreg_in21k]`.

    Raises:
        SettingsError: timm is missing, or has no weights of that name.
    """
    try:
        import timm
    except ImportError as error:
        raise SettingsError(
            f"--init-weights timm:{name} needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    try:
        config = timm.get_pretrained_cfg(name)
    except (RuntimeError, ValueError):  # a tag that the model does not have
        config = None
    if config is None or not config.hf_hub_id:
        near = difflib.get_close_matches(name, timm.list_pretrained(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SettingsError(f"--init-weights timm:{name}: timm {timm.__version__} has no such weights{hint}")
    return config.hf_hub_id


def create(name: str, drop_path: float, num_classes: int, image_side: int) -> nn.Module:
    """Return timm's model `name` with random weights.

    Raises:
        SettingsError: timm is missing, has no such model, or cannot build it for these settings.
    """
    try:
        import timm
    except ImportError as error:
        raise SettingsError(
            f"model.architecture=timm:{name} needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    # timm downloads names with a colon ("hf-hub:...").
    if ":" in name or not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise SettingsError(
            f"timm {timm.__version__} has no model '{name}'{hint} "
            "(all names: python -c 'import timm; print(*timm.list_models())')"
        )
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_side
    try:
        network = create_with_options(name, num_classes, options)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        given = ", ".join(f"{option}={value}" for option, value in options.items())
        raise SettingsError(
            f"timm:{name} cannot be built with {given}: {error or type(error).__name__}. Choose another model"
        ) from error
    if getattr(getattr(network, "patch_embed", None), "num_patches", 2) == 1:
        raise SettingsError(
            f"timm:{name} has a single patch for a {image_side}-pixel image and cannot learn spatial structure. "
            "Choose a model with smaller patches, or set a larger image_side"
        )
    if not hasattr(network, "get_classifier"):
        raise SettingsError(f"timm:{name} is an encoder without a classifier. Choose a classification model of timm")
    check_forward(name, network, image_side)
    return network


def check_forward(name: str, network: nn.Module, image_side: int) -> None:
    """Raise SettingsError if the network cannot process images of this side, such as one that halves it too often.

    The check runs on the meta device, which computes nothing. Some models fail only there, because they read values: a
    failure is confirmed with one image on the CPU.
    """
    if any(parameter.is_meta for parameter in network.parameters()):
        return
    was_training, error = network.training, None
    network.eval()
    for device in ("meta", "cpu"):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                model = copy.deepcopy(network).to(device) if device == "meta" else network
                model(torch.zeros(1, 3, image_side, image_side, device=device))
            error = None
            break
        except Exception as failed:  # any error of the model's own code
            error = failed
    network.train(was_training)
    if error is not None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise SettingsError(
            f"timm:{name} fails on {image_side}-pixel images ({reason}). Set another image_side or another model"
        ) from error


def create_with_options(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Create the model; drop_path_rate=0 is omitted if the model does not know it.

    Some models have a default above 0 (nest: 0.5), so 0 is passed to all models that accept it.
    """
    import timm

    try:
        return timm.create_model(name, pretrained=False, num_classes=num_classes, **options)
    except TypeError as error:
        if options["drop_path_rate"] or "drop_path_rate" not in str(error):
            raise
    others = {option: value for option, value in options.items() if option != "drop_path_rate"}
    return timm.create_model(name, pretrained=False, num_classes=num_classes, **others)
