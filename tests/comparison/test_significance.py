"""comparison/significance.py: the statistics against brute force and known values, and the words that may be said of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from comparison.significance import T_975, compare, half_interval, holm, least_p, power_note, seeds_needed, sign_flip_p


@pytest.mark.parametrize(
    "differences",
    [
        [0.7],
        [1.0, 2.0, 3.0],
        [1.0, -1.0, 1.0, -1.0],
        [0.1, 0.2, 0.3, -0.6],
        [0.0, 0.0, 0.5],
        [0.0] * 4,
        np.random.default_rng(0).normal(0.5, 1, 9).tolist(),
    ],
)
def test_p_is_the_share_of_all_sign_patterns_that_are_as_extreme(differences):
    means = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    assert sign_flip_p(differences) == sum(m >= abs(sum(differences)) - 1e-9 for m in means) / len(means)


def test_the_least_p_is_that_of_differences_of_one_sign():
    assert [least_p(n) for n in (1, 2, 3, 5, 6)] == [1.0, 0.5, 0.25, 0.0625, 0.03125]
    assert all(sign_flip_p([0.5 + i for i in range(n)]) == least_p(n) for n in range(1, 12))


def test_the_quantiles_are_those_of_student():
    x = np.linspace(0, 1, 400_001)
    for df, quantile in enumerate(T_975, 1):
        density = (
            math.gamma((df + 1) / 2)
            / (math.sqrt(df * math.pi) * math.gamma(df / 2))
            * (1 + (quantile * x) ** 2 / df) ** (-(df + 1) / 2)
        )
        area = quantile * (density.sum() - (density[0] + density[-1]) / 2) * (x[1] - x[0])
        assert area == pytest.approx(0.475, abs=1e-5)


def test_the_interval_is_the_textbook_one():
    assert half_interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.1824463 * math.sqrt(5 / 3) / 2, rel=1e-4)
    assert half_interval([1.0]) is None


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03, 0.005], 4) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9], 2) == [1.0, 1.0] and holm([0.02], 1) == [0.02]
    assert holm([0.01], 3) == pytest.approx([0.03])  # the other two arms failed, and were meant to be looked at


def of(differences, *more):
    """The verdict on an arm with these differences to the first; `more`: further arms."""
    arms = {"first": dict.fromkeys(range(20), 50.0)}
    for i, values in enumerate([differences, *more]):
        arms[f"arm{i}"] = {seed: 50 + value for seed, value in enumerate(values)}
    return compare(arms, "first")["arm0"]


CLEAR = [1.0, 1.2, 0.9, 1.1, 1.3, 1.0, 1.1, 0.9, 1.2]


@pytest.mark.parametrize(
    ("differences", "others", "verdict", "sentence"),
    [
        (CLEAR[:6], 0, "better", "better by 1.08 ± 0.15 points (p = 0.03, 6 seeds)"),
        ([-d for d in CLEAR[:6]], 0, "worse", "worse by 1.08 ± 0.15 points (p = 0.03, 6 seeds)"),
        (
            CLEAR[:5],
            0,
            "not shown",
            "no difference shown: +1.10 ± 0.20 points measured, but 5 seeds cannot go under p = 0.06; 6 seeds could",
        ),
        (
            CLEAR[:3],
            0,
            "not shown",
            "no difference shown: +1.03 ± 0.38 points measured, but 3 seeds cannot go under p = 0.25; 6 seeds could",
        ),
        (
            CLEAR[:6],
            1,
            "not shown",
            "no difference shown: +1.08 ± 0.15 points measured, but 6 seeds cannot go under p = 0.03, before the correction "
            "for 2 arms; 7 seeds could",
        ),
        (CLEAR, 9, "better", "better by 1.08 ± 0.11 points (p = 0.04, 9 seeds)"),
        (
            [0.5, -0.3, 0.2],
            0,
            "not shown",
            "no difference shown: 3 seeds cannot show less than 1.00 points (+0.13 measured)",
        ),
        (
            [0.4],
            0,
            "not shown",
            "no difference shown: one seed says nothing about a difference (+0.40 points measured)",
        ),
        ([0.0, 0.0, 0.0], 0, "same", "the same accuracy with every seed (3 seeds)"),
        ([0.0], 0, "same", "the same accuracy with every seed (1 seed)"),
        (
            [2.0, 2.0, 0.1, 2.0, 2.0, -0.15],
            0,
            "not shown",
            "no difference shown: +1.33 ± 1.10 points measured, p = 0.09 (6 seeds)",
        ),
    ],
)
def test_a_sentence_claims_no_more_than_the_seeds_can_show(differences, others, verdict, sentence):
    found = of(differences, *[[0.3, -0.3] * 4] * others)
    assert (found.verdict, found.sentence) == (verdict, sentence)


def test_arms_that_make_no_difference_are_rarely_called_better_or_worse():
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(200):
        arms = {arm: dict(enumerate(rng.normal(50, 1, 9))) for arm in ["first", *"abcdefghij"]}
        wrong += any(found.verdict in ("better", "worse") for found in compare(arms, "first").values())
    assert wrong / 200 <= 0.07  # 0.05 and what 200 tries allow


def test_a_large_difference_is_found():
    assert {
        name: found.verdict
        for name, found in compare(
            {
                "first": dict(enumerate([50.0, 51, 52, 50, 51, 52, 51])),
                "a": dict(enumerate([55.0, 56, 56, 55, 57, 56, 55])),
                "b": dict(enumerate([45.0, 46, 45, 45, 46, 47, 46])),
            },
            "first",
        ).items()
    } == {"a": "better", "b": "worse"}


def test_only_seeds_that_both_have_are_compared():
    found = compare({"first": {0: 50.0, 2: 60.0}, "a": {0: 51.0, 1: 99.0, 2: 61.0}, "b": {1: 70.0}}, "first")
    assert list(found) == ["a"] and found["a"].seeds == 2 and found["a"].mean == 1.0


def test_a_plan_says_beforehand_what_it_cannot_show():
    assert seeds_needed(1) == 6 and seeds_needed(2) == 7 and seeds_needed(10) == 9
    assert power_note(6, 2) is None and power_note(9, 11) is None
    assert (
        "with 3 seeds no arm can be called better or worse: p cannot go under 0.25; that takes 6 seeds"
        in power_note(3, 2)
    )
