"""compare.py with `tune`: what is run, chosen, reused and reported, from invented runs."""

from __future__ import annotations

import json
import re

import pytest
from comparisons import COMMON, VARIANTS, report, write_run

from common.paths import PROJECT
from comparison.experiment_file import read
from comparison.paired_tests import seeds_needed
from comparison.planned_run import PlannedRun
from comparison.run_budget import RunBudget
from comparison.run_queue import run_all
from comparison.tuning import FIRST_SEED, Tuning
from comparison.tuning_report import tuning_picture
from records.run_folder import RunFolder
from reports.style import save
from reports.tuning import candidate_accuracy

GRID = '[tune]\n"optimizer.params.lr" = [1e-3, 3e-3, 1e-2]\n'  # 3e-3 is the preset's
TUNED = COMMON + GRID + VARIANTS
BEST = {"plain": "0.003", "gated": "0.001"}


class Accuracies(dict):
    """Each variant is best at its own learning rate; there the gated one is better by two points."""

    def get(self, name, default):
        rate = (re.search(r"lr=([\d.]+)", name) or [None, "0.003"])[1]
        variant, seed = ("gated" if "gated" in name else "plain"), int((re.findall(r"\d+", name) or ["0"])[-1])
        return 0.5 + 0.02 * (variant == "gated") - 0.1 * (rate != BEST[variant]) + seed % 7 / 1000


class Preset(dict):
    """Every run names its preset, by which the plan finds earlier runs."""

    def get(self, name, default):
        return {"preset": self["preset"]}


@pytest.fixture
def trained(invented, monkeypatch, tmp_path):
    """Runs with these accuracies."""
    invented.accuracy, invented.facts = Accuracies(), Preset(preset=str(tmp_path / "tiny.toml"))
    monkeypatch.setattr("comparison.run_queue.POLL_SECONDS", 0.0)
    return invented


def test_each_variant_gets_its_own_value_and_both_comparisons_are_reported(ask, trained, monkeypatch, tmp_path):
    code, out, err = ask(TUNED)
    assert code == 0 and err == "", out + err
    assert "tuned     plain: lr 0.003\n" in out
    assert "tuned     gated: lr 0.001; warning: optimizer.params.lr = 0.001 is the smallest value of the grid" in out
    tuning = [name for name in trained.started if name.startswith("tuning-")]
    # 3 candidates for a quarter, the best 2 in full, with 2 seeds for 2 variants; plain keeps its value, and its runs
    assert len(tuning) == 2 * 2 * (3 + 2) and trained.started[: len(tuning)] == tuning
    expected = [f"{variant}-seed{i}" for variant in ("gated-lr=0.001", "gated", "plain") for i in (0, 1)]
    assert sorted(trained.started[len(tuning) :]) == expected
    assert {int(name.rpartition("seed")[2]) for name in tuning} == {FIRST_SEED, FIRST_SEED + 1}
    short = RunFolder(tmp_path / f"runs/gates/tuning-gated-lr=0.001-at-0.25-seed{FIRST_SEED}").facts()
    assert short["max_steps"] == short["total_steps"] == 2  # a quarter of 6 steps, rounded: the schedule's length, too
    text, data = report(tmp_path)
    assert data["results"]["validation"][1]["difference"]["mean"] == pytest.approx(2.0)
    assert data["shared"]["results"]["validation"][1]["difference"]["mean"] == pytest.approx(-8.0)
    gated, cost = data["tuning"]["variants"]["gated"], data["tuning"]["cost"]
    assert gated["chosen"] == {"optimizer.params.lr": 0.001} and gated["shared"] == {"optimizer.params.lr": 0.003}
    assert gated["at_edge"] and not data["tuning"]["variants"]["plain"]["at_edge"]
    assert cost["runs"] == 20 and cost["images"] == 64 * 4 * (3 * 2 + 2 * 6)
    assert cost["hours"] == pytest.approx(2 * 2 * (3 * (0.5 + 0.128) + 2 * (0.5 + 0.384)) / 3600)
    assert "## Result on the validation split, each variant with its own optimizer.params.lr" in text
    assert "## Result on the validation split, all with the shared optimizer.params.lr" in text
    assert "Cost of tuning: 20 runs, 4,608 images, 15 s" in text
    assert "| gated | 0.003 | **" in text and "0.001 (edge) |" in text and "widen the grid" in text
    assert all(f"({name}.png)" in text for name in ("tuning", "differences", "differences-shared"))
    trained.started.clear()
    assert ask(TUNED)[0] == 0 and not trained.started and report(tmp_path)[0] == text
    # a wider grid reuses every run of the narrower one
    out = ask(TUNED.replace("[1e-3", "[3e-4, 1e-3"), "--dry-run")[1]
    new = re.findall(r"(tuning-\S+): new", out)
    assert len(new) == 4 and all("lr=0.0003-at-0.25" in name for name in new) and "tuning at most 24 runs, 5,120" in out
    assert re.search(r"5,120 images, \d+ s; comparison twice", out)


