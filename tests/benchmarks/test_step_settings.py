"""benchmarks/step_settings.py: every variant has its turns, its ratio and its kernels; one that fails is named."""

from __future__ import annotations

import json

import programs

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
