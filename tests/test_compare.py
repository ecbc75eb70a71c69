"""compare.py: what is refused before anything runs, which runs are made, reused and reported, and what a report may say and show.

Most runs here are made up (`Invented`): their folders are written at once. The real ones are forks of train.py, and one goes
through the launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import psutil
import pytest
from torch import nn

import compare
import feedforward
from calibration import steps_for
from dataset import Dataset
from question import costs, read
from run_record import RunRecord
from runner import StopSignal, Task, last_error, run_all, without_paths

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = sorted((ROOT / "experiments").glob("*.toml"))
COMMON = 'question = "Is a gate better?"\npreset = "tiny.toml"\nsteps = 6\nseeds = 2\n'
ARMS = """
[[arms]]
name = "plain"
idea = "As ever."
[[arms]]
name = "gated"
idea = "A gate."
model.feed_forward = "geglu"
model.feed_forward_options.hidden = 32
"""


@pytest.fixture(autouse=True)
def signals():
    """Undo what StopSignal does to this process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def ask(tmp_path, tiny, shapes, monkeypatch, capsys):
    """Write an experiment file and call compare.py on it; returns exit code, output and errors."""
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    monkeypatch.chdir(tmp_path)

    def ask(text: str = COMMON + ARMS, *words: str):
        (tmp_path / "gates.toml").write_text(text)
        monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "gates.toml"), "--data-dir", str(shapes),
                                          "--runs-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results"), *words])
        code = compare.run()
        said = capsys.readouterr()
        return code, said.out, said.err

    return ask


@pytest.fixture
def invented(monkeypatch):
    """Runs that are written instead of made."""
    made = Invented()
    monkeypatch.setattr(compare, "launch", made)
    return made


class Invented:
    """Starts of runs. `accuracy`, `facts`, `speed` and `fails` say what they come to, by the name of the run."""

    def __init__(self):
        self.started: list[str] = []
        self.accuracy, self.facts, self.speed, self.fails = {}, {}, {}, {}

    def __call__(self, task: Task, environment: dict[str, str]) -> Ended:
        self.started.append(task.name)
        for arm, message in self.fails.items():
            if task.name.startswith(arm):
                task.log.write_text(f"run       here\nTraceback (most recent call last):\n{message}\nTraining failed (exit code 1).\n")
                return Ended(1)
        write_run(task, self.accuracy.get(task.name, 0.5), self.speed.get(task.name.split("-")[-2], 1000.0), self.facts.get(task.name, {}))
        return Ended(0)


class Ended:
    """A child that has ended."""

    def __init__(self, code: int):
        self.code = code

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        raise AssertionError("nothing was to be stopped")


