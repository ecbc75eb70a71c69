"""The statistics of a comparison, and the sentence that says what they show.

Arms are compared pair by pair: accuracy of an arm with seed k less that of the first arm with seed k. Of these differences,

    p         two-sided exact permutation test: of all 2^n ways to give each difference a sign, the share whose mean is at
              least as far from 0. With n seeds it cannot go under 2 / 2^n: 0.25 for 3 seeds, 0.06 for 5, 0.03 for 6.
    interval  95 %, paired t. Half of it is also the least difference that n seeds with this spread can tell from 0.
    Holm      with several arms p is corrected for their number, so that all claims of a report together are wrong in at
              most 5 of 100 reports. Intervals are not corrected.

"Better" and "worse" need a corrected p under 0.05, an interval without 0, and 5 seeds. Accuracies and differences are in points (per cent).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALPHA = 0.05
LEAST_SEEDS = 5  # under which nothing is called better, whatever the numbers
# 0.975 quantiles of Student's t for 1, 2, ... 19 degrees of freedom
T_975 = (
    12.7062,
    4.3027,
    3.1824,
    2.7764,
    2.5706,
    2.4469,
    2.3646,
    2.3060,
    2.2622,
    2.2281,
    2.2010,
    2.1788,
    2.1604,
    2.1448,
    2.1314,
    2.1199,
    2.1098,
    2.1009,
    2.0930,
)


@dataclass(frozen=True)
class Difference:
    """An arm less the first arm, in points. `half` (of the 95 % interval) is None for fewer than 2 seeds."""

    seeds: int
    mean: float
    half: float | None
    p: float
    p_corrected: float
    verdict: str  # better, worse, not shown, same
    sentence: str


def sign_flip_p(differences: list[float]) -> float:
    """Exact two-sided p of the permutation test on paired differences; all 2^n sign patterns."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(sum(differences))
    return float(np.mean(np.abs(sums) >= observed - 1e-9 * max(1.0, observed)))


def least_p(num_seeds: int) -> float:
    """The smallest p that the test can give: only all signs as they are, and all turned, are as extreme."""
    return min(1.0, 2.0 ** (1 - num_seeds))


def seeds_needed(num_comparisons: int) -> int:
    """Seeds from which on a claim is possible at all, the correction for `num_comparisons` included."""
    return next(n for n in range(LEAST_SEEDS, 64) if num_comparisons * least_p(n) < ALPHA)


def half_interval(differences: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean by the t distribution; None for fewer than 2 values."""
    n = len(differences)
    return None if n < 2 else float(T_975[n - 2] * np.std(differences, ddof=1) / np.sqrt(n))


def holm(p_values: list[float], num_comparisons: int) -> list[float]:
    """Holm's step-down correction, in the order given. `num_comparisons` may count arms that gave no p."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (num_comparisons - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def compare(accuracies: dict[str, dict[int, float]], first: str) -> dict[str, Difference]:
    """Every other arm against `first`. `accuracies`: arm -> seed -> accuracy in points; arms without a common seed are left out."""
    paired = {}
    for arm, by_seed in accuracies.items():
        common = sorted(by_seed.keys() & accuracies[first].keys())
        if arm != first and common:
            paired[arm] = [by_seed[seed] - accuracies[first][seed] for seed in common]
    num_comparisons = len(accuracies) - 1
    p_values = [sign_flip_p(differences) for differences in paired.values()]
    return {
        arm: judge(differences, p, corrected, num_comparisons)
        for (arm, differences), p, corrected in zip(
            paired.items(), p_values, holm(p_values, num_comparisons), strict=True
        )
    }


def judge(differences: list[float], p: float, corrected: float, num_comparisons: int) -> Difference:
    """The verdict on one arm, in words."""
    n, mean, half = len(differences), float(np.mean(differences)), half_interval(differences)
    apart = half is not None and abs(mean) > half
    verdict = "not shown"
    if not any(differences):
        verdict, sentence = "same", f"the same accuracy with every seed ({_seeds(n)})"
    elif half is None:
        sentence = f"no difference shown: one seed says nothing about a difference ({mean:+.2f} points measured)"
    elif apart and corrected < ALPHA and n >= LEAST_SEEDS:
        verdict = "better" if mean > 0 else "worse"
        sentence = f"{verdict} by {abs(mean):.2f} ± {half:.2f} points (p = {_p(corrected)}, {_seeds(n)})"
    elif not apart:
        sentence = f"no difference shown: {_seeds(n)} cannot show less than {half:.2f} points ({mean:+.2f} measured)"
    elif n < seeds_needed(num_comparisons):
        sentence = (
            f"no difference shown: {mean:+.2f} ± {half:.2f} points measured, but {_seeds(n)} cannot go under "
            f"p = {_p(least_p(n))}{_for_arms(num_comparisons)}; {seeds_needed(num_comparisons)} seeds could"
        )
    else:
        sentence = f"no difference shown: {mean:+.2f} ± {half:.2f} points measured, p = {_p(corrected)} ({_seeds(n)})"
    return Difference(n, mean, half, p, corrected, verdict, sentence)


def power_note(num_seeds: int, num_arms: int) -> str | None:
    """What to know before the first run: whether these seeds can show anything. None where they can."""
    needed = seeds_needed(num_arms - 1)
    if num_seeds >= needed:
        return None
    return (
        f"with {_seeds(num_seeds)} no arm can be called better or worse: p cannot go under {_p(least_p(num_seeds))}"
        f"{_for_arms(num_arms - 1)}; that takes {needed} seeds (--seeds {needed})"
    )


def _seeds(n: int) -> str:
    return "1 seed" if n == 1 else f"{n} seeds"


def _p(p: float) -> str:
    return f"{p:.2f}" if p >= 0.0095 else f"{p:.1g}"


def _for_arms(num_comparisons: int) -> str:
    return f", before the correction for {num_comparisons} arms" if num_comparisons > 1 else ""
