"""comparison/significance.py: tests against brute force and scipy, error rates by simulation, and the verdicts."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from comparison.report import _compare
from comparison.significance import (
    CONFIRMED,
    compare,
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


# --- error rates ----------------------------------------------------------------------------------------------------


def test_variants_without_a_finished_run_count_in_the_correction():
    accuracies = {"plain": {0: 50.0, 1: 51.0, 2: 52.0}, "better": {0: 51.0, 1: 52.5, 2: 53.0}}
    results: list = [
        SimpleNamespace(name=name, accuracies=lambda split, name=name: accuracies.get(name, {}))
        for name in ("plain", "better", "failed", "failed too")
    ]
    experiment: Any = SimpleNamespace(variants=results, max_seeds=None, round_seeds=None, margin=None)
    found = _compare(experiment, results, "validation", "validation")["better"]
    assert found.p_t_corrected == pytest.approx(3 * compare(accuracies, "plain")["better"].p_t_corrected)


@pytest.mark.parametrize(("seeds", "variants"), [(6, 2), (9, 4), (12, 6)])
def test_at_most_5_percent_of_experiments_without_a_difference_are_called_confirmed(seeds, variants, without_advice):
    rng, confirmed, covered, intervals = np.random.default_rng(seeds), 0, 0, 0
    for _ in range(2000):
        by_seed = rng.normal(0, 0.5, seeds)  # what a seed does to all variants alike
        names = [f"v{i}" for i in range(variants)]
        accuracies = {name: dict(enumerate(50 + by_seed + rng.normal(0, 1, seeds))) for name in names}
        found = compare(accuracies, "v0", margin=0.5).values()
        confirmed += any(one.verdict in CONFIRMED for one in found)
        covered += sum(one.low <= 0 <= one.high for one in found)
        intervals += len(found)
    assert confirmed / 2000 <= 0.05
    assert covered / intervals == pytest.approx(0.95, abs=0.012)


def test_at_most_5_percent_of_real_differences_are_called_equivalent(without_advice):
    rng, wrong = np.random.default_rng(5), 0
    for _ in range(2000):  # a difference of exactly the margin
        accuracies = {"a": dict(enumerate(rng.normal(50, 0.5, 9))), "b": dict(enumerate(rng.normal(51, 0.5, 9)))}
        wrong += compare(accuracies, "a", margin=1.0)["b"].verdict == "equivalent"
    assert wrong / 2000 <= 0.06


def test_with_a_margin_all_claims_together_are_wrong_in_at_most_5_percent(without_advice):
    """One variant is equal to the first, the other differs by exactly the margin: both kinds of claims can be wrong."""
    rng, wrong = np.random.default_rng(7), 0
    for _ in range(2000):
        accuracies = {
            name: dict(enumerate(rng.normal(mean, 0.5, 12))) for name, mean in (("a", 50), ("b", 50), ("c", 51))
        }
        found = compare(accuracies, "a", margin=1.0)
        wrong += found["b"].verdict in CONFIRMED or found["c"].verdict == "equivalent"
    assert wrong / 2000 <= 0.06


@pytest.mark.parametrize(("seeds", "comparisons"), [(6, 1), (8, 5), (9, 10), (12, 2)])
def test_power_is_that_of_both_tests_also_with_the_fewest_seeds(seeds, comparisons):
    """One real difference among variants without any, which Holm's correction treats at its strictest level."""
    effect, rng = detectable_effect(seeds, comparisons), np.random.default_rng(8)
    found = 0
    for _ in range(1000):
        differences = list(rng.normal(effect, 1, seeds))
        found += comparisons * max(sign_flip_p(differences), paired_t_p(differences)) < 0.05
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_the_advice_is_more_seeds_than_there_are():
    found = of([1.0, 1.0, 1.0, 1.0, 1.0, -0.1])
    assert found.verdict == "inconclusive" and "About 7 seeds would confirm" in found.sentence


def test_nothing_is_claimed_without_a_level():
    found = compare({"a": dict.fromkeys(range(9), 50.0), "b": dict(enumerate(50 + v for v in CLEAR))}, "a", alpha=None)
    assert found["b"].verdict == "inconclusive" and found["b"].sentence.endswith("Not tested, because runs are missing")


def test_the_power_statement_agrees_with_simulated_experiments():
    effect, rng = detectable_effect(9, 2), np.random.default_rng(6)
    found = 0
    for _ in range(1000):
        accuracies = {"a": dict.fromkeys(range(9), 50.0)}
        for name in "bc":
            accuracies[name] = dict(enumerate(50 + rng.normal(effect, 1, 9)))
        found += compare(accuracies, "a")["b"].verdict == "confirmed better"
    assert 0.76 <= found / 1000 <= 0.9  # 80 %, a little more since Holm relaxes the second comparison
    assert detectable_effect(5, 1) is None
    assert power_of(effect, 9, 2) == pytest.approx(0.8, abs=1e-3) and seeds_for(effect + 0.01, 2) == 9
    assert power_of(50, 30, 1) == 1.0 and seeds_for(1e-4, 1) is None


# --- verdicts -------------------------------------------------------------------------------------------------------