def write_run(task: Task, accuracy: float, images_per_second: float, changed: dict, done: bool = True) -> None:
    """The folder of a run of 300 images in batches of 64, 30 of them held out."""
    expected = task.expected
    batch = expected["settings"]["engine"]["train_batch_size"]
    steps = expected["max_steps"] or expected["settings"]["epochs"] * (270 // batch)
    facts = {
        **{key: expected[key] for key in ("settings", "seed", "max_steps", "hold_out")},
        "dataset": {"name": "shapes", "folder": "data/shapes", "fingerprint": expected["fingerprint"], "classes": list("abcdefghij"),
                    "image_side": 32, "num_images": {"train": 270, "validation": 30, "test": 70}},
        "batch": {"total": batch}, "steps_per_epoch": 270 // batch, "total_steps": steps, "commit": "abc", "uncommitted_changes": False,
        "device": "CPU", "num_processes": 1, "versions": {"torch": "2"}, **changed,
    }
    record = RunRecord(task.folder)
    record.create(facts)
    seconds = 0.5 + steps * batch / images_per_second
    line = {"epoch": 1, "step": steps, "training_seconds": seconds, "images_per_second": steps * batch / seconds,
            "validation_accuracy": accuracy, "validation_seen": 30, "test_accuracy": 0.123456, "test_seen": 70, "test_loss": 1.0}
    record.append_metrics(line)
    (task.folder / "state" / f"step-{steps if done else 1:08d}").mkdir(parents=True)


def report(tmp_path: Path) -> tuple[str, dict]:
    folder = tmp_path / "results" / "gates"
    return (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())


# --- the questions that come with the project ---------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_every_question_can_be_asked_at_both_sizes(path, size):
    question = read(path, size)
    found = costs(question, num_classes=100, image_side=32)
    assert len(found) == len(question.arms) and all(cost.parameters > 0 and cost.flops > 0 for cost in found)
    if size == "full":  # the first system's network, and seeds that can show something
        assert all(cost.parameters == 4_417_608 for arm, cost in zip(question.arms, found, strict=True) if arm.name == "mlp")
        assert compare.power_note(question.seeds, len(question.arms)) is None


def test_all_eight_ideas_are_in_one_question():
    arms = {arm.name for arm in read(ROOT / "experiments" / "eight-ideas.toml").arms}
    others = {arm.name for path in QUESTIONS for arm in read(path).arms} - {"fff-mask"}  # which is fff
    assert len(QUESTIONS) == 9 and arms == others


def test_flops_are_those_of_the_products():
    """An MLP's hidden neuron costs one product in and one out for each of the 16 tokens, each C multiply-adds of 2."""
    question = read(ROOT / "experiments" / "hidden-size.toml", "small")
    usual, small = costs(question, 100, 32)
    assert usual.flops - small.flops == 3 * (4 * 96 - 256) * 16 * 96 * 2 * 2
    assert usual.parameters - small.parameters == 3 * (4 * 96 - 256) * (2 * 96 + 1)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "sentence"), [
    (COMMON + ARMS.replace("geglu", "gegul"), "arm 'gated': unknown feed-forward 'gegul'; did you mean 'geglu'?"),
    (COMMON + ARMS.replace("hidden", "hiden"), "arm 'gated': feed_forward=geglu: unknown option 'hiden'; did you mean 'hidden'?"),
    (COMMON + ARMS.replace("model.feed_forward =", "model.feedforward ="), "gates.toml, arm 'gated': unknown setting 'model.feedforward'"),
    (COMMON + "model.widht = 3\n" + ARMS, "arm 'plain': unknown setting 'model.widht'"),
    (COMMON + ARMS.replace("32", '"32"'), "arm 'gated': feed_forward=geglu: option hidden must be of type int"),
    (COMMON + "epochs = 3\n" + ARMS, "give exactly one budget (epochs, steps, seconds), not epochs and steps"),
    (COMMON.replace("steps = 6", "") + ARMS, "give exactly one budget (epochs, steps, seconds), not none"),
    (COMMON.replace("6", "0") + ARMS, "steps must be a whole number above 0, not 0"),
    (COMMON + ARMS + "epochs = 3\n", "arm 'gated': epochs is the same for all arms"),
    (COMMON + ARMS.replace("gated", "plain"), "every arm needs a name of its own"),
    (COMMON + ARMS.replace('"gated"', '"a/b"'), "not 'a/b'"),
    (COMMON + ARMS[:ARMS.index("model")], "the arms 'plain' and 'gated' have the same settings"),
    (COMMON + ARMS[:ARMS.rindex("[[")], "a comparison needs at least two [[arms]]"),
    (COMMON + ARMS.replace('idea = "A gate."', ""), "arm 'gated': say in one sentence what the idea is"),
    (COMMON + "hold_out = 0.0\n" + ARMS, "hold_out=0 leaves nothing to compare arms on"),
    (COMMON.replace("seeds = 2", "seeds = 21") + ARMS, "seeds must lie between 1 and 20, not 21"),
    (COMMON.replace("tiny.toml", "tinny") + ARMS, "unknown preset 'tinny'"),
    (COMMON + "schedule.shape = \"cosin\"\n" + ARMS, "arm 'plain': unknown schedule.shape 'cosin'"),
    (COMMON + "train_batch_size = 512\n" + ARMS, "train_batch_size=512 is more than the 270 training images"),
    (COMMON + ARMS + "[sizes.small]\narms.gatd.model.width = 3\n", "unknown arm 'gatd'; did you mean 'gated'?"),
    ("question = ", "gates.toml is not valid TOML"),
])
def test_a_mistake_ends_everything_before_the_first_run(ask, invented, tmp_path, text, sentence):
    code, _, err = ask(text)
    assert code == 1 and sentence in err and err.startswith("error: ") and err.count("\n") == 1
    assert not invented.started and not (tmp_path / "runs").exists()


def test_a_size_that_is_not_there_is_named(ask, invented):
    assert "unknown size 'ful'; did you mean 'full'?" in ask(COMMON + ARMS + "[sizes.full]\nseeds = 3\n", "--size", "ful")[2]
    assert "it has no table [sizes]" in ask(COMMON + ARMS, "--size", "full")[2]


