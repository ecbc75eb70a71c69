"""comparison/power.py: where the spread of a planned comparison comes from, and what the plan says about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from comparisons import COMMON, VARIANTS, write_run

from comparison.experiment_file import read
from comparison.paired_tests import detectable_effect
from comparison.planned_run import PlannedRun
from comparison.power import Spread, spread_of, statement


@pytest.fixture
def experiment(tmp_path, tiny):
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    (tmp_path / "gates.toml").write_text(COMMON + VARIANTS)
    return read(tmp_path / "gates.toml", seeds=9)


def finish(experiment, folder, variant, seed, accuracy, preset=None):
    expected = {
        "settings": variant.settings.as_dict(),
        "seed": seed,
        "max_steps": 6,
        "hold_out": 0.1,
        "fingerprint": "sha256:0",
    }
    changed = {"preset": preset or experiment.preset}
    write_run(PlannedRun(folder.name, folder, [], expected), accuracy / 100, 1000.0, changed)


def test_the_paired_differences_of_own_runs_come_first(experiment, tmp_path):
    plain, gated = experiment.variants
    for seed, (a, b) in enumerate([(50, 51), (60, 61.5), (40, 41.25)]):
        finish(experiment, tmp_path / "runs/gates" / f"plain-seed{seed}", plain, seed, a)
        finish(experiment, tmp_path / "runs/gates" / f"gated-seed{seed}", gated, seed, b)
    found = spread_of(experiment, tmp_path / "runs", tmp_path / "results")
    assert found.points == pytest.approx(0.25) and found.source == "finished runs in runs/gates"
    text = statement(experiment, found)
    assert text.startswith(f"9 seeds detect a true difference of {detectable_effect(9, 1) * 0.25:.2f} points with 80 %")
    assert "1 comparison, Holm; sd of paired differences 0.25 points, from finished runs in runs/gates" in text


def test_rounds_that_are_too_small_to_confirm_anything_are_named(experiment):
    """The last of 1,000 looks has a level of 0.00011, and 1,000 seeds give p of at least 0.00001 per comparison."""
    variants = [*experiment.variants, *experiment.variants[:1] * 11]
    text = statement(replace(experiment, variants=variants, seeds=1, round_seeds=1, max_seeds=1000), None)
    assert text.startswith("1000 seeds cannot confirm any difference: p stays at or above 0.00012 (12 comparisons")
    assert text.endswith("Use larger rounds, with more seeds each")


def test_the_last_report_comes_next(experiment, tmp_path):
    folder = tmp_path / "results/gates"
    folder.mkdir(parents=True)
    rows = [{"arm": "plain", "by_seed": {"0": 50, "1": 51}}, {"arm": "gated", "by_seed": {"0": 51, "1": 54}}]
    (folder / "report.json").write_text(json.dumps({"results": {"validation": rows}}))
    found = spread_of(experiment, tmp_path / "runs", tmp_path / "results")
    assert found.points == pytest.approx(2**0.5) and found.source == "results/gates"
    (folder / "report.json").write_text("[]")
    assert spread_of(experiment, tmp_path / "runs", tmp_path / "results") is None


def test_other_runs_of_the_preset_come_last(experiment, tmp_path):
    plain, gated = experiment.variants
    for seed, accuracy in enumerate([50, 51, 52]):
        finish(experiment, tmp_path / "runs" / f"mine-{seed}", plain, seed, accuracy)
        finish(experiment, tmp_path / "runs/other" / f"b-{seed}", gated, seed, 10 + accuracy)
        finish(experiment, tmp_path / "runs" / f"elsewhere-{seed}", gated, seed, 9 * accuracy, preset="cpu")
    (tmp_path / "runs/damaged").mkdir()
    (tmp_path / "runs/damaged/run.json").write_text("{")
    found = spread_of(experiment, tmp_path / "runs", tmp_path / "results")
    assert found.points == pytest.approx(2**0.5) and found.source == "6 earlier runs of preset tiny"


def test_without_earlier_runs_the_statement_is_in_standard_deviations(experiment, tmp_path):
    assert spread_of(experiment, tmp_path / "runs", tmp_path / "results") is None
    text = statement(experiment, None)
    assert f"{detectable_effect(9, 1):.2f} standard deviations of the paired differences" in text


def test_too_few_seeds_are_named_whatever_the_spread(tmp_path, tiny):
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    (tmp_path / "gates.toml").write_text(COMMON + VARIANTS)
    text = statement(read(tmp_path / "gates.toml", seeds=1), Spread(0.1, "here"))
    assert text.startswith("1 seed cannot confirm any difference") and "--seeds 6" in text
