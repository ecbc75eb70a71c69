"""Equal sizes: the free dimension of each variant is chosen so that its cost is that of the first variant.

The free dimension is the option `hidden` of the feed-forward. A feed-forward class names another option of its own with
the attribute `free_dimension`. A variant without a free dimension keeps its size, and the report marks it as unequal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from common.errors import SettingsError
from comparison.experiment import Experiment, Variant, check_distinct
from comparison.variant_costs import TOLERANCE, cost_of
from config.own_parts import find_entry
from config.settings import resolve
from models.feed_forward import FEED_FORWARDS

START = 64  # first size that is tried
STEPS = 6  # of the search; costs are linear in `hidden`, so two are enough for all parts of this project


def match_sizes(experiment: Experiment, num_classes: int, image_side: int) -> Experiment:
    """Return the experiment with every variant sized to the first one's parameters or FLOPs, as `match` asks.

    Raises:
        SettingsError: a variant cannot be built, or two variants become the same.
    """
    if experiment.match == "none":
        return experiment

    def cost_in(variant: Variant) -> int:
        return getattr(cost_of(variant, num_classes, image_side), experiment.match)

    first = experiment.variants[0]
    target = cost_in(first)
    variants = [first]
    for variant in experiment.variants[1:]:
        variants.append(_resize(variant, experiment.preset, target, cost_in) if variant.is_matched else variant)
    check_distinct(experiment.name, variants, f' with match = "{experiment.match}"; give one of them match = "none"')
    return replace(experiment, variants=variants)


def _resize(variant: Variant, preset: str, target: int, cost_in: Callable[[Variant], int]) -> Variant:
    """Return the variant at the size whose cost is nearest to `target`; unchanged if it fits or has no such size."""
    if _fits(cost_in(variant), target):
        return variant
    part = find_entry(FEED_FORWARDS, "feed-forward", variant.settings.model.feed_forward)
    option = f"model.feed_forward_options.{getattr(part, 'free_dimension', 'hidden')}"

    def at(size: int) -> Variant:
        overrides = [*variant.overrides, f"{option}={size}"]
        return replace(variant, overrides=overrides, settings=resolve(preset, overrides))

    try:
        found = {size: cost_in(at(size)) for size in (START, 2 * START)}
    except SettingsError:
        return variant  # the part has no such option
    for _ in range(STEPS):
        (low, low_cost), (high, high_cost) = sorted(found.items(), key=lambda item: abs(item[1] - target))[:2]
        if low_cost == high_cost:
            break
        size = max(1, round(low + (target - low_cost) * (high - low) / (high_cost - low_cost)))
        if size in found:
            break
        try:
            found[size] = cost_in(at(size))
        except SettingsError:
            break  # the part takes only certain sizes
    best = min(found, key=lambda size: abs(found[size] - target))
    has_effect = len(set(found.values())) > 1
    return at(best) if has_effect else variant


def _fits(cost: int, target: int) -> bool:
    return abs(cost / target - 1) <= TOLERANCE
