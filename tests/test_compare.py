"""compare.py: which runs are planned, made, reused and stopped, and what is reported of those that fail."""

from __future__ import annotations

import os
import re
import signal
from types import SimpleNamespace

import pytest
from comparisons import COMMON, VARIANTS, Ended, report

from common.errors import DatasetError
from common.paths import RUNS_OF_COMPARISON
from common.stop_signal import StopSignal
from comparison import planning
from comparison.planned_run import PlannedRun
from comparison.run_queue import run_all
from image_data.preparation.prepare import prepare
from records.run_folder import RunFolder


def test_a_dry_run_prints_the_plan_and_runs_nothing(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + VARIANTS, "--dry-run")
    assert code == 0 and not invented.started and not (tmp_path / "runs").exists()
    assert "2 variants x 2 seeds, 6 steps each" in out and "A gate." in out
    assert "2 seeds cannot confirm any difference: p stays at or above 0.5 (1 comparison, Holm)" in out
    assert "Use at least 6 seeds (--seeds 6)" in out
    assert sorted(re.findall(r"(\S+-seed\d): new", out)) == ["gated-seed0", "gated-seed1", "plain-seed0", "plain-seed1"]
    assert "./launch_local_train.sh --preset" in out
    assert "1 epoch each" in ask(COMMON.replace("steps = 6", "epochs = 1") + VARIANTS, "--dry-run")[1]


def test_a_plan_needs_no_dataset(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + VARIANTS, "--dry-run", "--data-dir", str(tmp_path / "none"))
    assert os.environ[RUNS_OF_COMPARISON] == str(tmp_path / "runs")  # its runs write the page of all runs there
    assert code == 0 and "is not prepared yet" in out and not (tmp_path / "none").exists()


def test_a_folder_of_other_images_is_not_taken_for_the_dataset_of_the_experiment(zipped, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "DATA", tmp_path)
    prepare(tmp_path / "cifar100", archive=zipped)
    experiment = SimpleNamespace(dataset="cifar100", hold_out=0.0)
    with pytest.raises(DatasetError, match=f"was prepared from {zipped.name}, and --dataset cifar100 would be ignored"):
        planning.dataset_facts(experiment, None, is_dry_run=False)
    assert planning.dataset_facts(experiment, tmp_path / "cifar100", is_dry_run=False).num_classes == 2


def test_the_order_is_random_and_the_same_every_time(ask, invented):
    order = [
        re.findall(r"(\S+-seed\d+): new", ask(COMMON + VARIANTS, "--dry-run", "--seeds", "12")[1]) for _ in range(2)
    ]
    assert order[0] == order[1] and order[0] != sorted(order[0]) and len(set(order[0])) == 24


def test_finished_runs_are_reused_and_unfinished_ones_resumed(ask, invented, tmp_path):
    assert ask()[0] == 0 and len(invented.started) == 4
    newest = RunFolder(tmp_path / "runs" / "gates" / "gated-seed1").newest_checkpoint()
    newest.rename(newest.with_name("step-00000003"))
    invented.started.clear()
    code, out, _ = ask(COMMON + VARIANTS, "--seeds", "3")
    assert code == 0 and "3 of 6 runs are already finished" in out
    assert sorted(invented.started) == ["gated-seed1", "gated-seed2", "plain-seed2"]
    invented.started.clear()
    assert ask(COMMON + VARIANTS, "--report-only")[0] == 0 and not invented.started


