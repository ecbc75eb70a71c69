"""benchmarks/step_settings.py: every variant has its turns, its ratio and its kernels; one that fails is named."""

from __future__ import annotations

import json

import programs

from benchmarks import step_settings
from benchmarks.lib import tables
from benchmarks.lib.timing import ratios, spread

VARIANTS = ["bf16.enabled=masters", "compile=reduce-overhead", "compile=off bf16.enabled=true"]


def test_variants_take_turns_against_the_baseline_and_a_failing_one_is_named(shapes, tiny, tmp_path):
    words = [word for variant in VARIANTS for word in ("--variant", variant)]
    sizes = ["--steps", 1, "--rounds", 3, "--warm-up", 1, "--profiled-steps", 1]
    report = tmp_path / "report.json"
    places = ["--preset", tiny, "--data-dir", shapes, "--set", "compile=off", "--json", report]
    done = programs.run("benchmarks/step_settings.py", *places, *words, *sizes)
    found = json.loads(report.read_text())["variants"]
    assert list(found) == ["baseline", *VARIANTS]
    assert found["compile=reduce-overhead"]["failed"].endswith("CUDA graphs need a GPU")
    assert "failed: SettingsError: compile=reduce-overhead: CUDA graphs need a GPU" in done.out
    assert found["baseline"]["engine"] == "fp32" and found["bf16.enabled=masters"]["engine"] == "bf16 incl. weights"
    for name in ("baseline", VARIANTS[0], VARIANTS[2]):
        facts = found[name]
        assert len(facts["step_ms"]) == len(facts["host_ms"]) == 3 and facts["kernels"] > 100 and facts["batch"] == 64
        row = next(line for line in done.out.splitlines() if line.startswith(name))
        assert tables.cell(spread(ratios(facts["step_ms"], found["baseline"]["step_ms"]))) in row
    assert "memory floor of the baseline" in done.out


IN_TURN, IN_PROFILE, GOOD = 0.2, 0.3, 0.4  # dropout of variants


def measure_with_failures(words: list[str]) -> None:
    turn, profile_steps = step_settings.turn, step_settings.profile_steps

    def failing_turn(work, choose, count, device, found):
        turn(work, choose, count, device, found)
        if work.subject.settings.model.dropout == IN_TURN:
            raise RuntimeError("out of memory")

    def failing_profile(work, *others):
        if work.subject.settings.model.dropout == IN_PROFILE:
            raise RuntimeError("no profiler")
        return profile_steps(work, *others)

    step_settings.turn, step_settings.profile_steps = failing_turn, failing_profile
    assert step_settings.main(words) == 0


def test_a_variant_that_fails_in_a_turn_or_its_profile_leaves_the_others_alone(shapes, tiny, tmp_path):
    report = tmp_path / "report.json"
    words = ["--preset", tiny, "--data-dir", shapes, "--set", "compile=off", "--json", report, "--rounds", 2]
    words += ["--steps", 1, "--warm-up", 1, "--profiled-steps", 1]
    words += [word for rate in (IN_TURN, IN_PROFILE, GOOD) for word in ("--variant", f"model.dropout={rate}")]
    programs.run_ranks(1, measure_with_failures, list(map(str, words)))
    found = list(json.loads(report.read_text())["variants"].values())
    reasons = [None, "RuntimeError: out of memory", "RuntimeError: no profiler", None]
    assert [facts.get("failed") for facts in found] == reasons
    assert [len(facts["step_ms"]) for facts in found] == [2, 1, 2, 2]