def test_a_part_with_a_bug_is_found_before_anything_runs(ask, invented, monkeypatch):
    class Broken(nn.Module):
        """Loses half of the channels."""

        def __init__(self, dims):
            super().__init__()

        def forward(self, x):
            return x[..., ::2]

    monkeypatch.setitem(feedforward.FEED_FORWARDS, "broken", Broken)
    code, _, err = ask(COMMON + ARMS.replace('"geglu"', '"broken"').replace("model.feed_forward_options.hidden = 32", ""))
    assert code == 1 and "arm 'gated' cannot be built: RuntimeError" in err and not invented.started


# --- which runs are made ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_makes_nothing(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + ARMS, "--dry-run")
    assert code == 0 and not invented.started and not (tmp_path / "runs").exists()
    assert "2 arms x 2 seeds, 6 steps each" in out and "A gate." in out and "with 2 seeds no arm can be called better or worse" in out
    assert sorted(re.findall(r"(\S+-seed\d): new", out)) == ["gated-seed0", "gated-seed1", "plain-seed0", "plain-seed1"]
    assert "./launch_local_train.sh --preset" in out


def test_a_plan_needs_no_dataset(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + ARMS, "--dry-run", "--data-dir", str(tmp_path / "none"))
    assert code == 0 and "is not prepared yet" in out and not (tmp_path / "none").exists()


def test_the_order_is_random_and_the_same_every_time(ask, invented):
    order = [re.findall(r"(\S+-seed\d+): new", ask(COMMON + ARMS, "--dry-run", "--seeds", "12")[1]) for _ in range(2)]
    assert order[0] == order[1] and order[0] != sorted(order[0]) and len(set(order[0])) == 24


def test_finished_runs_are_reused_and_unfinished_ones_go_on(ask, invented, tmp_path):
    assert ask()[0] == 0 and len(invented.started) == 4
    newest = RunRecord(tmp_path / "runs" / "gates" / "gated-seed1").newest_checkpoint()
    newest.rename(newest.with_name("step-00000003"))
    invented.started.clear()
    code, out, _ = ask(COMMON + ARMS, "--seeds", "3")
    assert code == 0 and "3 of 6 runs are finished already" in out
    assert sorted(invented.started) == ["gated-seed1", "gated-seed2", "plain-seed2"]
    invented.started.clear()
    assert ask(COMMON + ARMS, "--report-only")[0] == 0 and not invented.started


def test_runs_of_other_settings_are_refused_or_set_aside(ask, invented, tmp_path):
    ask()
    invented.started.clear()
    changed = COMMON + ARMS.replace("32", "40")
    code, _, err = ask(changed)
    assert code == 1 and not invented.started
    assert "gated-seed" in err and "settings.model.feed_forward_options.hidden was 32, is 40" in err and "--redo-changed" in err
    assert ask(changed, "--redo-changed")[0] == 0
    assert sorted(invented.started) == ["gated-seed0", "gated-seed1"] and (tmp_path / "runs" / "gates" / "gated-seed0.old-1").is_dir()


def test_a_failing_arm_does_not_end_the_rest_and_is_reported(ask, invented, tmp_path):
    invented.fails["gated"] = "error: the loss is nan at optimiser step 3; see /srv/somewhere/else/run.json"
    code, out, err = ask()
    assert code == 1 and len(invented.started) == 4 and "[4/4]" in out
    text, data = report(tmp_path)
    reason = "error: the loss is nan at optimiser step 3; see run.json"
    assert data["missing"] == {"gated-seed0": reason, "gated-seed1": reason} and reason in text
    assert f"missing: gated-seed0: {reason}" in err and "cannot be compared: it shares no finished seed" in text
    invented.fails.clear()
    assert ask()[0] == 0 and report(tmp_path)[1]["missing"] == {}


def test_a_comparison_that_is_stopped_stops_its_runs_and_starts_no_more(tmp_path):
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

    tasks = [Task(f"run{i}", tmp_path / f"run{i}", [], {}) for i in range(3)]
    assert run_all(tasks, [{}, {}], stop, start) == {} and stop.number == signal.SIGTERM
    assert [child.told for child in children] == [1, 1]


@pytest.mark.parametrize(("log", "line"), [
    ("a\nerror: no\nTraining failed (exit code 1).\n", "error: no"),
    ("Traceback\n  File /a/b/c.py\ntorch.OutOfMemoryError: 3 GiB\nbye\n", "torch.OutOfMemoryError: 3 GiB"),
    ("hello\nKilled\n", "Killed"), ("", None),
])
def test_the_last_error_of_a_log(log, line):
    assert last_error(log) == line