def of(differences, *more, margin=None):
    """The verdict on a variant with these differences to the first one; `more`: further variants."""
    variants = {"first": dict.fromkeys(range(20), 50.0)}
    for i, values in enumerate([differences, *more]):
        variants[f"v{i}"] = {seed: 50 + value for seed, value in enumerate(values)}
    return compare(variants, "first", margin)["v0"]


CLEAR = [1.0, 1.2, 0.9, 1.1, 1.3, 1.0, 1.1, 0.9, 1.2]


@pytest.mark.parametrize(
    ("differences", "others", "margin", "sentence"),
    [
        (
            CLEAR[:6],
            0,
            None,
            "+1.08 points (95 % CI +0.93 to +1.24, n = 6; p < 0.0001 paired t, p = 0.031 sign-flip; d = 7.4): "
            "confirmed better",
        ),
        (
            [-d for d in CLEAR[:6]],
            0,
            None,
            "-1.08 points (95 % CI -1.24 to -0.93, n = 6; p < 0.0001 paired t, p = 0.031 sign-flip; d = -7.4): "
            "confirmed worse",
        ),
        (
            CLEAR[:3],
            0,
            None,
            "+1.03 points (95 % CI +0.65 to +1.41, n = 3; p = 0.007 paired t, p = 0.25 sign-flip; d = 6.8): "
            "preliminary. Not confirmed: that needs at least 6 seeds (--seeds 6)",
        ),
        (
            CLEAR[:6],
            1,
            None,
            "+1.08 points (95 % CI +0.93 to +1.24, n = 6; p < 0.0001 paired t, p = 0.062 sign-flip after Holm "
            "correction for 2 comparisons; d = 7.4): preliminary. "
            "Not confirmed: that needs at least 7 seeds (--seeds 7)",
        ),
        (
            [0.5, -0.3, 0.2],
            0,
            None,
            "+0.13 points (95 % CI -0.87 to +1.14, n = 3; p = 0.63 paired t, p = 0.75 sign-flip; d = 0.3): "
            "inconclusive. About 75 seeds would confirm a difference of this size with 80 % power",
        ),
        ([0.4], 0, None, "+0.40 points (n = 1): inconclusive. One seed gives no interval"),
        ([0.0] * 3, 0, None, "+0.00 points (n = 3): identical with every seed. Check that the change has an effect"),
        (
            [2.0, 2.0, 0.1, 2.0, 2.0, -0.15],
            0,
            None,
            "+1.33 points (95 % CI +0.22 to +2.43, n = 6; p = 0.027 paired t, p = 0.094 sign-flip; d = 1.3): "
            "inconclusive. About 8 seeds would confirm a difference of this size with 80 % power",
        ),
        (
            [0.1, -0.1, 0.05, -0.1, 0.1, 0.0],
            0,
            0.5,
            "+0.01 points (95 % CI -0.09 to +0.10, n = 6; p = 0.83 paired t, p = 1.00 sign-flip; d = 0.1): equivalent "
            "within ±0.5 points (p < 0.0001)",
        ),
        (
            CLEAR[:6],
            0,
            2.0,
            "+1.08 points (95 % CI +0.93 to +1.24, n = 6; p < 0.0001 paired t, p = 0.031 sign-flip; d = 7.4): "
            "confirmed better, although within the margin of ±2 points",
        ),
    ],
)
def test_the_effect_comes_first_and_the_verdict_claims_no_more_than_the_seeds_allow(
    differences, others, margin, sentence
):
    found = of(differences, *[[0.3, -0.3] * 4] * others, margin=margin)
    assert found.sentence == sentence
    assert found.verdict in sentence


def test_a_large_effect_with_few_seeds_is_preliminary():
    first = {k: 10 + 0.1 * k for k in range(5)}
    found = compare({"a": first, "b": {k: 30 + 0.1 * k + 0.01 * (-1) ** k for k in range(5)}}, "a")["b"]
    assert found.verdict == "preliminary" and found.sentence.startswith(
        "+20.00 points (95 % CI +19.99 to +20.02, n = 5"
    )


def test_a_large_difference_is_confirmed():
    accuracies = {
        "first": dict(enumerate([50.0, 51, 52, 50, 51, 52, 51])),
        "a": dict(enumerate([55.0, 56, 56, 55, 57, 56, 55])),
        "b": dict(enumerate([45.0, 46, 45, 45, 46, 47, 46])),
    }
    found = {name: one.verdict for name, one in compare(accuracies, "first").items()}
    assert found == {"a": "confirmed better", "b": "confirmed worse"}


def test_only_seeds_that_both_variants_have_are_compared():
    found = compare({"first": {0: 50.0, 2: 60.0}, "a": {0: 51.0, 1: 99.0, 2: 61.0}, "b": {1: 70.0}}, "first")
    assert list(found) == ["a"] and found["a"].seeds == 2 and found["a"].mean == 1.0
    assert found["a"].by_seed == {0: 1.0, 2: 1.0}


def test_the_seeds_that_a_claim_needs_grow_with_the_comparisons():
    assert [seeds_needed(k) for k in (1, 2, 4, 10)] == [6, 7, 8, 9]