def test_the_eight_ideas_are_tuned_on_the_cpu_with_seeds_that_can_confirm():
    experiment = read(PROJECT / "experiments" / "eight-ideas.toml", "cpu")
    assert experiment.tuning and experiment.tuning.report_shared and experiment.match == "parameters"
    assert experiment.seeds >= max(9, seeds_needed(len(experiment.variants) - 1))
    shared = experiment.variants[0].settings.engine["optimizer"]["params"]["lr"]
    assert shared in [value for (value,) in experiment.tuning.candidates]


def test_the_picture_of_tuning_shows_diverged_and_missing_candidates(tmp_path):
    rungs = {f"{share} %": {0: [20.0, 21.0], 1: [30.0]} for share in (5, 10, 25, 50, 100)}
    variants = {
        "plain": {"rungs": rungs, "diverged": [2], "chosen": 1, "shared": 0},
        "gated": {"rungs": {}, "diverged": [], "chosen": None, "shared": None},
    }
    names = ["lr 0.001", "lr 0.003", "lr 10"]
    figure = candidate_accuracy(variants, names, "Tuning", "accuracy (%)")
    lines = [line for line in figure.axes[0].lines if line.get_marker() == "."]
    assert len({tuple(line.get_color()) for line in lines}) == len(rungs)
    assert "diverged" in [text.get_text() for text in figure.legends[0].get_texts()]
    save(figure, tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 5000


def test_a_candidate_that_diverged_with_one_seed_is_not_drawn_as_the_other(tmp_path):
    rows = [
        {"candidate": 0, "diverged": False, "by_seed": {"0": 20.0, "1": 21.0}},
        {"candidate": 1, "diverged": True, "by_seed": {"0": 90.0, "1": None}},
    ]
    tuning = Tuning(("optimizer.params.lr",), ((1e-3,), (10.0,)), shares=(1.0,))
    facts = {"variants": {"plain": {"rungs": [rows], "chosen": None, "shared": {"optimizer.params.lr": 1e-3}}}}
    assert tuning_picture(facts, tuning) == {
        "plain": {"rungs": {"100 % of the budget": {0: [20.0, 21.0]}}, "diverged": [1], "chosen": None, "shared": 0}
    }


def test_a_dry_run_shows_the_tuning_and_its_cost_and_runs_nothing(ask, trained, tmp_path):
    code, out, _ = ask(TUNED.replace("1e-2]", "1e-2]\nreport_shared = false"), "--dry-run")
    assert code == 0 and not trained.started and not (tmp_path / "runs").exists()
    assert "tuning    optimizer.params.lr of each variant on the validation split, 2 seeds kept for it (1000000" in out
    assert "rungs (eta 2): 3 candidates for 25 % of the budget, the best 2 for 100 %, the best one is chosen" in out
    assert "cost      tuning at most 20 runs, 4,608 images; comparison (tuned) at most 4 runs, 1,536 images" in out
    assert "hours are known after the first run" in out and out.count(": new") == 12 and "tuned     " not in out


def test_the_note_on_two_values_names_numbers_only(ask, trained):
    grid = '[tune]\n"optimizer.params.lr" = [1e-3, 3e-3, 1e-2]\nchannels_last = [true, false]\n'
    out = ask(COMMON + grid + VARIANTS, "--dry-run")[1]
    assert "channels_last true" in out and "at the edge of the grid" not in out
    out = ask(COMMON + grid + "schedule.warmup_fraction = [0.1, 0.2]\n" + VARIANTS, "--dry-run")[1]
    assert "note: schedule.warmup_fraction has two values, so each is at the edge" in out
    assert "channels_last has two values" not in out


def test_tuning_that_is_stopped_resumes_and_chooses_the_same(ask, trained, tmp_path):
    trained.fails[f"tuning-gated-lr=0.003-at-0.25-seed{FIRST_SEED}"] = "torch.OutOfMemoryError: 3 GiB"
    code, _, err = ask(TUNED)
    assert code == 1 and "missing: gated: its tuning is not finished: tuning-gated-lr=0.003-at-0.25" in err
    assert not [name for name in trained.started if name.startswith("gated-lr")]  # no comparison without a choice
    trained.fails.clear()
    first = set(trained.started)
    trained.started.clear()
    assert ask(TUNED)[0] == 0
    again = set(trained.started) & first
    assert again == {f"tuning-gated-lr=0.003-at-0.25-seed{FIRST_SEED}"}
    assert report(tmp_path)[1]["tuning"]["variants"]["gated"]["chosen"] == {"optimizer.params.lr": 0.001}


@pytest.fixture
def diverging(trained, monkeypatch):
    """Call it with a part of a name: runs with it diverge at their first step."""

    def diverge(part: str) -> None:
        def launch(task, environment):
            if part in task.name:
                write_run(task, 0.9, 1000.0, {}, done=False)
                message = "error: the loss is nan at optimizer step 1; the last checkpoint is unchanged."
                trained.fails[task.name] = message
            return trained(task, environment)

        monkeypatch.setattr("compare.launch", launch)

    return diverge


def test_a_candidate_that_diverges_is_out_and_is_not_run_again(ask, trained, diverging, tmp_path):
    diverging("lr=0.01")
    assert ask(TUNED)[0] == 0
    text, data = report(tmp_path)
    assert "| diverged (25 %) |" in text and json.dumps(data, allow_nan=False)
    trained.started.clear()
    assert ask(TUNED)[0] == 0 and not trained.started


def test_the_shared_comparison_is_reported_where_no_candidate_survived(ask, diverging, tmp_path):
    diverging("tuning-")
    assert ask(TUNED)[0] == 1
    text, data = report(tmp_path)
    assert data["dataset"]["name"] == "shapes" and data["commits"] == ["abc"] and data["hardware"]["devices"] == ["CPU"]
    assert "No run is finished." not in text and "Runs were not compared: the first variant has no finished run" in text
    assert "standard error about" in text and "nan points" not in text


def test_tuning_and_comparison_of_a_variant_have_one_source(ask, trained, monkeypatch, tmp_path):
    assert ask(TUNED)[0] == 0
    trained.started.clear()
    with monkeypatch.context() as edited:
        edited.setattr("records.provenance.digest_of", lambda path: "edited")
        assert ask(TUNED)[0] == 0 and not trained.started  # nothing is left to run
        code, _, err = ask(TUNED, "--seeds", "3")
        assert code == 1 and not trained.started and "would mix two versions of the source code" in err
    folder = RunFolder(tmp_path / f"runs/gates/tuning-plain-lr=0.003-at-1-seed{FIRST_SEED}")
    facts = folder.facts()
    facts["code"]["files"]["models/feed_forward.py"] = "another"
    folder.create(facts)
    code, _, err = ask(TUNED, "--report-only")
    assert code == 1 and "variant 'plain' mixes two versions of the source code" in err and "tuning-plain" in err
    assert ask(TUNED, "--redo-changed")[0] == 0 and trained.started == [folder.folder.name]


def test_seeds_in_rounds_come_after_tuning_and_leave_its_seeds_alone(ask, trained, tmp_path):
    text = TUNED.replace("seeds = 2\n", 'seeds = 6\nuntil = "decided"\nmax_seeds = 12\nmax_runs = 70\n', 1)
    assert ask(text)[0] == 0
    seeds = [int(name.rpartition("seed")[2]) for name in trained.started]
    compared = [seed for name, seed in zip(trained.started, seeds, strict=True) if "tuning-" not in name]
    assert max(compared) < 12 and min(set(seeds) - set(compared)) == FIRST_SEED
    assert "look 2 of 2" in report(tmp_path)[0]
    sentence = "max_runs = 40 is less than the 44 runs planned (20 for tuning and 24 to compare)"
    assert sentence in ask(text.replace("max_runs = 70", "max_runs = 40"))[2]


def test_a_budget_in_seconds_is_shared_by_the_rungs(ask, trained, tmp_path):
    text = TUNED.replace("steps = 6", "seconds = 60")
    assert ask(text)[0] == 0
    full = RunFolder(tmp_path / "runs/gates/gated-lr=0.001-seed0").facts()["max_steps"]
    short = RunFolder(tmp_path / f"runs/gates/tuning-gated-lr=0.001-at-0.25-seed{FIRST_SEED}").facts()["max_steps"]
    assert short == round(full / 4)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (TUNED.replace("optimizer.params.lr", "optimizer.params.rl"), "unknown setting 'optimizer.params.rl'"),
        (TUNED.replace("1e-2]", '"x"]'), "tune: variant 'plain': optimizer.params.lr must be of type float"),
        (TUNED.replace("1e-2]", "-1.0]"), "tune: variant 'plain': optimizer.params.lr must be >= 0, got -1.0"),
        (TUNED.replace("1e-2]", "nan]"), "optimizer.params.lr must have finite numbers, not nan"),
        (TUNED + "optimizer.params.lr = 1e-3\n", "variant 'gated' sets optimizer.params.lr itself, and tune would"),
        (TUNED + "engine.optimizer.params.lr = 1e-3\n", "variant 'gated' sets optimizer.params.lr itself"),
        (TUNED.replace('"optimizer.params.lr"', '"steps"'), "tune cannot choose steps, which is the same for all"),
        (TUNED.replace("1e-2]", "1e-2]\nseeds = 0"), "tune.seeds must be a whole number from 2 to 100, not 0"),
        ("max_runs = 23\n" + TUNED, "max_runs = 23 is less than the 28 runs planned (20 for tuning and 8 to compare)"),
        ("max_hours = 0\n" + TUNED, "max_hours must be a number above 0, not 0"),
        (
            'match = "parameters"\n'
            + TUNED.replace('"optimizer.params.lr" = [1e-3, 3e-3, 1e-2]', "model.width = [32, 64]"),
            "tune: width 64 changes the parameters of variant 'plain' from 48,460 to",
        ),
        (
            COMMON + '[tune]\n"model.feed_forward_options.hiden" = [1, 2]\n' + VARIANTS,
            "unknown option 'hiden'; did you mean 'hidden'?",
        ),
    ],
)
def test_a_mistake_in_tune_ends_everything_before_the_first_run(ask, trained, tmp_path, text, sentence):
    code, _, err = ask(text)
    assert code == 1 and sentence in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not trained.started and not (tmp_path / "runs").exists()


