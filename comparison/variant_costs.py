"""Cost of every variant: built without memory for its weights, then counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common.errors import SettingsError
from comparison.experiment import Experiment, Variant, with_candidate
from config.own_parts import find_entry, own_parts_of
from config.settings import Settings
from image_data.augmentation import check
from model import build_model
from models.cost import Cost, count_flops, count_parameters
from models.parts import UnusablePart
from optim.lr_schedule import Schedule
from optim.optimizers import build_optimizer
from parallel.progressive_resizing import ProgressiveResizing
from parallel.strategies import STRATEGIES
from training.own_part_checks import check_before_data
from training.resizing_check import check_resizing

TOLERANCE = 0.01  # costs that differ by less count as equal
SPLIT = " (q, k, v split)"  # by Muon, with optimizer.params.split_qkv
ROLES = ("patches", "attention", "feed_forward")  # parts of a network whose optimizers are compared, by attribute name


@dataclass(frozen=True)
class VariantCost(Cost):
    """What a variant costs, and which optimizers train the matrices of each of its parts.

    Attributes:
        initial_flops: as `flops`, of the smaller images of progressive resizing.
        initial_fraction: fraction of the steps that train on these; 0 where progressive resizing is off.
        optimizers: role -> optimizers, such as "Muon", "AdamW and Muon" or "Muon (q, k, v split)".
    """

    optimizers: dict[str, str] = field(default_factory=dict)
    initial_flops: int = 0
    initial_fraction: float = 0.0

    def training_flops(self, steps: int, total_steps: int, batch: int) -> float:
        """Return the FLOPs of the first `steps` of a run of `total_steps`.

        A training step costs about 3 forward passes: one forward, and a backward pass of twice its cost.
        """
        smaller = min(steps, round(self.initial_fraction * total_steps))
        return 3.0 * batch * (smaller * self.initial_flops + (steps - smaller) * self.flops)


def check_own_parts_of(experiment: Experiment, data_dir: Path | None) -> None:
    """Run the user-defined parts of variants and tuned values once, before the dataset is fetched; print warnings.

    Raises:
        SettingsError: a part cannot be used; the message names the variant, the file and the line.
    """
    where = {f"variant '{variant.name}'": variant.settings for variant in experiment.variants}
    if tuning := experiment.tuning:
        first = experiment.variants[0]
        for i, values in enumerate(tuning.candidates):
            if own_parts_of(list(values)):
                one = with_candidate(first, experiment.preset, tuning, i)
                where[f"tune: variant '{first.name}' with {tuning.describe(i)}"] = one.settings
    for name, settings in where.items():
        try:
            for text in check_before_data(settings, data_dir, None if data_dir else experiment.dataset):
                print(f"warning: {name}: {text}")
        except SettingsError as error:
            raise SettingsError(f"{name}: {error}") from None


def costs(experiment: Experiment, num_classes: int, image_side: int) -> list[VariantCost]:
    """Count every variant.

    Raises:
        SettingsError: a variant cannot be built; the message names it.
    """
    return [cost_of(variant, num_classes, image_side) for variant in experiment.variants]


def cost_of(variant: Variant, num_classes: int, image_side: int) -> VariantCost:
    """Count one variant; raises SettingsError with its name where it cannot be built."""
    try:
        return cost(variant.settings, num_classes, variant.settings.image_side or image_side)
    except SettingsError as error:
        raise SettingsError(f"variant '{variant.name}': {error}") from None
    except Exception as error:  # whatever a user-defined part raises: better now than after hours of other variants
        text = f"variant '{variant.name}' cannot be built: {type(error).__name__}: {error}"
        raise SettingsError(text) from error


def cost(settings: Settings, num_classes: int, image_side: int) -> VariantCost:
    """Count parameters, and FLOPs of a forward pass (matrix products and convolutions only)."""
    find_entry(STRATEGIES, "strategy", settings.strategy)
    Schedule(settings.schedule, total_steps=100)
    check(settings.augmentation)
    try:
        with torch.device("meta"):
            model = build_model(settings.model, num_classes, image_side).eval()
    except UnusablePart:  # it may need values, which the meta device does not have
        model = build_model(settings.model, num_classes, image_side).eval()
    optimizers = optimizers_of(settings, model)
    check_resizing(settings, num_classes, image_side)
    resizing = ProgressiveResizing(settings.resizing, settings.model.patch)
    sides = image_side, resizing.initial_side(image_side)
    try:
        flops, initial_flops = (count_flops(model, side, "meta") for side in sides)
    except Exception:  # a part that reads values
        model = build_model(settings.model, num_classes, image_side).eval()
        flops, initial_flops = (count_flops(model, side, "cpu") for side in sides)
    fraction = settings.resizing.fraction if resizing.is_on else 0.0
    return VariantCost(count_parameters(model), flops, optimizers, initial_flops, fraction)


def optimizers_of(settings: Settings, model: nn.Module) -> dict[str, str]:
    """Return the optimizers that train the matrices of each part: with Muon, some parameters get AdamW."""
    kind = settings.engine["optimizer"]["type"]
    groups = build_optimizer(settings.engine["optimizer"], model, fused=False).param_groups
    trained_by = {
        id(parameter): "AdamW" if kind == "Muon" and not group["hidden"] else kind
        for group in groups
        for parameter in group["params"]
    }
    split = {id(parameter) for group in groups if group.get("row_splits") for parameter in group["params"]}
    found: dict[str, set[str]] = {}
    with_split = set()  # roles; `split_qkv` splits the matrices of parts that have `row_splits`
    for name, parameter in model.named_parameters():
        role = next((part for part in name.split(".") if part in ROLES), None)
        if role and parameter.ndim >= 2 and id(parameter) in trained_by:
            found.setdefault(role, set()).add(trained_by[id(parameter)])
            if id(parameter) in split:
                with_split.add(role)
    return {role: " and ".join(sorted(names)) + SPLIT * (role in with_split) for role, names in sorted(found.items())}


def unequal_costs(experiment: Experiment, costs: list[VariantCost]) -> dict[str, list[str]]:
    """Return what sets each variant apart from the first one before any run: its size, and who trains its parts.

    Returns:
        Variant -> sentences; empty lists for variants that are treated alike.
    """
    first, reference = experiment.variants[0], costs[0]
    quantity = "flops" if experiment.match == "flops" else "parameters"
    found: dict[str, list[str]] = {}
    for variant, cost in zip(experiment.variants, costs, strict=True):
        texts = found[variant.name] = []
        here, there = getattr(cost, quantity), getattr(reference, quantity)
        if abs(here / there - 1) > TOLERANCE:
            name = "FLOPs" if quantity == "flops" else quantity
            texts.append(f"{name}: {here:,} instead of {there:,} ({here / there:.2f} x)")
        # Another optimizer.type or split_qkv is the idea of the variant, and listed with its settings.
        ours, theirs = (settings.engine["optimizer"] for settings in (variant.settings, first.settings))
        if ours["type"] != theirs["type"]:
            continue
        ignored = SPLIT if ours["params"].get("split_qkv") != theirs["params"].get("split_qkv") else ""
        for role in sorted(cost.optimizers.keys() & reference.optimizers.keys()):
            one, other = (found_cost.optimizers[role].removesuffix(ignored) for found_cost in (cost, reference))
            if one != other:
                texts.append(f"{role} matrices are trained by {one} instead of {other} (not treated alike)")
    return found
