"""comparison/significance.py: error rates of all claims together by simulation, and the sentences."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comparison.paired_tests import detectable_effect
from comparison.report import _compare
from comparison.significance import CONFIRMED, compare


def of(differences, *more, margin=None):
    """The verdict on a variant with these differences to the first one; `more`: further variants."""
    variants = {"first": dict.fromkeys(range(20), 50.0)}
    for i, values in enumerate([differences, *more]):
        variants[f"v{i}"] = {seed: 50 + value for seed, value in enumerate(values)}
    return compare(variants, "first", margin)["v0"]


CLEAR = [1.0, 1.2, 0.9, 1.1, 1.3, 1.0, 1.1, 0.9, 1.2]


# --- error rates ----------------------------------------------------------------------------------------------------


def test_variants_without_a_finished_run_count_in_the_correction():
    accuracies = {"plain": {0: 50.0, 1: 51.0, 2: 52.0}, "better": {0: 51.0, 1: 52.5, 2: 53.0}}
    results: list = [
        SimpleNamespace(name=name, accuracies=lambda split, name=name: accuracies.get(name, {}))
        for name in ("plain", "better", "failed", "failed too")
    ]
    experiment: Any = SimpleNamespace(
        variants=results, seeds=len(accuracies["plain"]), max_seeds=None, round_seeds=None, margin=None
    )
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


def test_the_power_statement_agrees_with_simulated_experiments():
    effect, rng = detectable_effect(9, 2), np.random.default_rng(6)
    found = 0
    for _ in range(1000):
        accuracies = {"a": dict.fromkeys(range(9), 50.0)}
        for name in "bc":
            accuracies[name] = dict(enumerate(50 + rng.normal(effect, 1, 9)))
        found += compare(accuracies, "a")["b"].verdict == "confirmed better"
    assert 0.76 <= found / 1000 <= 0.9  # 80 %, a little more since Holm relaxes the second comparison


# --- sentences ------------------------------------------------------------------------------------------------------


def test_the_advice_is_more_seeds_than_there_are():
    found = of([1.0, 1.0, 1.0, 1.0, 1.0, -0.1])
    assert found.verdict == "inconclusive" and "About 7 seeds would confirm" in found.sentence


def test_nothing_is_claimed_without_a_level():
    found = compare({"a": dict.fromkeys(range(9), 50.0), "b": dict(enumerate(50 + v for v in CLEAR))}, "a", alpha=None)
    assert found["b"].verdict == "inconclusive" and found["b"].sentence.endswith("Not tested, because runs are missing")


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