def test_tuning_needs_a_validation_split_and_one_machine(ask, trained):
    assert "tune chooses by the validation split" in ask("hold_out = 0.0\n" + TUNED, "--final")[2]
    assert "leave out --shard" in ask(TUNED, "--shard", "1/2")[2]


def test_hours_that_are_used_up_end_the_runs_and_are_reported(ask, trained, tmp_path):
    code, out, err = ask("max_hours = 1e-9\n" + TUNED)
    assert code == 1 and "max_hours = 1e-09 is reached: no more runs are started" in out and "no run is finished" in err
    assert ask(TUNED)[0] == 0
    trained.started.clear()
    code, out, err = ask("max_hours = 1e-9\n" + TUNED, "--seeds", "3")
    assert code == 1 and not trained.started and "missing: plain-seed2: was not run" in err
    assert report(tmp_path)[1]["results"]["validation"][0]["n"] == 2


def test_runs_that_were_renamed_aside_leave_their_place_to_those_that_replace_them(ask, trained, tmp_path):
    text = "max_runs = 4\n" + COMMON + VARIANTS
    assert ask(text)[0] == 0
    for name in ("gated-seed0", "gated-seed1"):
        folder = RunFolder(tmp_path / "runs" / "gates" / name)
        folder.create(folder.facts() | {"code": {"fingerprint": "1", "files": {"train.py": "another"}}})
    trained.started.clear()
    assert ask(text, "--redo-changed")[0] == 0 and sorted(trained.started) == ["gated-seed0", "gated-seed1"]