def test_a_budget_in_seconds_becomes_steps_for_each_arm(ask, invented, tmp_path):
    assert steps_for(60, (20, 3.0), (120, 8.0)) == round((60 - 2) / 0.05)  # 2 s to start, then 0.05 s a step
    invented.speed = {"gated": 500.0, "plain": 2000.0}
    text = COMMON.replace("steps = 6", "seconds = 60") + ARMS
    assert "speed is measured first" in ask(text, "--dry-run")[1] and not invented.started
    assert ask(text)[0] == 0
    steps = {arm: RunRecord(tmp_path / "runs" / "gates" / f"{arm}-seed1").facts()["max_steps"] for arm in ("plain", "gated")}
    assert steps == {"plain": round(59.5 * 2000 / 64), "gated": round(59.5 * 500 / 64)}
    text, data = report(tmp_path)
    assert all(arm["unequal"] == [] for arm in data["arms"].values()) and "60 seconds" in text
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + ARMS, "--report-only")[0] == 0


def test_a_budget_in_seconds_that_was_missed_is_named(ask, invented, monkeypatch, tmp_path):
    def slower(task, environment):
        if task.name.startswith("gated-seed"):
            invented.speed["gated"] = 700.0
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", slower)
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + ARMS)[0] == 0
    assert report(tmp_path)[1]["arms"]["gated"]["unequal"] == ["training seconds: 86 on average instead of 60"]


# --- what a report says -------------------------------------------------------------------------------------------


def test_unequal_arms_are_named_and_marked(ask, invented, tmp_path):
    for seed in (0, 1):
        invented.facts[f"gated-seed{seed}"] = {"commit": "def", "device": "NVIDIA H200"}
    ask(COMMON + ARMS + "train_batch_size = 32\n")
    text, data = report(tmp_path)
    assert data["arms"]["gated"]["unequal"] == [
        "commit: def instead of abc", "device: ('NVIDIA H200', 1) instead of ('CPU', 1)", "images trained on: 192 instead of 384"]
    assert "- **gated**\\* against plain:" in text and "| gated\\* |" in text and "- **gated**\\* — images trained on: 192" in text


def test_equal_arms_are_said_to_be_equal(ask, invented, tmp_path):
    ask()
    text, data = report(tmp_path)
    assert "compared over all runs: equal." in text and "\\*" not in text


def test_the_numbers_of_a_report(ask, invented, tmp_path):
    for seed in range(6):
        invented.accuracy |= {f"plain-seed{seed}": 0.5 + seed / 100, f"gated-seed{seed}": 0.55 + seed / 100 + (seed % 2) / 1000}
    code, out, _ = ask(COMMON + ARMS, "--seeds", "6")
    text, data = report(tmp_path)
    plain, gated = data["results"]["validation"]
    assert code == 0 and plain["mean"] == pytest.approx(52.5) and plain["sd"] == pytest.approx(1.8708, abs=1e-4) and plain["n"] == 6
    assert gated["difference"]["mean"] == pytest.approx(5.05) and gated["difference"]["p"] == 2 / 64
    sentence = "better by 5.05 ± 0.06 points (p = 0.03, 6 seeds)"
    assert gated["difference"]["sentence"] == sentence and f"- **gated** against plain: {sentence}." in text and sentence in out
    assert "commit abc" in text.lower() and "`model.feed_forward` 'geglu' (not 'mlp')" in text
    assert all((tmp_path / "results" / "gates" / name).stat().st_size > 5000 for name in ("accuracy.png", "costs.png", "curves.png"))


def test_the_test_split_appears_with_final_only(ask, invented, tmp_path):
    ask()
    text, data = report(tmp_path)
    assert "12.35" not in text and "0.1234" not in json.dumps(data) and "test_accuracy" not in json.dumps(data)
    assert "## Answer on the held-out part of train" in text and "neither used nor shown" in text
    code, out, _ = ask(COMMON + ARMS, "--final")
    text, data = report(tmp_path)
    assert text.index("## Answer on the test split") < text.index("## Answer on the held-out part of train") and "12.35" in text
    assert data["results"]["test"][0]["mean"] == pytest.approx(12.3456) and data["final"]


def test_a_report_has_no_path_of_this_machine(ask, invented, tmp_path, shapes):
    ask()
    for path in (tmp_path / "results" / "gates").glob("report.*"):
        text = path.read_text()
        assert not re.search(r"(?<![\w:/])/(home|tmp|work|root|usr|var|private)/", text) and str(tmp_path) not in text and str(shapes) not in text
    assert without_paths("no /a/b/c.toml, see https://x.org/a/b and 3/4 of runs/a") == "no c.toml, see https://x.org/a/b and 3/4 of runs/a"


