"""comparison/tuning.py: candidates, rungs, the choice, and how often it is right; nothing is trained."""

from __future__ import annotations

import math

import numpy as np
import pytest

from comparison.experiment_keys import MOST_SEEDS
from comparison.tuning import DIVERGED, FIRST_SEED, Rung, Tuning, rank, read_tuning, search

LR = "optimizer.params.lr"


def five(**options) -> Tuning:
    return read_tuning("gates.toml", {LR: [1e-3, 2e-3, 4e-3, 8e-3, 16e-3], **options})


# --- the table -----------------------------------------------------------------------------------------------------


def test_a_key_may_be_quoted_or_a_nested_table_and_several_form_a_grid():
    quoted = read_tuning("", {LR: [1e-3, 3e-3], "schedule.warmup_fraction": [0.05, 0.1, 0.2]})
    nested = {"optimizer": {"params": {"lr": [1e-3, 3e-3]}}, "schedule": {"warmup_fraction": [0.05, 0.1, 0.2]}}
    assert quoted == read_tuning("", nested) and len(quoted.candidates) == 6
    assert quoted.overrides(1) == [f"{LR}=0.001", "schedule.warmup_fraction=0.1"]
    assert quoted.name_of(1) == "lr=0.001-warmup_fraction=0.1"
    assert quoted.describe(0) == "lr 0.001, warmup_fraction 0.05"


def test_candidates_may_be_listed_one_by_one():
    listed = read_tuning("", {"candidates": [{LR: 1e-3, "ema.decay": 0.9}, {"ema.decay": 0.0, LR: 3e-3}], "seeds": 3})
    assert listed.candidates == ((1e-3, 0.9), (3e-3, 0.0)) and list(listed.seeds) == [10**6, 10**6 + 1, 10**6 + 2]