def test_the_runs_that_measure_the_speed_count(ask, trained):
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    code, _, err = ask("max_runs = 4\n" + text)
    assert code == 1 and not trained.started
    assert "max_runs = 4 is less than the 8 runs planned (4 to measure the speed and 4 to compare)" in err


def test_the_hours_of_active_runs_are_added_and_idle_slots_cost_nothing(tmp_path, monkeypatch):
    """Five runs of one hour, four at once: 5 hours, although four slots are there for 2 hours."""

    class Signal:
        number = 0

    class Limits:
        max_runs, max_hours = None, 5.5

    class Hour:
        def __init__(self):
            self.began = now[0]

        def poll(self):
            return 0 if now[0] >= self.began + 3600 else None

        def terminate(self):
            raise AssertionError("no run should be stopped")

    now = [0.0]
    budget = RunBudget(Limits, tmp_path, Signal, clock=lambda: now[0])  # type: ignore[arg-type]
    monkeypatch.setattr("comparison.run_queue.time.sleep", lambda _: now.__setitem__(0, now[0] + 60))
    monkeypatch.setattr("comparison.run_queue._problem", lambda *_: None)
    tasks = [PlannedRun(f"run{i}", tmp_path / f"run{i}", [], {}) for i in range(5)]
    assert run_all(tasks, [{}] * 4, budget, lambda *_: Hour(), budget.set_active) == {}
    assert budget.number == 0 and budget.seconds == pytest.approx(5 * 3600)
    budget.set_active(2)
    now[0] += 901.0
    assert budget.number == -1 and "max_hours = 5.5" in budget.problem
