"""Searches with compare.py: mistakes in [search], proposals, pruning, resumption, and the report.

Runs are made up: their accuracy grows with the number of evaluations, toward a value that depends on the learning rate.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import random
import re
import signal
import threading
import time
from types import SimpleNamespace

import optuna
import pytest
from comparisons import write_run
from sqlalchemy import event
from sqlalchemy.engine import Engine

import compare
from comparison.experiment_file import read
from comparison.search import check_space, read_search
from comparison.search_command import comparison_file
from comparison.search_space import read_space
from comparison.search_study import choose_sampler, has_owner
from comparison.tuning import FIRST_SEED
from records.run_folder import RunFolder

EPOCHS = 4
FILE = f"""question = "Which learning rate?"
preset = "tiny.toml"
epochs = {EPOCHS}
[search]
trials = 6
[search.space]
optimizer.params.lr = {{ low = 1e-4, high = 1e-1, log = true }}
model.depth = {{ low = 1, high = 3 }}
"""


class Training:
    """Replaces `launch`. Every look at a run is one more evaluation of it."""

    def __init__(self):
        self.started: list[str] = []
        self.fails: set[str] = set()
        self.on_poll = lambda run: None

    def __call__(self, task, environment) -> SimpleNamespace:
        self.started.append(task.name)
        (text,) = (word for word in task.arguments if word.startswith("optimizer.params.lr="))
        best = 0.5 - 0.1 * abs(math.log10(float(text.partition("=")[2])) + 2)  # best at 0.01
        record = RunFolder(task.folder)
        if not record.exists:
            write_run(task, best / EPOCHS, 1000.0, {}, done=False)
        run = SimpleNamespace(name=task.name, evaluations=len(record.metrics()), code=None)

        def poll():
            self.on_poll(run)
            if run.code is None and task.name in self.fails:
                task.log.write_text("error: the loss is nan at optimizer step 3\n")
                run.code = 1
            if run.code is None:
                run.evaluations += 1
                line = record.metrics()[0]
                lines = [line | {"validation_accuracy": best * (i + 1) / EPOCHS} for i in range(run.evaluations)]
                record.write_metrics("".join(json.dumps(line) + "\n" for line in lines))
                if run.evaluations == EPOCHS:
                    (task.folder / "state" / f"step-{record.facts()['total_steps']:08d}").mkdir()
                    run.code = 0
            return run.code

        return SimpleNamespace(poll=poll, terminate=lambda: vars(run).update(code=run.code or 75))


def report_of(tmp_path) -> dict:
    return json.loads((tmp_path / "results" / "gates" / "search.json").read_text())


@pytest.fixture
def training(monkeypatch):
    from comparison import search_runs

    made = Training()
    monkeypatch.setattr(compare, "launch", made)
    monkeypatch.setattr(search_runs, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(search_runs, "READ_SECONDS", 0.0)
    event.listen(Engine, "connect", do_not_wait_for_the_disk)
    yield made
    event.remove(Engine, "connect", do_not_wait_for_the_disk)


def do_not_wait_for_the_disk(connection, _) -> None:
    connection.execute("PRAGMA synchronous=OFF")


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("trials = 6", "", "[search]: trials must be a whole number from 1 to 100000, not None"),
        ("trials = 6", "trials = 2.5", "trials must be a whole number from 1 to 100000, not 2.5"),
        ("trials = 6", "trials = 6\ntrails = 3", "[search]: unknown key 'trails'; did you mean 'trials'?"),
        ("trials = 6", 'trials = 6\nsampler = "tpee"', "[search]: unknown sampler 'tpee'; did you mean 'tpe'?"),
        ("trials = 6", 'trials = 6\npruner = "hyperband"', "[search]: unknown pruner 'hyperband'"),
        (
            "trials = 6",
            'trials = 6\npruner = "none"\nreduction_factor = 2',
            'min_evaluations and reduction_factor need pruner = "asha"',
        ),
        ("low = 1e-4", "low = 1.0", "optimizer.params.lr: low = 1.0 must be less than high = 0.1"),
        ("low = 1e-4", "low = 0.0", "log = true needs low above 0 and no step"),
        ("log = true", "logarithmic = true", "unknown key 'logarithmic'"),
        ("low = 1, high", "min = 1, max", "[search.space] model.depth: unknown key 'min'; did you mean 'low'?"),
        ("low = 1, high", "lo = 1, hi", "[search.space] model.depth: unknown key 'lo'; did you mean 'low'?"),
        ("[search]", "datset = 3\n[search]", "gates.toml: unknown key 'datset'; did you mean 'dataset'?"),
        ("low = 1, high", "low = 1, step = 5, high", "step must lie between 0 and high - low = 2, not 5"),
        ("low = 1, high", "low = 1, step = 0, high", "step must lie between 0 and high - low = 2, not 0"),
        ("low = 1, high = 3", "low = 1, high = 3.5", "write low, high and step all as whole numbers"),
        ("{ low = 1, high = 3 }", "[2]", "[search.space] model.depth needs at least two different values, not [2]"),
        ("{ low = 1, high = 3 }", "3", "[search.space] model.depth must be a list of values or { low = ..."),
        ("model.depth", "model.dept", "[search.space] model.dept = 1: unknown setting 'model.dept'"),
        ("{ low = 1, high = 3 }", '[1, "two"]', "[search.space] model.depth = two: model.depth must be of type int"),
        (
            "low = 1, high",
            "low = -1, high",
            "[search.space] model.depth = -1: model.depth must be in [1, 1000], got -1",
        ),
        ("model.depth", "seeds", "[search.space] seeds is the same for all trials"),
        ("[search]", "model.depth = 2\n[search]", "[search.space] varies model.depth, which is also set for all"),
        ("[search]", "seeds = 3\n[search]", "seeds does not go with [search]: a search trains each trial once"),
        ("[search]", "hold_out = 0.0\n[search]", "hold_out must lie between 0 and 1, not 0.0"),
        ("[search]", "steps = 3\n[search]", "give exactly one budget, epochs = N or steps = N, N at least 1, not"),
        ('"tiny.toml"', '"tinny"', "gates.toml: unknown preset 'tinny'"),
        ('"tiny.toml"', "3", 'gates.toml: preset must be a text, such as preset = "...", not 3'),
        (FILE[FILE.index("[search.space]") :], "", "[search.space] is missing"),
    ],
)
def test_a_mistake_ends_everything_before_the_first_run(find, training, tmp_path, old, new, sentence):
    assert old in FILE
    code, _, err = find(FILE.replace(old, new))
    assert code == 1 and sentence in err and err.startswith("error: ") and err.count("\n") == 1, err
    assert not training.started and not (tmp_path / "runs").exists()


@pytest.fixture
def find(ask):
    """Call compare.py on a file with [search], named gates.toml."""
    return lambda text=FILE, *words: ask(text, *words)


def test_options_of_comparisons_that_a_search_lacks_are_refused(find, training):
    for words, sentence in (
        (("--seeds", "3"), "--seeds does not go with [search]"),
        (("--shard", "1/2"), "start the same command on every machine"),
        (("--set", "epochs=3"), "--set epochs=3 has no effect on a search; set epochs in the experiment file"),
    ):
        code, _, err = find(FILE, *words)
        assert code == 1 and sentence in err and not training.started


def test_a_value_that_fits_only_some_others_is_no_mistake(tmp_path, tiny):
    """48 channels need 2 or 3 heads; 3 heads need 48 channels."""
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    path = tmp_path / "find.toml"
    space = "model.width = [32, 48]\nmodel.heads = [2, 3]\n"
    path.write_text(FILE[: FILE.index("optimizer")] + space)

    def build(variant):
        from common.errors import SettingsError

        if variant.settings.model.width % variant.settings.model.heads:
            raise SettingsError("width is not divisible by heads")

    check_space(read_search(path, []), "find.toml", build)
    with pytest.raises(Exception, match=r"find.toml: \[search.space\] model.heads = 3: width is not divisible"):
        path.write_text(path.read_text().replace("[32, 48]", "[32, 64]"))
        check_space(read_search(path, []), "find.toml", build)


def test_drawn_values_lie_in_the_space():
    space = read_space("x", {"a": {"low": 2, "high": 8, "step": 3}, "b": {"c": {"low": 0.1, "high": 0.2}, "d": [1, 2]}})
    generator = random.Random(0)
    assert list(space) == ["a", "b.c", "b.d"]
    assert {space["a"].draw(generator) for _ in range(50)} == {2, 5, 8}
    assert all(0.1 <= space["b.c"].draw(generator) <= 0.2 for _ in range(50))


# --- trials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "sampler"), [("tpe", "TPESampler"), ("random", "RandomSampler")])
def test_the_file_chooses_the_sampler_and_every_process_gets_values_of_its_own(name, sampler):
    optuna = pytest.importorskip("optuna")
    study, drawn = optuna.create_study(), []
    for _ in range(2):
        choose_sampler(SimpleNamespace(sampler=name, seed=0), study)
        assert type(study.sampler).__name__ == sampler
        drawn.append(study.ask().suggest_float("lr", 0.0, 1.0))
    assert drawn[0] != drawn[1]


def test_a_search_finds_the_learning_rate_and_keeps_pruned_runs(find, training, tmp_path):
    code, out, _ = find(FILE, "--plan")
    assert code == 0 and "6 trials by tpe, 4 epochs each" in out and "0.0001 to 0.1, logarithmic" in out
    assert "asha: after evaluation 1, 3, ... the best 1 in 3" in out and not (tmp_path / "runs").exists()
    training.fails.add("trial-0002")
    code, out, _ = find()
    assert code == 1 and len(training.started) == 6 and "trial-0002 FAILED: error: the loss is nan" in out
    report = report_of(tmp_path)
    trials = {row["trial"]: row for row in report["trials"]}
    states = [row["state"] for row in report["trials"]]
    assert states.count("failed") == 1 and states.count("pruned") >= 1 and states[0] == "finished"
    finished = [row for row in report["trials"] if row["state"] == "finished"]
    assert [row["accuracy"] for row in finished] == sorted((row["accuracy"] for row in finished), reverse=True)
    for name, row in trials.items():
        facts = RunFolder(tmp_path / "runs" / "gates" / name).facts()
        expected = {"finished": "complete", "pruned": "pruned", "failed": "fail"}[row["state"]]
        assert facts["search"] == {"trial": int(name[-4:]), "state": expected}
        assert facts["settings"]["engine"]["optimizer"]["params"]["lr"] == row["values"]["optimizer.params.lr"]
        assert facts["hold_out"] == 0.1 and (row["state"] != "pruned" or row["evaluations"] in (1, 3))
    text = (tmp_path / "results" / "gates" / "search.md").read_text()
    assert "6 trials:" in text and "| pruned |" in text and "the loss is nan" in text
    assert "12.35" not in text + json.dumps(report), "the accuracy on the test split"
    # The proposed comparison is a valid experiment file.
    from comparison.experiment_file import read

    (tmp_path / "best.toml").write_text(re.search(r"```toml\n(.*?)```", text, re.DOTALL)[1])
    preset, best = read(tmp_path / "best.toml").variants
    assert best.settings.engine["optimizer"]["params"]["lr"] == finished[0]["values"]["optimizer.params.lr"]
    assert preset.settings.engine["optimizer"]["params"]["lr"] == 3e-3

    training.started.clear()
    find(FILE.replace("trials = 6", "trials = 7"))
    assert training.started == ["trial-0006"]
    changed = FILE.replace("high = 3 }", "high = 2 }").replace("trials = 6", "trials = 1")
    code, _, err = find(changed)
    assert code == 1 and "holds a search of another space; add --redo-changed" in err
    for look in ("--report-only", "--dry-run"):  # only looked at: nothing is renamed
        assert find(changed, "--redo-changed", look)[0] == 1 and not (tmp_path / "runs" / "gates.old-1").exists()
    assert find(changed, "--redo-changed")[0] == 0 and training.started == ["trial-0006", "trial-0000"]
    assert (tmp_path / "runs" / "gates.old-1" / "trial-0006").is_dir()


def test_the_suggested_comparison_can_be_read(tmp_path, tiny):
    text = FILE.replace(f"epochs = {EPOCHS}", "steps = 2000000\nmodel.width = 32").replace("trials = 6", "trials = 1")
    words = [
        "model.width=64",
        "model.feed_forward_options.hidden=8",
        "model.feed_forward=geglu",
        "engine.bf16.enabled=auto",
    ]
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    (tmp_path / "gates.toml").write_text(text)
    search = read_search(tmp_path / "gates.toml", words)
    lines = comparison_file(search, {"trial": "trial-0000", "values": {"optimizer.params.lr": 1e-5, "model.depth": 2}})
    (tmp_path / "best.toml").write_text("\n".join(lines))
    suggested = read(tmp_path / "best.toml")
    start, best = suggested.variants
    assert start.settings == search.experiment.variants[0].settings and suggested.budget_amount == 2000000
    assert start.settings.model.width == 64 and start.settings.model.feed_forward_options == {"hidden": 8}
    assert best.settings.model.depth == 2 and best.settings.engine["optimizer"]["params"]["lr"] == 1e-5
    assert search.experiment.budget_text == "2000000 steps" and "\n".join(lines).count("model.width") == 1


def test_a_trial_that_does_not_fit_the_data_has_failed_and_says_why(find, training, tmp_path):
    code, out, _ = find(FILE.replace("model.depth", "train_batch_size = [32, 4096]\nmodel.depth"))
    assert code == 1 and "train_batch_size=4096 is more than the" in out
    states = {row["state"] for row in report_of(tmp_path)["trials"]}
    assert "not finished" not in states and "failed" in states


def test_no_seed_of_the_suggested_comparison_has_chosen_the_trial(find, training, tmp_path):
    assert find()[0] == 0
    assert {json.loads(path.read_text())["seed"] for path in tmp_path.glob("runs/gates/*/run.json")} == {FIRST_SEED}
    assert "compare the two on other seeds" in (tmp_path / "results" / "gates" / "search.md").read_text()
    code, _, err = find(FILE.replace("trials = 6", "trials = 6\nseed = 0"))
    assert code == 1 and "write seed = 1000000 under [search] to go on with it" in err
    assert find(FILE.replace("trials = 6", "trials = 6\nseed = 0"), "--redo-changed")[0] == 0
    assert "seed 0 favors the trial" in (tmp_path / "results" / "gates" / "search.md").read_text()


def test_a_trial_of_an_earlier_process_with_the_same_number_is_resumed(find, training, monkeypatch, tmp_path):
    """As in a container, where every process is number 1."""

    def kill(run):
        if run.name == "trial-0001":
            raise SystemExit(9)

    training.on_poll = kill
    with pytest.raises(SystemExit):
        find()
    training.on_poll = lambda run: None
    training.started.clear()
    assert find()[0] == 0 and training.started[0] == "trial-0001"  # this process made the note itself


def test_two_processes_never_claim_the_same_trial(tmp_path):
    """The second one waits until the first one has noted its claim."""
    from comparison.search_study import lock

    order = []

    def second():
        with lock(tmp_path):
            order.append("second")

    with lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_processes_that_start_together_create_one_study(find, training, monkeypatch):
    from comparison import search_study

    def load(search, runs, load=search_study._load):
        with (runs / search_study.LOCK).open("w") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return load(search, runs)

    monkeypatch.setattr(search_study, "_load", load)
    assert find()[0] == 0 and find()[0] == 0


def test_a_study_that_cannot_be_written_is_one_sentence(find, training, monkeypatch):
    def full(self):
        raise optuna.exceptions.StorageInternalError("commit") from OSError("database or disk is full")

    monkeypatch.setattr("comparison.search_runs.SearchRuns.run", full)
    code, _, err = find()
    assert code == 1 and "study.db cannot be read or written (database or disk is full)" in err


def test_a_stopped_and_a_killed_search_resume(find, training, monkeypatch, tmp_path):
    text = FILE.replace("trials = 6", 'trials = 3\npruner = "none"')

    def stop(run):
        if run.name == "trial-0001" and run.evaluations == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    training.on_poll = stop
    code, out, _ = find(text)
    assert code == 75 and "stopping: 1 trial(s) save first" in out and training.started == ["trial-0000", "trial-0001"]

    def kill(run):
        if run.name == "trial-0001":
            raise SystemExit(9)

    training.on_poll = kill
    with pytest.raises(SystemExit):
        find(text)
    monkeypatch.setattr("comparison.search_study.is_alive", lambda process: False)  # it was this process
    training.started.clear()
    training.on_poll = lambda run: None
    facts = RunFolder(tmp_path / "runs" / "gates" / "trial-0000")
    facts.create(facts.facts() | {"code": {"files": {"train.py": "another"}}})
    code, _, err = find(text)
    assert code == 1 and "'train.py' changed after trial-0000 was started" in err and not training.started
    facts.create(facts.facts() | {"code": RunFolder(facts.folder.with_name("trial-0001")).facts()["code"]})
    code, out, _ = find(text)
    assert code == 0 and "trial-0001 resumed" in out and training.started == ["trial-0001", "trial-0002"]
    (row,) = (row for row in report_of(tmp_path)["trials"] if row["trial"] == "trial-0001")
    assert row["evaluations"] == EPOCHS and row["state"] == "finished"


def test_trials_of_living_processes_are_left_alone():
    def owned(owner: str, seconds: float) -> bool:
        return has_owner(SimpleNamespace(user_attrs={"owner": owner, "alive": time.time() - seconds}))

    here = os.uname().nodename
    assert owned(f"{here} {os.getpid()}", 1e6) and not owned(f"{here} {2**22 + 1}", 0)
    assert owned("elsewhere 1", 100) and not owned("elsewhere 1", 1000) and not owned("", 0)
    assert not has_owner(SimpleNamespace(user_attrs={}))


def test_the_same_values_are_not_trained_twice(find, training):
    space = "[search.space]\nmodel.depth = [1, 2]\noptimizer.params.lr = [0.01, 0.02]\n"
    text = FILE[: FILE.index("[search.space]")].replace("trials = 6", 'trials = 5\nsampler = "random"\npruner = "none"')
    code, out, _ = find(text + space)
    assert code == 0 and len(training.started) <= 4 and "same values as trial-000" in out and "[5/5]" in out
