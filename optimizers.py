"""Optimisers by the name that `ds_config.json` gives, and the parameter groups that every engine hands them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from settings import SettingsError, unknown

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
}


def build_optimizer(config: dict[str, Any], model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """The optimiser of the `optimizer` section of `ds_config.json`, over the model's parameter groups.

    PyTorch's own optimisers, in DeepSpeed too: DeepSpeed's fused ones compile a CUDA extension at first use, which needs
    nvcc, and read "Adam" as AdamW. `fused` asks for the single-kernel form (GPU only).

    Raises:
        SettingsError: an unknown type, or parameters that it does not take.
    """
    name, params = config["type"], dict(config["params"])
    if name not in OPTIMIZERS:
        raise SettingsError(unknown("optimizer.type", name, list(OPTIMIZERS)))
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    try:
        return OPTIMIZERS[name](parameter_groups(model, params["lr"], params["weight_decay"]), **params, **({"fused": True} if fused else {}))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"optimizer.type={name} does not take optimizer.params as they stand: {error}") from error


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters, grouped by weight decay and learning rate.

    Vectors and scalars (norms, biases, temperatures) do not decay. A module may say more about its own parameters:
    `no_weight_decay`, a set of names, and `learning_rate_factors`, a dictionary from name to factor.
    Each group carries its `base_lr`, which the schedule multiplies.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    grouped: set[int] = set()  # a parameter may belong to several modules
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in grouped:
                grouped.add(id(parameter))
                decays = parameter.ndim >= 2 and name not in getattr(module, "no_weight_decay", ())
                factor = getattr(module, "learning_rate_factors", {}).get(name, 1.0)
                groups[weight_decay if decays else 0.0, factor].append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "lr": learning_rate * factor, "base_lr": learning_rate * factor}
        for (decay, factor), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
