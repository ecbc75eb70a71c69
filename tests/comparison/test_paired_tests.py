"""comparison/paired_tests.py: tests against brute force and scipy, and power by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from comparison.paired_tests import (
    EXACT_SEEDS,
    detectable_effect,
    half_interval,
    holm,
    least_p,
    paired_t_p,
    power_of,
    seeds_for,
    seeds_needed,
    sign_flip_p,
    standardized_effect,
    tost_p,
)

SAMPLES = [
    [0.7],
    [1.0, 2.0, 3.0],
    [1.0, -1.0, 1.0, -1.0],
    [0.1, 0.2, 0.3, -0.6],
    [0.0, 0.0, 0.5],
    [0.0] * 4,
    np.random.default_rng(0).normal(0.5, 1, 9).tolist(),
    np.random.default_rng(1).normal(0.2, 1, 12).tolist(),
]


# --- tests and intervals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("differences", SAMPLES)
def test_sign_flip_p_is_the_share_of_sign_patterns_that_are_as_extreme(differences):
    means = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == sum(m >= abs(sum(differences)) - 1e-9 for m in means) / len(means)


@pytest.mark.parametrize("differences", SAMPLES[3:4] + SAMPLES[6:])
def test_p_values_are_those_of_scipy(differences):
    found = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip_p(differences) == pytest.approx(found.pvalue)
    assert paired_t_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    assert half_interval(differences) == pytest.approx((high - low) / 2)
    below = stats.ttest_1samp(differences, 0.4, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -0.4, alternative="greater").pvalue
    assert tost_p(differences, 0.4) == pytest.approx(max(below, above))


def test_the_smallest_sign_flip_p_belongs_to_differences_of_one_sign():
    assert [least_p(n) for n in (1, 2, 3, 5, 6)] == [1.0, 0.5, 0.25, 0.0625, 0.03125]
    assert all(sign_flip_p([0.5 + i for i in range(n)]) == least_p(n) for n in range(1, 25))
    assert sign_flip_p([0.5 + i for i in range(41)]) == least_p(41) == 1e-5 > least_p(EXACT_SEEDS)


def test_many_seeds_have_no_limit():
    rng = np.random.default_rng(2)
    exact, drawn = (rng.normal(0.3, 1, n).tolist() for n in (40, 60))
    for differences in (exact, drawn):
        assert sign_flip_p(differences) == pytest.approx(paired_t_p(differences), rel=0.4, abs=0.01)


def test_the_interval_is_the_textbook_one():
    assert half_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.1824463 * math.sqrt(5 / 3) / 2, rel=1e-6)
    assert half_interval([1.0]) is None and standardized_effect([1.0]) is None
    assert standardized_effect([1.0, 2.0, 3.0]) == pytest.approx(2.0)


def test_equal_differences_have_no_standardized_effect_and_no_warning(recwarn):
    assert standardized_effect([0.1 + 0.2, 0.3]) is None and paired_t_p([0.1 + 0.2, 0.3]) == 0.0
    assert paired_t_p([0.0, 0.0]) == 1.0 and not recwarn.list


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9], 2) == [1.0, 1.0] and holm([0.02], 1) == [0.02]
    assert holm([0.01], 3) == pytest.approx([0.03])  # two variants failed, but their comparisons were planned


# --- power ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "comparisons"), [(6, 1), (8, 5), (9, 10), (12, 2)])
def test_power_is_that_of_both_tests_also_with_the_fewest_seeds(seeds, comparisons):
    """One real difference among variants without any, which Holm's correction treats at its strictest level."""
    effect, rng = detectable_effect(seeds, comparisons), np.random.default_rng(8)
    found = 0
    for _ in range(1000):
        differences = list(rng.normal(effect, 1, seeds))
        found += comparisons * max(sign_flip_p(differences), paired_t_p(differences)) < 0.05
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_the_seeds_that_a_claim_needs_grow_with_the_comparisons():
    assert [seeds_needed(k) for k in (1, 2, 4, 10)] == [6, 7, 8, 9]
    assert seeds_needed(1, 0.0) is None and seeds_for(3.0, 1, 0.0) is None and power_of(3.0, 30, 1, 0.0) == 0.0


def test_no_number_of_seeds_above_40_reaches_a_level_below_that_of_the_random_patterns():
    assert seeds_needed(1, 1e-9) == 31 and power_of(9.0, 40, 1, 1e-9) > 0.99
    assert power_of(9.0, 41, 1, 1e-9) == 0.0 and detectable_effect(41, 1, 1e-9) is None
    assert 31 <= seeds_for(9.0, 1, 1e-9) <= EXACT_SEEDS and seeds_for(0.5, 1, 1e-9) is None
    assert seeds_for(0.5, 1, 1e-4) > EXACT_SEEDS


def test_the_detectable_effect_is_the_one_that_has_80_percent_power():
    effect = detectable_effect(9, 2)
    assert power_of(effect, 9, 2) == pytest.approx(0.8, abs=1e-3) and seeds_for(effect + 0.01, 2) == 9
    assert power_of(50, 30, 1) == 1.0 and seeds_for(1e-4, 1) is None
    assert detectable_effect(5, 1) is None
