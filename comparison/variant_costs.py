"""Every variant built without memory for its weights, and counted."""

from __future__ import annotations

import torch

from common.errors import SettingsError, unknown
from comparison.experiment import Experiment
from config.settings import Settings
from image_data.augmentation import check
from model import build_model
from models.cost import Cost, count_flops, count_parameters
from optim.lr_schedule import Schedule
from optim.optimizers import build_optimizer
from parallel.strategies import STRATEGIES


def costs(experiment: Experiment, num_classes: int, image_side: int) -> list[Cost]:
    """Build every arm without memory for its weights, and count. Raises SettingsError that names the arm which cannot be."""
    found = []
    for arm in experiment.variants:
        try:
            found.append(cost(arm.settings, num_classes, arm.settings.image_side or image_side))
        except SettingsError as error:
            raise SettingsError(f"arm '{arm.name}': {error}") from None
        except Exception as error:  # of a person's new part: whatever it is, better now than after hours of other arms
            raise SettingsError(f"arm '{arm.name}' cannot be built: {type(error).__name__}: {error}") from error
    return found


def cost(settings: Settings, num_classes: int, image_side: int) -> Cost:
    """Parameters, and FLOPs of a forward pass (matrix products and convolutions; the rest is not counted)."""
    if settings.strategy not in STRATEGIES:
        raise SettingsError(unknown("strategy", settings.strategy, list(STRATEGIES)))
    Schedule(settings.schedule, total_steps=100)
    check(settings.augmentation)
    with torch.device("meta"):
        model = build_model(settings.model, num_classes, image_side).eval()
    build_optimizer(settings.engine["optimizer"], model, fused=False)
    try:
        flops = count_flops(model, image_side, "meta")
    except Exception:  # a part that looks at values, which the meta device has not
        flops = count_flops(build_model(settings.model, num_classes, image_side).eval(), image_side, "cpu")
    return Cost(count_parameters(model), flops)