def test_shards_make_every_run_once_and_the_last_one_reports(ask, invented, tmp_path):
    def runs_of(i, count):
        return re.findall(
            r"(\S+-seed\d): new", ask(COMMON + VARIANTS, "--seeds", "4", "--shard", f"{i}/{count}", "--dry-run")[1]
        )

    for i in (1, 2):  # on two machines of different speeds, both variants on each
        assert sorted(name[:5] for name in runs_of(i, 2)) == ["gated", "gated", "plain", "plain"]
    planned = [runs_of(i, 3) for i in (1, 2, 3)]
    assert [len(names) for names in planned] == [3, 3, 2]
    for i, left in ((3, 6), (1, 3)):
        code, out, _ = ask(COMMON + VARIANTS, "--seeds", "4", "--shard", f"{i}/3")
        assert code == 0 and f"{left} run(s) of other shards are not" in out
    assert invented.started == planned[2] + planned[0] and not (tmp_path / "results").exists()
    assert ask(COMMON + VARIANTS, "--seeds", "4", "--shard", "2/3")[0] == 0
    assert sorted(invented.started) == sorted(planned[0] + planned[1] + planned[2]) and len(set(invented.started)) == 8
    assert report(tmp_path)[1]["missing"] == {}


def test_a_shard_names_its_failures_and_a_budget_in_seconds_is_not_shared(ask, invented, tmp_path):
    invented.fails["gated"] = "error: the loss is nan"
    codes = [ask(COMMON + VARIANTS, "--shard", f"{i}/2") for i in (1, 2)]
    assert any(code == 1 and "missing: gated-seed" in err for code, _, err in codes) and len(invented.started) == 4
    assert (
        "one machine must measure the speeds"
        in ask(COMMON.replace("steps = 6", "seconds = 60") + VARIANTS, "--shard", "1/2")[2]
    )
    for wrong in ("3/2", "0/2", "1", "1/0"):
        with pytest.raises(SystemExit):
            ask(COMMON + VARIANTS, "--shard", wrong)


def test_runs_of_other_settings_are_refused_or_set_aside(ask, invented, tmp_path):
    ask()
    invented.started.clear()
    changed = COMMON + VARIANTS.replace("32", "40")
    code, _, err = ask(changed)
    assert code == 1 and not invented.started
    assert (
        "gated-seed" in err
        and "settings.model.feed_forward_options.hidden was 32, is 40" in err
        and "--redo-changed" in err
    )
    assert ask(changed, "--redo-changed")[0] == 0
    assert (
        sorted(invented.started) == ["gated-seed0", "gated-seed1"]
        and (tmp_path / "runs" / "gates" / "gated-seed0.old-1").is_dir()
    )


def test_every_run_that_is_redone_keeps_its_log(ask, invented, tmp_path):
    ask()
    for hidden in (40, 48):
        (tmp_path / "runs" / "gates" / "gated-seed0.log").write_text(f"before {hidden}")
        assert ask(COMMON + VARIANTS.replace("32", str(hidden)), "--redo-changed")[0] == 0
    logs = [tmp_path / "runs" / "gates" / f"gated-seed0.old-{number}.log" for number in (1, 2)]
    assert [log.read_text() for log in logs] == ["before 40", "before 48"]


def test_a_report_says_why_a_run_is_missing_and_reads_the_dataset_from_the_right_run(ask, invented, tmp_path):
    assert ask()[0] == 0
    runs = tmp_path / "runs" / "gates"
    for name in ("a-removed-seed0", "gated-seed0.old-1"):  # with another validation split, so fewer images
        record = RunFolder(runs / name)
        facts = RunFolder(runs / "gated-seed0").facts()
        facts["dataset"] |= {"num_images": {"train": 100}, "fingerprint": "other"}
        record.create(facts | {"hold_out": 0.5})
    (runs / "a-damaged").mkdir()
    (runs / "a-damaged" / "run.json").write_text("{")
    assert ask(COMMON.replace("steps = 6", "epochs = 1") + VARIANTS, "--dry-run")[0] == 0
    code, _, err = ask(COMMON + VARIANTS, "--report-only")
    assert code == 0 and not err, err
    (runs / "gated-seed0" / "run.json").write_text("[]")
    _, _, err = ask(COMMON + VARIANTS.replace("32", "40"), "--report-only", "--seeds", "3")
    assert "missing: plain-seed2: was not run\n" in err and "gated-seed0: its folder holds a run of other" in err
    assert (
        "missing: gated-seed1: its folder holds a run of other settings (settings.model.feed_forward_options.hidden "
        "was 32, is 40)\n" in err
    )


