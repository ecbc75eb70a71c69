"""comparison/sequential.py: error rates with looks after every round, and what is run."""

from __future__ import annotations

import numpy as np
import pytest
from comparisons import COMMON, VARIANTS, report

from comparison import paired_tests
from comparison.sequential import DECIDED, LEAST_POWER, Look, evaluate, is_hopeless, on_another_split, plan_looks
from comparison.significance import CONFIRMED, Difference

ROUNDS = COMMON.replace("seeds = 2", 'seeds = 6\nuntil = "decided"\nmax_seeds = 18')


def test_the_looks_share_the_error_rate():
    looks = plan_looks(6, 20)
    assert [look.seeds for look in looks] == [6, 12, 18, 20] and [look.number for look in looks] == [1, 2, 3, 4]
    assert sum(look.alpha for look in looks) == pytest.approx(0.05)
    assert looks[0].alpha < 1e-3 < looks[1].alpha < looks[2].alpha


@pytest.mark.parametrize(("variants", "first", "most"), [(2, 6, 18), (4, 8, 24)])
def test_at_most_5_percent_without_a_difference_are_called_confirmed_over_all_looks(
    variants, first, most, without_advice
):
    rng, confirmed, dropped, looks = np.random.default_rng(variants), 0, 0, plan_looks(first, most)
    for _ in range(2000):
        accuracies = {f"v{i}": dict(enumerate(rng.normal(50, 1, most))) for i in range(variants)}
        outcome = evaluate(accuracies, "v0", looks, None, variants - 1)
        verdicts = [one.verdict for one in outcome.differences.values()]
        confirmed += any(verdict in CONFIRMED for verdict in verdicts)
        dropped += sum("hopeless" in one.sentence for one in outcome.differences.values())
    assert confirmed / 2000 <= 0.05
    assert dropped / 2000 / (variants - 1) > 0.5  # most runs of variants without a difference are saved


def test_a_clear_difference_is_decided_early_and_a_restart_gives_the_same():
    rng, looks = np.random.default_rng(1), plan_looks(8, 32)
    accuracies = {"a": dict(enumerate(rng.normal(50, 1, 32))), "b": dict(enumerate(rng.normal(53, 1, 32)))}
    outcome = evaluate(accuracies, "a", looks, None, 1)
    assert outcome.differences["b"].verdict == "confirmed better" and not outcome.active and outcome.looks < len(looks)
    seeds = outcome.differences["b"].seeds
    fewer = {name: {seed: value for seed, value in by.items() if seed < seeds} for name, by in accuracies.items()}
    assert evaluate(fewer, "a", looks, None, 1) == outcome
    del fewer["b"][0]
    assert evaluate(fewer, "a", looks, None, 1).looks == 0  # a look needs all its runs


def test_a_variant_whose_run_failed_does_not_keep_the_others_from_their_looks():
    rng, looks = np.random.default_rng(1), plan_looks(16, 32)
    accuracies = {name: dict(enumerate(rng.normal(mean, 1, 16))) for name, mean in (("a", 50), ("b", 55), ("c", 55))}
    del accuracies["c"][3]
    outcome = evaluate(accuracies, "a", looks, None, 2)
    assert outcome.looks == 1 and outcome.active == [] and outcome.differences["b"].verdict == "confirmed better"
    assert outcome.differences["c"].verdict == "inconclusive" and "Not tested" in outcome.differences["c"].sentence
    del accuracies["a"][0]  # without the first variant there is no look
    outcome = evaluate(accuracies, "a", looks, None, 2)
    assert outcome.looks == 0 and {one.verdict for one in outcome.differences.values()} == {"inconclusive"}


def test_a_margin_decides_equivalence_instead_of_dropping():
    rng, looks = np.random.default_rng(3), plan_looks(8, 32)
    accuracies = {name: dict(enumerate(rng.normal(50, 0.3, 32))) for name in "ab"}
    verdict = evaluate(accuracies, "a", looks, 1.0, 1).differences["b"].verdict
    assert verdict == "equivalent" and verdict in DECIDED