def test_help_answers_without_loading_pytorch():
    code = ("import sys, runpy\nsys.argv = ['compare.py', '--help']\n"
            "try: runpy.run_path('compare.py', run_name='__main__')\nfinally: assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "python compare.py experiments/eight-ideas.toml" in done.stdout, done.stderr


# --- real runs ----------------------------------------------------------------------------------------------------


class Forked:
    """A run of train.py as a fork with PyTorch in memory, and perhaps with a new feed-forward."""

    def __init__(self, task: Task, environment: dict[str, str]):
        self.program = programs.Program(train_with_new_entry, tuple(task.arguments), {})
        self.log = task.log

    def poll(self) -> int | None:
        if self.program.process.is_alive():
            return None
        done = self.program.end()
        self.log.write_text(done.out + done.err)
        return done.code

    def terminate(self) -> None:
        self.program.send(signal.SIGTERM)


class Twice(nn.Module):
    """A map and its half."""

    def __init__(self, dims, factor: float = 0.5):
        super().__init__()
        self.map, self.factor = nn.Linear(dims.width, dims.width), factor

    def forward(self, x):
        return self.map(x) * (1 + self.factor)


def train_with_new_entry(*arguments: str) -> None:
    sys.path.insert(0, str(ROOT))
    import feedforward

    feedforward.FEED_FORWARDS["twice"] = Twice
    programs._script("train.py", *arguments)


def test_a_new_feed_forward_is_an_arm_like_any_other_beside_one_that_fails(ask, monkeypatch, tmp_path, shapes):
    """Real runs: one arm of a new entry, one whose loss explodes, one plain."""
    monkeypatch.setattr(compare, "launch", Forked)
    monkeypatch.setitem(feedforward.FEED_FORWARDS, "twice", Twice)
    arms = ARMS.replace("gated", "twice").replace('"geglu"', '"twice"').replace("hidden = 32", "factor = 0.25")
    arms += '[[arms]]\nname = "explodes"\nidea = "A learning rate without measure."\noptimizer.params.lr = 1e30\n'
    code, out, err = ask(COMMON.replace("seeds = 2", "seeds = 1") + arms)
    assert "missing: explodes" in err, out + err
    text, data = report(tmp_path)
    assert code == 1 and list(data["missing"]) == ["explodes-seed0"]
    assert "error: the loss is nan at optimiser step" in data["missing"]["explodes-seed0"]
    plain, twice, _ = data["results"]["validation"]
    assert plain["n"] == twice["n"] == 1 and twice["images_per_second"] > 0 and 0 <= twice["mean"] <= 100
    assert data["dataset"]["fingerprint"] == Dataset.open(shapes).fingerprint and data["arms"]["twice"]["unequal"] == []
    assert "no difference shown: one seed" in text or "the same accuracy with every seed" in text
    seen = data["results"]["validation"][0]["by_seed"]["0"] / 100 * 30
    assert seen == pytest.approx(round(seen)) and str(tmp_path) not in text


def test_ctrl_c_lets_the_runs_save_and_they_go_on(tmp_path, tiny, shapes):
    """The whole way: compare.py as a program, the launcher, DeepSpeed's launcher, train.py."""
    (tmp_path / "tiny.toml").write_text(tiny.read_text())
    (tmp_path / "gates.toml").write_text(COMMON.replace("steps = 6", "steps = 100000").replace("seeds = 2", "seeds = 1") + ARMS)
    command = [sys.executable, str(ROOT / "compare.py"), "gates.toml", "--data-dir", str(shapes), "--runs-dir", "runs", "--results-dir", "results"]
    child = subprocess.Popen(command, cwd=tmp_path, env=programs.clean_environment(), text=True, start_new_session=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/gates/*/metrics.jsonl")):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()[0] if child.poll() is not None else "too slow"
        time.sleep(0.1)
    below = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    (metrics,) = tmp_path.glob("runs/gates/*/metrics.jsonl")
    record = RunRecord(metrics.parent)
    assert child.returncode == 75 and "stopping: 1 run(s) save first" in out and "start the same comparison again" in out, out
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in below)
    assert "and saved; start the same run again" in metrics.parent.with_name(f"{metrics.parent.name}.log").read_text()
    saved = int(record.newest_checkpoint().name.removeprefix("step-"))
    assert saved >= 4 and RunRecord.read_progress(record.newest_checkpoint()).epoch >= 1