def test_a_run_with_damaged_settings_is_not_this_run(tmp_path):
    task = PlannedRun("one", tmp_path / "one", [], {"settings": {"epochs": 1}, "fingerprint": "f"})
    for facts, text in (
        ({"settings": {"model": 3}, "dataset": {"fingerprint": "f"}}, "settings.epochs was None, is 1"),
        ({"settings": None, "dataset": {"fingerprint": "f"}}, "settings was None"),
        ({"settings": {}, "dataset": None}, "its run.json is damaged"),
    ):
        RunFolder(task.folder).create(facts)
        assert text in task.state()


def test_a_failing_variant_does_not_end_the_others_and_is_reported(ask, invented, tmp_path):
    invented.fails["gated"] = "error: the loss is nan at optimizer step 3; see /srv/somewhere/else/run.json"
    code, out, err = ask()
    assert code == 1 and len(invented.started) == 4 and "[4/4]" in out
    text, data = report(tmp_path)
    reason = "error: the loss is nan at optimizer step 3; see run.json"
    assert data["missing"] == {"gated-seed0": reason, "gated-seed1": reason} and reason in text
    assert f"missing: gated-seed0: {reason}" in err and "cannot be compared, since it shares no finished seed" in text
    invented.fails.clear()
    assert ask()[0] == 0 and report(tmp_path)[1]["missing"] == {}


def test_nothing_is_claimed_of_a_variant_some_of_whose_runs_failed(ask, invented, tmp_path):
    """Those that diverged are no random choice, so the seeds that are left show nothing of it."""
    third = '[[variants]]\nname = "third"\nidea = "Another gate."\nmodel.feed_forward = "swiglu"\n'
    for seed in range(10):
        better = {f"gated-seed{seed}": 0.9, f"third-seed{seed}": 0.9}
        invented.accuracy |= {f"plain-seed{seed}": 0.5 + seed / 1000, **better}
    invented.fails["gated-seed9"] = "error: the loss is nan at optimizer step 3"
    assert ask(COMMON.replace("seeds = 2", "seeds = 10") + VARIANTS + third)[0] == 1
    _, gated, third = [one.get("difference") for one in report(tmp_path)[1]["results"]["validation"]]
    assert gated["verdict"] == "inconclusive" and "Not tested, because runs are missing" in gated["sentence"]
    assert third["verdict"] == "confirmed better"
    invented.fails.clear()
    assert ask(COMMON.replace("seeds = 2", "seeds = 10") + VARIANTS)[0] == 0
    assert report(tmp_path)[1]["results"]["validation"][1]["difference"]["verdict"] == "confirmed better"


def test_a_run_that_ends_with_0_unfinished_counts_as_failed(tmp_path, signals):
    tasks = [PlannedRun(f"run{i}", tmp_path / f"run{i}", [], {}) for i in range(2)]

    def start(task, environment):
        record = RunFolder(task.folder)
        record.create({"total_steps": 6})
        (task.folder / "state" / f"step-0000000{6 if task is tasks[0] else 3}").mkdir(parents=True)
        return Ended(0)

    failures = run_all(tasks, [{}], StopSignal(), start)
    assert failures == {"run1": "ended with exit code 0 and no output"}


def test_a_comparison_that_is_stopped_stops_its_runs_and_starts_no_more(tmp_path, signals):
    class Working:
        told = 0

        def poll(self):
            return 75 if self.told else None

        def terminate(self):
            self.told += 1

    stop, children = StopSignal(), []

    def start(task, environment):
        children.append(Working())
        if len(children) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return children[-1]

    tasks = [PlannedRun(f"run{i}", tmp_path / f"run{i}", [], {}) for i in range(3)]
    assert run_all(tasks, [{}, {}], stop, start) == {} and stop.number == signal.SIGTERM
    assert [child.told for child in children] == [1, 1]
