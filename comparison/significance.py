"""The verdict of a comparison in words: the effect first, then what may be claimed.

Variants are compared pair by pair: the accuracy of a variant with seed k minus that of the first variant with seed k.
A difference is confirmed when both tests of `comparison/paired_tests.py`, after correction, give p < 0.05:

    Holm         each p is corrected for the number of PLANNED comparisons, including variants whose runs failed. All
                 claims of a report together are wrong in at most 5 of 100 reports.
    Bonferroni   takes the place of Holm's correction where the experiment names a margin: each variant then has two
                 hypotheses, of which at most one is true, and rejecting one does not make the other claims safer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from comparison.paired_tests import (
    ALPHA,
    bonferroni,
    can_confirm,
    half_interval,
    holm,
    paired_t_p,
    seeds_for,
    seeds_needed,
    sign_flip_p,
    standardized_effect,
    tost_p,
)

LEAST_SEEDS_EQUIVALENT = 5  # below this the t distribution of so few differences is no basis for "equivalent"
CONFIRMED = ("confirmed better", "confirmed worse")


@dataclass(frozen=True)
class Difference:
    """The paired difference of a variant to the first one, in points.

    Fields that need at least 2 seeds are None with 1: half, low, high, p_t, p_t_corrected, and effect. `effect` is None
    as well when all differences are the same.
    """

    seeds: int
    mean: float
    half: float | None  # half the width of the 95 % interval
    p: float  # sign-flip
    p_corrected: float
    verdict: str  # confirmed better, confirmed worse, equivalent, preliminary, inconclusive, identical
    sentence: str
    low: float | None = None
    high: float | None = None
    p_t: float | None = None  # paired t
    p_t_corrected: float | None = None
    effect: float | None = None  # d_z
    p_equivalent: float | None = None  # TOST after Holm correction; None without a margin
    by_seed: dict[int, float] | None = None


def compare(
    accuracies: dict[str, dict[int, float]],
    first: str,
    margin: float | None = None,
    planned: int | None = None,
    alpha: float | None = ALPHA,
    last_alpha: float | None = None,
) -> dict[str, Difference]:
    """Compare every other variant with `first`; variants that share no seed with it are left out.

    Args:
        accuracies: variant -> seed -> accuracy in points.
        margin: points within which a difference does not matter; None makes no claim of equivalence.
        planned: number of comparisons that were planned; by default that of the other variants in `accuracies`.
        alpha: error rate of all claims together; None: nothing is tested, because runs are missing.
        last_alpha: with seeds in rounds, the error rate of the last look. The advice on the number of seeds holds for
            it, since the level of an early look is too strict for any sensible number.
    """
    correct = bonferroni if margin else holm
    planned = planned or max(1, len(accuracies) - 1)
    paired: dict[str, dict[int, float]] = {}
    for variant, by_seed in accuracies.items():
        common = sorted(by_seed.keys() & accuracies[first].keys())
        if variant != first and common:
            paired[variant] = {seed: by_seed[seed] - accuracies[first][seed] for seed in common}
    values = [list(by_seed.values()) for by_seed in paired.values()]
    flips = correct([sign_flip_p(one) for one in values], planned)
    t_tests = correct([paired_t_p(one) if len(one) > 1 else 1.0 for one in values], planned)
    equivalences = correct([tost_p(one, margin) if margin and len(one) > 1 else 1.0 for one in values], planned)
    return {
        variant: verdict_for(by_seed, flip, t_test, equivalent, planned, margin, alpha, last_alpha)
        for (variant, by_seed), flip, t_test, equivalent in zip(
            paired.items(), flips, t_tests, equivalences, strict=True
        )
    }


def verdict_for(
    by_seed: dict[int, float],
    p_corrected: float,
    p_t_corrected: float,
    p_equivalent: float,
    planned: int,
    margin: float | None,
    alpha: float | None = ALPHA,
    last_alpha: float | None = None,
) -> Difference:
    """Return the verdict on one variant and the sentence that states it: the effect first, then how to read it.

    Args:
        alpha: None makes no claim, because runs are missing.
        last_alpha: as for `compare`.
    """
    differences = list(by_seed.values())
    n, mean, half, effect = len(differences), float(np.mean(differences)), None, None
    if n > 1:
        half, effect = half_interval(differences), standardized_effect(differences)
    facts: dict[str, Any] = {
        "seeds": n,
        "mean": mean,
        "half": half,
        "p": sign_flip_p(differences),
        "p_corrected": p_corrected,
        "low": None if half is None else mean - half,
        "high": None if half is None else mean + half,
        "p_t": paired_t_p(differences) if n > 1 else None,
        "p_t_corrected": p_t_corrected if n > 1 else None,
        "effect": effect,
        "p_equivalent": p_equivalent if margin and n > 1 else None,
        "by_seed": by_seed,
    }

    def difference(verdict: str, numbers: str, reading: str) -> Difference:
        return Difference(**facts, verdict=verdict, sentence=f"{numbers}: {verdict}{reading}")

    if not any(differences):
        return difference(
            "identical", f"+0.00 points (n = {n})", " with every seed. Check that the change has an effect"
        )
    if half is None:
        return difference("inconclusive", f"{mean:+.2f} points (n = 1)", ". One seed gives no interval")
    kind = "Bonferroni" if margin else "Holm"
    correction = f" after {kind} correction for {planned} comparisons" if planned > 1 else ""
    numbers = (
        f"{mean:+.2f} points (95 % CI {mean - half:+.2f} to {mean + half:+.2f}, n = {n}; "
        f"{_p(p_t_corrected)} paired t, {_p(p_corrected)} sign-flip{correction}"
        + (f"; d = {effect:.1f})" if effect is not None else ")")
    )
    if alpha is None:
        return difference("inconclusive", numbers, ". Not tested, because runs are missing")
    is_equivalent = bool(margin) and n >= LEAST_SEEDS_EQUIVALENT and p_equivalent < alpha
    excludes_zero = abs(mean) > half
    if excludes_zero and max(p_corrected, p_t_corrected) < alpha:
        small = f", although within the margin of ±{margin:g} points" if is_equivalent else ""
        return difference(CONFIRMED[mean < 0], numbers, small)
    if is_equivalent:
        return difference("equivalent", numbers, f" within ±{margin:g} points ({_p(p_equivalent)})")
    advised = alpha if last_alpha is None else last_alpha
    if excludes_zero and not can_confirm(n, planned, alpha):
        return difference(
            "preliminary",
            numbers,
            f". Not confirmed: that needs {_needed(n, planned, advised, last_alpha is not None)}",
        )
    seeds = seeds_for(effect, planned, advised)
    what = "confirm a difference of this size with 80 % power"
    advice = (
        f". About {max(seeds, n + 1)} seeds would {what}" if seeds else f". No feasible number of seeds would {what}"
    )
    return difference("inconclusive", numbers, advice)


def _needed(n: int, planned: int, alpha: float, is_in_rounds: bool) -> str:
    """What it takes to confirm anything, for n seeds that cannot. --seeds would change the size of the rounds."""
    needed = seeds_needed(planned, alpha)
    if needed is None or needed <= n:
        return "a later look or larger rounds"
    return f"at least {needed} seeds ({f'max_seeds = {needed} or more' if is_in_rounds else f'--seeds {needed}'})"


def _p(p: float) -> str:
    if p < 1e-4:
        return "p < 0.0001"
    digits = 2 if p >= 0.0995 else 3  # 0.047 shall not read 0.05
    return f"p = {p:.{digits}f}" if p >= 0.0095 else f"p = {p:.1g}"
