"""Power of a planned comparison: the smallest difference that its seeds can confirm, from the spread of earlier runs.

Sources of the spread, the best first: paired differences of this comparison's own finished runs, paired differences in
its last report, and seeds of other finished runs with the same preset. Without any, the statement is in standard
deviations.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError
from comparison.experiment import Experiment
from comparison.paired_tests import ALPHA, detectable_effect, least_p, seeds_needed
from comparison.sequential import plan_looks
from records.run_folder import RunFolder


@dataclass(frozen=True)
class Spread:
    """Standard deviation of paired differences, in points, and where it comes from."""

    points: float
    source: str


def statement(experiment: Experiment, spread: Spread | None) -> str:
    """Return one sentence on what the planned seeds can confirm, in points where a spread is known.

    With seeds in rounds, it is what the last look can confirm: at its seeds and its level.
    """
    comparisons, seeds, alpha = len(experiment.variants) - 1, experiment.seeds, ALPHA
    tests = f"{comparisons} comparisons" if comparisons > 1 else "1 comparison"
    tests += ", Bonferroni" if experiment.margin else ", Holm"
    advice = "Use at least {} seeds (--seeds {})"
    if experiment.max_seeds and experiment.round_seeds:
        last = plan_looks(experiment.round_seeds, experiment.max_seeds)[-1]
        seeds, alpha, advice = last.seeds, last.alpha, "Use a larger max_seeds, at least {}"
        tests += f", level {alpha:.2g} of the last look"
    effect = detectable_effect(seeds, comparisons, alpha)
    if effect is None:
        needed = seeds_needed(comparisons, alpha)
        if needed is None or needed <= seeds:  # so many looks that even the last one is too strict
            advice = "Use larger rounds, with more seeds each"
        return (
            f"{count_seeds(seeds)} cannot confirm any difference: p stays at or above "
            f"{min(1.0, comparisons * least_p(seeds)):.2g} ({tests}), and {alpha:.2g} is needed. "
            f"{advice.format(needed, needed)}"
        )
    start = f"{count_seeds(seeds)} detect a true difference of "
    if spread is None:
        return f"{start}{effect:.2f} standard deviations of the paired differences with 80 % power ({tests})"
    return (
        f"{start}{effect * spread.points:.2f} points with 80 % power "
        f"({tests}; sd of paired differences {spread.points:.2f} points, from {spread.source})"
    )


def count_seeds(count: int) -> str:
    """Return "1 seed" or "N seeds"."""
    return "1 seed" if count == 1 else f"{count} seeds"


def spread_of(experiment: Experiment, runs_dir: Path, results_dir: Path) -> Spread | None:
    """Return the spread of paired differences of this kind of run; None where no earlier run tells it."""
    own = _own_runs(experiment, runs_dir / experiment.name)
    if spread := spread_of_pairs(own, f"finished runs in {runs_dir.name}/{experiment.name}"):
        return spread
    if spread := spread_of_pairs(_of_report(results_dir / experiment.name), f"{results_dir.name}/{experiment.name}"):
        return spread
    return _of_preset(experiment, runs_dir)


def spread_of_pairs(accuracies: dict[str, dict[int, float]], source: str) -> Spread | None:
    """Return the standard deviation of the differences to the first variant, pooled over all variants.

    Args:
        accuracies: variant -> seed -> accuracy in points.
    """
    groups = []
    names = list(accuracies)
    for name in names[1:]:
        seeds = sorted(accuracies[name].keys() & accuracies[names[0]].keys())
        groups.append([accuracies[name][seed] - accuracies[names[0]][seed] for seed in seeds])
    pooled = _pooled(groups)
    return Spread(pooled, source) if pooled else None


def _own_runs(experiment: Experiment, folder: Path) -> dict[str, dict[int, float]]:
    """Accuracies in points of the finished runs of this comparison: variant -> seed -> accuracy."""
    found: dict[str, dict[int, float]] = {}
    for variant in experiment.variants:
        found[variant.name] = {}
        for seed in range(experiment.seeds):
            run = _finished(folder / variant.run_name(seed))
            if run and run[0].get("settings", {}).get("model") == variant.settings.as_dict()["model"]:
                found[variant.name][seed] = run[1]
    return found


def _of_report(folder: Path) -> dict[str, dict[int, float]]:
    """Accuracies in points on the validation split, of the report that stands in a folder."""
    try:
        rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["results"]["validation"]
        return {row["arm"]: {int(seed): value for seed, value in row["by_seed"].items()} for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # no report yet, or one that cannot be read: then another source is asked


def _of_preset(experiment: Experiment, runs_dir: Path) -> Spread | None:
    """The spread over seeds of runs that differ in nothing but the seed, and that started from the same preset.

    A paired difference of two independent runs has sqrt(2) times the standard deviation of one run.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for path in _folders(runs_dir):
        run = _finished(path)
        if (
            run
            and run[0].get("preset") == experiment.preset
            and run[0].get("hold_out") == (experiment.hold_out or None)
        ):
            key = [run[0].get(name) for name in ("settings", "max_steps", "max_minutes", "init_weights")]
            groups[json.dumps(key, sort_keys=True, default=str)].append(run[1])
    pooled = _pooled(groups.values())
    if not pooled:
        return None
    count = sum(len(group) for group in groups.values() if len(group) > 1)
    return Spread(math.sqrt(2) * pooled, f"{count} earlier runs of preset {Path(experiment.preset).stem}")


def _folders(runs_dir: Path) -> list[Path]:
    return sorted({path.parent for pattern in ("*/run.json", "*/*/run.json") for path in runs_dir.glob(pattern)})


def _finished(folder: Path) -> tuple[dict[str, Any], float] | None:
    """Facts and final validation accuracy (points) of a finished run; None for every other folder."""
    record = RunFolder(folder)
    try:
        if not record.exists or not record.is_finished():
            return None
        return record.facts(), 100 * record.metrics()[-1]["validation_accuracy"]
    except (OSError, ValueError, KeyError, IndexError, TypeError, RunError):
        return None  # a damaged folder or a run without a validation split: no basis for a plan


def _pooled(groups: Iterable[list[float]]) -> float | None:
    """Pooled standard deviation of groups of at least 2 values; None where there is no such group or no spread."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((len(group) - 1) * float(np.var(group, ddof=1)) for group in groups) / freedom) or None