@pytest.mark.parametrize(("margin", "hopeless"), [(0.40, False), (0.30, True)])
def test_a_variant_inside_the_margin_is_hopeless_if_the_test_of_equivalence_would_seldom_decide(margin, hopeless):
    """Against 200,000 simulated last looks with the present mean of 0.12 and a standard deviation of 1."""
    seeds, mean = 4, 0.12
    one = Difference(seeds, mean, 1.6, 0.9, 0.9, "inconclusive", "", effect=mean)
    drawn = np.random.default_rng(0).normal(mean, 1, (200_000, seeds))
    below = (margin - drawn.mean(1)) / (drawn.std(1, ddof=1) / 2) > 2.3534  # quantile 0.95 of t with 3 degrees
    assert bool(below.mean() < LEAST_POWER) is hopeless and abs(below.mean() - LEAST_POWER) > 0.01
    assert is_hopeless(one, Look(1, seeds, 0.05), margin, planned=1) is hopeless


@pytest.mark.parametrize(("first", "most"), [(3, 30), (2, 800)])
def test_the_advice_of_an_early_look_holds_for_the_last_one_and_is_quick(first, most, monkeypatch):
    """The level of the first look is 5.7e-10 and 0: all subsets of the seeds that it asks for do not fit in memory."""

    def limited(values):
        assert len(values) <= 20
        return subset_sums(values)

    subset_sums = paired_tests._subset_sums
    monkeypatch.setattr(paired_tests, "_subset_sums", limited)
    accuracies = {"a": {0: 50.0, 1: 50.0, 2: 50.0}, "b": {0: 51.0, 1: 52.0, 2: 51.2}}
    looks = plan_looks(first, most)
    found = evaluate(accuracies, "a", looks, None, 1)
    sentence = found.differences["b"].sentence
    assert found.active == ["b"] and "--seeds" not in sentence
    if most == 30:
        needed = next(n for n in range(2, 30) if 2.0 ** (1 - n) < looks[-1].alpha)
        assert f"Not confirmed: that needs at least {needed} seeds (max_seeds = {needed} or more)" in sentence
    else:
        assert looks[0].alpha == 0.0 and "seeds would confirm a difference of this size" in sentence


def test_a_chance_tie_of_the_first_seeds_ends_no_variant():
    looks = plan_looks(1, 6)
    tie = {"a": {0: 50.0, 1: 51.0}, "b": {0: 50.0, 1: 51.0}}
    assert evaluate(tie, "a", looks, None, 1).active == ["b"]
    tie = {name: by_seed | {2: 52.0} for name, by_seed in tie.items()}
    found = evaluate(tie, "a", looks, None, 1)
    assert not found.active and found.differences["b"].verdict == "identical" and found.differences["b"].seeds == 3


def test_another_split_is_tested_at_the_level_of_the_look_that_decided():
    """The number of seeds was chosen by what the looks saw, so a test at 5 % would be wrong more often."""
    rng = np.random.default_rng(2)
    looks = plan_looks(6, 18)
    seen = {
        "a": {seed: 50 + rng.normal() for seed in range(18)},
        "b": dict.fromkeys(range(12), 60.0),
        "c": {0: 1.0, 1: 2.0},
    }
    outcome = evaluate(seen, "a", looks, None, 1)
    assert outcome.at == {"b": looks[1]}
    same = on_another_split(seen, outcome, "a", looks, None, 1)
    assert same == outcome.differences and "Not tested" in same["c"].sentence
    signs = {seed: 0.0 if seed < 10 else -0.9 for seed in range(12)}
    other = {"a": dict.fromkeys(range(18), 50.0), "b": {seed: 50.4 + signs[seed] for seed in range(12)}, "c": {}}
    tested = on_another_split(other, outcome, "a", looks, None, 1)["b"]
    assert tested.seeds == 12 and looks[1].alpha < max(tested.p, tested.p_t) < 0.05
    assert tested.verdict not in CONFIRMED and "(look 2 of 3, level 0.016)" in tested.sentence