def test_the_seeds_of_tuning_are_never_those_of_the_comparison():
    """A comparison has seeds 0 to MOST_SEEDS - 1, with seeds in rounds as well."""
    assert FIRST_SEED >= MOST_SEEDS and min(five(seeds=100).seeds) >= MOST_SEEDS


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (3, "tune must be a table such as"),
        ({}, "tune names no setting; add one"),
        ({LR: 1e-3}, f"{LR} must be a list of values to try, not 0.001"),
        ({LR: [1e-3]}, f"{LR} needs at least two values to choose from, not [0.001]"),
        ({LR: [1e-3, 1e-3]}, f"{LR} lists 0.001 twice"),
        ({"a.b": [1, 1.0]}, "a.b lists 1.0 twice"),
        ({LR: [1e-3, math.nan]}, f"{LR} must have finite numbers, not nan"),
        ({LR: [1e-3, 10**400]}, f"{LR} must have finite numbers"),
        ({LR: [1e-3, {"a": 1}]}, "must have numbers, texts, or lists of them, not {'a': 1}"),
        ({LR: [1e-3, 3e-3], "optimizer": {"params": {"lr": [1, 2]}}}, f"tune names {LR} twice"),
        ({LR: [1e-3, 3e-3], "seed": 2}, "unknown option 'seed'; did you mean 'seeds'?"),
        ({LR: [1e-3, 3e-3], "seeds": 1}, "tune.seeds must be a whole number from 2 to 100, not 1: one run cannot"),
        ({LR: [1e-3, 3e-3], "seeds": "2"}, "tune.seeds must be a whole number from 2 to 100, not '2'"),
        ({LR: [1e-3, 3e-3], "rungs": [1.0, 0.5]}, "tune.rungs must be increasing shares of the budget"),
        ({LR: [1e-3, 3e-3], "rungs": [0.5, 2]}, "tune.rungs must be increasing shares of the budget"),
        ({LR: [1e-3, 3e-3], "rungs": []}, "tune.rungs must be increasing shares of the budget"),
        ({LR: [1e-3, 3e-3], "rungs": 0.5}, "tune.rungs must be increasing shares of the budget"),
        ({LR: [1e-3, 3e-3], "eta": 1}, "tune.eta must be a number above 1, such as 2, not 1"),
        ({LR: [1e-3, 3e-3], "report_shared": "no"}, "tune.report_shared must be true or false, not 'no'"),
        ({"a.b": list(range(11)), "a.c": list(range(10))}, "tune has 110 candidate(s), which is more than 100"),
        ({"candidates": [{LR: 1e-3}]}, "tune has 1 candidate(s), which is nothing to choose from"),
        ({"candidates": 3}, "tune.candidates must be a list of tables such as"),
        ({"candidates": [{LR: 1e-3}, {"ema.decay": 0.9}]}, "must set the same settings"),
        ({"candidates": [{LR: 1e-3}, {LR: 1e-3}]}, "twice; remove one"),
        ({"candidates": [{LR: 1e-3}, {LR: 3e-3}], LR: [1, 2]}, f"tune names {LR} next to candidates"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_sentence(table, sentence):
    from common.errors import SettingsError

    with pytest.raises(SettingsError) as error:
        read_tuning("gates.toml", table)
    assert str(error.value).startswith("gates.toml: ") and sentence in str(error.value) and "\n" not in str(error.value)


# --- rungs and the choice -------------------------------------------------------------------------------------------


def test_rungs_drop_the_worse_candidates_and_are_left_out_where_they_would_drop_none():
    assert five().rungs() == [Rung(0.25, 5), Rung(1.0, 3)] and five(eta=3).rungs() == [Rung(0.25, 5), Rung(1.0, 2)]
    assert five(rungs=[0.1, 0.3, 1.0]).rungs() == [Rung(0.1, 5), Rung(0.3, 3), Rung(1.0, 2)]
    assert read_tuning("", {LR: [1, 2]}).rungs() == [Rung(1.0, 2)]
    assert five(rungs=[0.5]).rungs() == [Rung(0.5, 5)]


def test_a_search_waits_for_all_runs_of_a_rung_and_then_for_the_best_of_them():
    found: dict[tuple[int, int, int], float] = {}
    tuning = five(eta=3)
    assert search(tuning, lambda *key: found.get(key)).waiting == [0, 1, 2, 3, 4]
    found |= {(0, i, seed): 30 + i - 3 * (i == 4) for i in range(5) for seed in tuning.seeds}
    lacking = found.pop((0, 1, tuning.seeds[1]))
    state = search(tuning, lambda *key: found.get(key))
    assert state.waiting == [1] and state.chosen is None and len(state.accuracies) == 1
    found[0, 1, tuning.seeds[1]] = lacking
    assert search(tuning, lambda *key: found.get(key)).waiting == [2, 3]
    found |= {(1, i, seed): 50 - i for i in (2, 3) for seed in tuning.seeds}
    state = search(tuning, lambda *key: found.get(key))
    assert state.waiting == [] and state.chosen == 2 and list(state.accuracies[1]) == [2, 3]


def test_of_equal_candidates_the_first_in_the_file_wins():
    assert rank({0: {5: 0.1, 6: 0.7}, 1: {5: 0.3, 6: 0.5}, 2: {5: 0.9, 6: 0.9}}) == [2, 0, 1]
    assert rank({1: {5: 0.1 + 0.2, 6: 0.0}, 0: {5: 0.3, 6: 0.0}}) == [0, 1]  # which differ in the last bit
    assert search(five(), lambda *key: 40.0).chosen == 0


def test_candidates_that_diverge_are_out_and_need_no_further_seeds():
    tuning = five()
    state = search(tuning, lambda rung, one, seed: DIVERGED if one > 1 else 30.0 + one if seed else None)
    assert state.chosen == 1 and not state.waiting
    state = search(tuning, lambda rung, one, seed: DIVERGED if one > 0 and seed == FIRST_SEED else 30.0)
    assert state.chosen == 0 and len(state.accuracies) == 1  # the only one left needs no second rung
    state = search(tuning, lambda *key: DIVERGED)
    assert state.chosen is None and not state.waiting


def test_the_edge_of_the_grid_is_named_for_numbers_only():
    tuning = five()
    assert tuning.at_edge(0) == [f"{LR} = 0.001 is the smallest value of the grid: widen the grid"]
    assert "largest" in tuning.at_edge(4)[0] and tuning.at_edge(2) == []
    assert read_tuning("", {"optimizer.type": ["AdamW", "Muon"]}).at_edge(0) == []


@pytest.mark.parametrize(("options", "least"), [({}, 0.6), ({"seeds": 6}, 0.8), ({"rungs": [1.0]}, 0.6)])
def test_the_best_of_the_grid_is_found_more_often_than_by_chance(options, least):
    """Accuracies around a parabola, one point of noise. By chance, one of five candidates is found in 20 %.

    At a quarter of the budget, accuracies are lower and the optimum lies one candidate further.
    """
    rng, tuning, found, regret = np.random.default_rng(0), five(**options), 0, 0.0
    rungs = tuning.rungs()
    for trial in range(400):
        best = 1 + trial % 3

        def curve(one: int, optimum: float) -> float:
            return 40 - 1.5 * (one - optimum) ** 2

        def accuracy(rung: int, one: int, seed: int, best=best, curve=curve) -> float:
            is_short = rungs[rung].share < 1
            return curve(one, best + is_short) - 15 * is_short + rng.normal(0, 1)

        chosen = search(tuning, accuracy).chosen
        assert chosen is not None
        found += chosen == best
        regret += curve(best, best) - curve(chosen, best)
    assert found / 400 > least, found / 400
    assert regret / 400 < 0.8, regret / 400  # of a random candidate: 4 points
