"""Statistics of paired differences: two tests, intervals, corrections for several comparisons, and power.

Differences are in points (percent), one for each seed: the accuracy of a variant minus that of the first variant.

    interval     95 %, paired t. It is not corrected for the number of comparisons.
    p            two tests, both two-sided: paired t, and the sign-flip test. The sign-flip p is the share of all
                 2^n ways to sign the differences whose mean is at least as far from 0. It cannot go below 2 / 2^n, nor
                 below 1 / 100,000 with more than 40 seeds, where random sign patterns take the place of all 2^n.
    d            standardized effect: mean difference / standard deviation of the differences (Cohen's d_z).
    TOST         two one-sided t tests against a margin that the experiment names: small p for differences within it.

Power is that of both tests together. `comparison/significance.py` makes claims of these figures.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from scipy import stats

ALPHA = 0.05
POWER = 0.8
EXACT_SEEDS = 40  # up to here all 2^n sign patterns are counted; beyond, RESAMPLES random ones
RESAMPLES = 99_999
MOST_SEEDS = 2000  # end of the search for a number of seeds
FINE_PATTERNS = 25  # sign patterns that may reject: with more, the sign-flip test has the power of the t test
SIMULATED_SUMS = 2**22  # of differences, for the power with few seeds: 4,000 comparisons of 10 seeds, 500 of 13
SIMULATED_SEEDS = 20  # at most: the simulation holds all 2^n sums of a comparison


# --- tests and intervals --------------------------------------------------------------------------------------------


def sign_flip_p(differences: list[float]) -> float:
    """Return the two-sided p of the sign-flip permutation test on paired differences.

    It is exact for up to EXACT_SEEDS differences: the sums of both halves are enumerated and combined. With more,
    random sign patterns are drawn with a fixed seed.
    """
    observed = abs(math.fsum(differences))
    least = observed - 1e-9 * max(1.0, observed)  # sums that are equal but for rounding are equally extreme
    if least <= 0:
        return 1.0
    if len(differences) > EXACT_SEEDS:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(RESAMPLES, len(differences)))
        extreme = int(np.sum(np.abs(signs @ np.asarray(differences)) >= least))
        return (extreme + 1) / (RESAMPLES + 1)
    half = len(differences) // 2
    left, right = _signed_sums(differences[:half]), np.sort(_signed_sums(differences[half:]))
    at_least = len(right) - np.searchsorted(right, least - left, side="left")
    return min(1.0, 2 * float(np.sum(at_least)) / 2.0 ** len(differences))  # the other tail is its mirror image


def _signed_sums(differences: list[float]) -> np.ndarray:
    """Sums of the differences under all sign patterns, shape (2^n,)."""
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return sums


def least_p(num_seeds: int) -> float:
    """Return the smallest p of the sign-flip test: only the observed signs and all of them flipped are as extreme.

    It is larger above EXACT_SEEDS than just below, since the observed signs are one of the patterns that are drawn.
    """
    return 1 / (RESAMPLES + 1) if num_seeds > EXACT_SEEDS else min(1.0, 2.0 ** (1 - num_seeds))


def paired_t_p(differences: list[float]) -> float:
    """Return the two-sided p of the paired t test, for at least 2 differences."""
    error = _standard_error(differences)
    if not error:
        return 0.0 if any(differences) else 1.0
    return float(2 * stats.t.sf(abs(np.mean(differences)) / error, len(differences) - 1))


def tost_p(differences: list[float], margin: float) -> float:
    """Return the p of two one-sided t tests: small where the mean difference lies within -margin and +margin."""
    mean, error = float(np.mean(differences)), _standard_error(differences)
    if not error:
        return 0.0 if abs(mean) < margin else 1.0
    return float(stats.t.sf((margin - abs(mean)) / error, len(differences) - 1))


def half_interval(differences: list[float]) -> float | None:
    """Return half the width of the 95 % interval of the mean (Student's t); None for fewer than 2 values."""
    n = len(differences)
    return None if n < 2 else _critical_t(ALPHA, n - 1) * _standard_error(differences)


def standardized_effect(differences: list[float]) -> float | None:
    """Return d_z, mean / standard deviation; None for fewer than 2 values and for values that are all the same."""
    error = _standard_error(differences) if len(differences) > 1 else 0.0
    return float(np.mean(differences)) / (error * math.sqrt(len(differences))) if error else None


@cache
def _critical_t(alpha: float, freedom: int) -> float:
    """Value that |t| exceeds with probability alpha, for that many degrees of freedom."""
    return float(stats.t.ppf(1 - alpha / 2, freedom))


def _standard_error(differences: list[float]) -> float:
    """Standard error of the mean; 0 where the values differ by rounding only."""
    spread = float(np.std(differences, ddof=1))
    return 0.0 if spread <= 1e-9 * max(1.0, abs(differences[0])) else spread / math.sqrt(len(differences))


def holm(p_values: list[float], num_comparisons: int) -> list[float]:
    """Return Holm's step-down corrected p, in the order given. `num_comparisons` may count variants without a p."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (num_comparisons - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def bonferroni(p_values: list[float], num_comparisons: int) -> list[float]:
    """Return each p times the number of comparisons, at most 1."""
    return [min(1.0, num_comparisons * p) for p in p_values]


# --- power ----------------------------------------------------------------------------------------------------------


def can_confirm(num_seeds: int, num_comparisons: int, alpha: float = ALPHA) -> bool:
    """Return whether these seeds can confirm a difference, however large it is."""
    return num_seeds >= 2 and num_comparisons * least_p(num_seeds) < alpha


def seeds_needed(num_comparisons: int, alpha: float = ALPHA) -> int | None:
    """Return the fewest seeds with which a difference can be confirmed, however large it is.

    None: no number of seeds can, because alpha is 0 or below what the sign-flip test resolves.
    """
    return next((n for n in range(2, EXACT_SEEDS + 1) if can_confirm(n, num_comparisons, alpha)), None)


def power_of(effect: float, num_seeds: int, num_comparisons: int, alpha: float = ALPHA) -> float:
    """Return the power of both tests for a true d_z, at the strictest level that the correction asks for."""
    if not can_confirm(num_seeds, num_comparisons, alpha):
        return 0.0
    level = alpha / num_comparisons
    if num_seeds <= SIMULATED_SEEDS and level < FINE_PATTERNS * least_p(num_seeds):
        return float(np.mean(_least_effects(num_seeds, level) < abs(effect)))
    power = float(stats.nct.sf(_critical_t(level, num_seeds - 1), num_seeds - 1, abs(effect) * math.sqrt(num_seeds)))
    return 1.0 if math.isnan(power) else power  # scipy's noncentral t returns NaN far beyond power 1


@cache
def _least_effects(num_seeds: int, level: float) -> np.ndarray:
    """Return, for random comparisons of few seeds, the true d_z from which on both tests reject: (R,).

    The differences are z + d, with z from the standard normal distribution. The t test rejects when d exceeds
    t s / sqrt(n) - mean(z). Flipping the signs of a set of differences keeps their sum as large when the sum over the
    set is at most 0, which is when d <= -mean(z over the set). At most `most` sets may do so, the empty one included.
    """
    z = np.random.default_rng(0).standard_normal((min(4000, max(200, SIMULATED_SUMS >> num_seeds)), num_seeds))
    error = z.std(axis=1, ddof=1) / math.sqrt(num_seeds)
    of_t = _critical_t(level, num_seeds - 1) * error - z.mean(axis=1)
    most = math.ceil(level / least_p(num_seeds)) - 1  # p < level
    sizes = _subset_sums(np.ones(num_seeds))[1:]
    of_flips = [np.partition(-_subset_sums(row)[1:] / sizes, -most)[-most] for row in z]
    return np.maximum(of_t, of_flips)


def _subset_sums(values: np.ndarray) -> np.ndarray:
    """Return the sums over all subsets of n values, the empty one first: (2^n,)."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums


def detectable_effect(num_seeds: int, num_comparisons: int, alpha: float = ALPHA) -> float | None:
    """Return the smallest d_z that is confirmed with 80 % power; None where these seeds can confirm nothing."""
    if not can_confirm(num_seeds, num_comparisons, alpha):
        return None
    low, high = 0.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle, num_seeds, num_comparisons, alpha) >= POWER else (middle, high)
    return high


def seeds_for(effect: float | None, num_comparisons: int, alpha: float = ALPHA) -> int | None:
    """Return the seeds that confirm a true d_z with 80 % power; None where that takes more than MOST_SEEDS.

    Levels that random sign patterns cannot reach allow EXACT_SEEDS at most.
    """
    low, high = seeds_needed(num_comparisons, alpha), MOST_SEEDS
    if not can_confirm(MOST_SEEDS, num_comparisons, alpha):
        high = EXACT_SEEDS
    if effect is None or low is None or power_of(effect, high, num_comparisons, alpha) < POWER:
        return None
    while low < high:
        middle = (low + high) // 2
        enough = power_of(effect, middle, num_comparisons, alpha) >= POWER
        low, high = (low, middle) if enough else (middle + 1, high)
    return low