def test_compare_adds_seeds_until_decided(ask, invented, tmp_path):
    rng = np.random.default_rng(2)
    for seed in range(18):
        invented.accuracy |= {f"plain-seed{seed}": 0.5 + rng.normal() / 100, f"gated-seed{seed}": 0.6}
    code, out, err = ask(ROUNDS + VARIANTS)
    assert code == 0 and err == "" and "2 variants x 6 to 18 seeds" in out
    seeds = len(invented.started) // 2
    assert seeds == 12 and "(look 2 of 3, level 0.016)" in out
    text, data = report(tmp_path)
    assert data["results"]["validation"][1]["difference"]["verdict"] == "confirmed better" and data["missing"] == {}
    invented.started.clear()
    assert ask(ROUNDS + VARIANTS)[0] == 0 and not invented.started
    assert ask(ROUNDS + VARIANTS, "--report-only")[0] == 0 and report(tmp_path)[0] == text


def test_compare_drops_a_hopeless_variant_and_runs_the_others_on(ask, invented, tmp_path):
    rng = np.random.default_rng(4)
    third = '[[variants]]\nname = "third"\nidea = "Another gate."\nmodel.feed_forward = "swiglu"\n'
    for seed in range(18):
        plain = 0.5 + rng.normal() / 100
        gated = plain + (0.025 if seed % 2 else -0.025)
        invented.accuracy |= {f"plain-seed{seed}": plain, f"gated-seed{seed}": gated, f"third-seed{seed}": 0.6}
    code, out, _ = ask(ROUNDS + VARIANTS + third)
    assert code == 0 and "dropped as hopeless" in out
    counts = {name: sum(run.startswith(name) for run in invented.started) for name in ("plain", "gated", "third")}
    assert counts == {"plain": 12, "gated": 6, "third": 12}
    assert report(tmp_path)[1]["missing"] == {}


def test_a_failed_run_ends_the_rounds_and_is_reported(ask, invented, tmp_path):
    invented.fails["gated-seed5"] = "error: the loss is nan"
    for seed in range(6):
        invented.accuracy |= {f"plain-seed{seed}": 0.5 + seed / 1000, f"gated-seed{seed}": 0.9}
    code, _, err = ask(ROUNDS + VARIANTS)
    assert code == 1 and "missing: gated-seed5" in err and len(invented.started) == 12
    difference = report(tmp_path)[1]["results"]["validation"][1]["difference"]
    assert difference["verdict"] == "inconclusive" and "Not tested" in difference["sentence"]


def test_the_plan_and_the_report_state_the_levels_of_the_looks(ask, invented, tmp_path):
    _, out, _ = ask(ROUNDS + VARIANTS, "--dry-run")
    assert "18 seeds detect a true difference of" in out and "(1 comparison, Holm, level 0.034 of the last look)" in out
    few = ROUNDS.replace("seeds = 6", "seeds = 5").replace("18", "6")
    _, out, _ = ask(few + VARIANTS, "--dry-run")
    assert "6 seeds cannot confirm any difference: p stays at or above 0.031 (1 comparison, Holm, level 0.018" in out
    assert "Use a larger max_seeds, at least" in out
    ask(ROUNDS + VARIANTS)
    text = report(tmp_path)[0]
    assert "exact sign-flip test both give p below the level of a look after Holm" in text
    assert "0.00069 after 6 seeds" in text and "That takes at least 12 seeds" in text
    ask(ROUNDS.replace("18", "60") + VARIANTS)
    assert "sign-flip test (exact up to 40 seeds; with more, 99,999 random sign patterns" in report(tmp_path)[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (ROUNDS.replace("max_seeds = 18", ""), 'until = "decided" and max_seeds = N belong together'),
        (ROUNDS.replace("18", "6"), "max_seeds must lie between seeds + 1 = 7 and 1000, not 6"),
        (ROUNDS.replace("decided", "decide"), "unknown until 'decide'; did you mean 'decided'?"),
    ],
)
def test_mistakes_in_the_rounds_are_named(ask, invented, text, sentence):
    code, _, err = ask(text + VARIANTS)
    assert code == 1 and sentence in err and not invented.started


def test_rounds_cannot_be_split_into_shards(ask, invented):
    code, _, err = ask(ROUNDS + VARIANTS, "--shard", "1/2")
    assert code == 1 and "leave out --shard" in err
