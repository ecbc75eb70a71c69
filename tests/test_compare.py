"""compare.py: the questions, what is refused before anything runs, and which runs are made, reused and stopped."""

from __future__ import annotations

import os
import re
import signal

import pytest
from comparisons import ARMS, COMMON, report
from torch import nn

import compare
from common.paths import PROJECT
from common.stop_signal import StopSignal
from common.text import last_error
from comparison.experiment import read
from comparison.run_queue import PlannedRun, run_all
from comparison.time_budget import steps_for
from comparison.variant_costs import costs
from models import feed_forward as feedforward
from records.run_folder import RunFolder

QUESTIONS = sorted((PROJECT / "experiments").glob("*.toml"))


# --- the questions that come with the project ---------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("path", QUESTIONS, ids=lambda path: path.stem)
def test_every_question_can_be_asked_at_both_sizes(path, size):
    experiment = read(path, size)
    found = costs(experiment, num_classes=100, image_side=32)
    assert len(found) == len(experiment.variants) and all(cost.parameters > 0 and cost.flops > 0 for cost in found)
    if size == "full":  # the first system's network, and seeds that can show something
        assert all(
            cost.parameters == 4_417_608
            for arm, cost in zip(experiment.variants, found, strict=True)
            if arm.name == "mlp"
        )
        assert compare.power_note(experiment.seeds, len(experiment.variants)) is None


def test_all_eight_ideas_are_in_one_question():
    arms = {arm.name for arm in read(PROJECT / "experiments" / "eight-ideas.toml").variants}
    ideas = [path for path in QUESTIONS if "recipe" not in path.name]
    others = {arm.name for path in ideas for arm in read(path).variants} - {"fff-mask"}  # which is fff
    assert len(ideas) == 9 and arms == others


def test_flops_are_those_of_the_products():
    """An MLP's hidden neuron costs one product in and one out for each of the 64 tokens, each C multiply-adds of 2."""
    experiment = read(PROJECT / "experiments" / "hidden-size.toml", "small")
    usual, small = costs(experiment, 100, 32)
    assert usual.flops - small.flops == 2 * (4 * 128 - 256) * 64 * 128 * 2 * 2
    assert usual.parameters - small.parameters == 2 * (4 * 128 - 256) * (2 * 128 + 1)


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (COMMON + ARMS.replace("geglu", "gegul"), "arm 'gated': unknown feed-forward 'gegul'; did you mean 'geglu'?"),
        (
            COMMON + ARMS.replace("hidden", "hiden"),
            "arm 'gated': feed_forward=geglu: unknown option 'hiden'; did you mean 'hidden'?",
        ),
        (
            COMMON + ARMS.replace("model.feed_forward =", "model.feedforward ="),
            "gates.toml, arm 'gated': unknown setting 'model.feedforward'",
        ),
        (COMMON + "model.widht = 3\n" + ARMS, "arm 'plain': unknown setting 'model.widht'"),
        (COMMON + ARMS.replace("32", '"32"'), "arm 'gated': feed_forward=geglu: option hidden must be of type int"),
        (COMMON + "epochs = 3\n" + ARMS, "give exactly one budget (epochs, steps, seconds), not epochs and steps"),
        (COMMON.replace("steps = 6", "") + ARMS, "give exactly one budget (epochs, steps, seconds), not none"),
        (COMMON.replace("6", "0") + ARMS, "steps must be a whole number above 0, not 0"),
        (COMMON + ARMS + "epochs = 3\n", "arm 'gated': epochs is the same for all arms"),
        (COMMON + ARMS.replace("gated", "plain"), "every arm needs a name of its own"),
        (COMMON + ARMS.replace('"gated"', '"a/b"'), "not 'a/b'"),
        (COMMON + ARMS[: ARMS.index("model")], "the arms 'plain' and 'gated' have the same settings"),
        (COMMON + ARMS[: ARMS.rindex("[[")], "a comparison needs at least two [[arms]]"),
        (COMMON + ARMS.replace('idea = "A gate."', ""), "arm 'gated': say in one sentence what the idea is"),
        (COMMON + "hold_out = 0.0\n" + ARMS, "hold_out=0 leaves nothing to compare arms on"),
        (COMMON.replace("seeds = 2", "seeds = 21") + ARMS, "seeds must lie between 1 and 20, not 21"),
        (COMMON.replace("tiny.toml", "tinny") + ARMS, "unknown preset 'tinny'"),
        (COMMON + 'schedule.shape = "cosin"\n' + ARMS, "arm 'plain': unknown schedule.shape 'cosin'"),
        (COMMON + "train_batch_size = 512\n" + ARMS, "train_batch_size=512 is more than the 270 training images"),
        (COMMON + ARMS + "[sizes.small]\narms.gatd.model.width = 3\n", "unknown arm 'gatd'; did you mean 'gated'?"),
        ("experiment = ", "gates.toml is not valid TOML"),
    ],
)
def test_a_mistake_ends_everything_before_the_first_run(ask, invented, tmp_path, text, sentence):
    code, _, err = ask(text)
    assert code == 1 and sentence in err and err.startswith("error: ") and err.count("\n") == 1
    assert not invented.started and not (tmp_path / "runs").exists()


def test_a_size_that_is_not_there_is_named(ask, invented):
    assert (
        "unknown size 'ful'; did you mean 'full'?"
        in ask(COMMON + ARMS + "[sizes.full]\nseeds = 3\n", "--size", "ful")[2]
    )
    assert "it has no table [sizes]" in ask(COMMON + ARMS, "--size", "full")[2]


def test_a_part_with_a_bug_is_found_before_anything_runs(ask, invented, monkeypatch):
    class Broken(nn.Module):
        """Loses half of the channels."""

        def __init__(self, dims):
            super().__init__()

        def forward(self, x):
            return x[..., ::2]

    monkeypatch.setitem(feedforward.FEED_FORWARDS, "broken", Broken)
    code, _, err = ask(
        COMMON + ARMS.replace('"geglu"', '"broken"').replace("model.feed_forward_options.hidden = 32", "")
    )
    assert code == 1 and "arm 'gated' cannot be built: RuntimeError" in err and not invented.started


# --- which runs are made ------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_plan_and_makes_nothing(ask, invented, tmp_path):
    code, out, _ = ask(COMMON + ARMS, "--dry-run")
    assert code == 0 and not invented.started and not (tmp_path / "runs").exists()
    assert (
        "2 arms x 2 seeds, 6 steps each" in out
        and "A gate." in out
        and "with 2 seeds no arm can be called better or worse" in out
    )
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
    newest = RunFolder(tmp_path / "runs" / "gates" / "gated-seed1").newest_checkpoint()
    newest.rename(newest.with_name("step-00000003"))
    invented.started.clear()
    code, out, _ = ask(COMMON + ARMS, "--seeds", "3")
    assert code == 0 and "3 of 6 runs are finished already" in out
    assert sorted(invented.started) == ["gated-seed1", "gated-seed2", "plain-seed2"]
    invented.started.clear()
    assert ask(COMMON + ARMS, "--report-only")[0] == 0 and not invented.started


def test_shards_make_every_run_once_and_the_last_one_reports(ask, invented, tmp_path):
    def runs_of(i, count):
        return re.findall(
            r"(\S+-seed\d): new", ask(COMMON + ARMS, "--seeds", "4", "--shard", f"{i}/{count}", "--dry-run")[1]
        )

    for i in (1, 2):  # on two machines of different speeds, both arms on each
        assert sorted(name[:5] for name in runs_of(i, 2)) == ["gated", "gated", "plain", "plain"]
    planned = [runs_of(i, 3) for i in (1, 2, 3)]
    assert [len(names) for names in planned] == [3, 3, 2]
    for i, left in ((3, 6), (1, 3)):
        code, out, _ = ask(COMMON + ARMS, "--seeds", "4", "--shard", f"{i}/3")
        assert code == 0 and f"{left} run(s) of others are not" in out
    assert invented.started == planned[2] + planned[0] and not (tmp_path / "results").exists()
    assert ask(COMMON + ARMS, "--seeds", "4", "--shard", "2/3")[0] == 0
    assert sorted(invented.started) == sorted(planned[0] + planned[1] + planned[2]) and len(set(invented.started)) == 8
    assert report(tmp_path)[1]["missing"] == {}


def test_a_shard_names_its_failures_and_a_budget_in_seconds_is_not_shared(ask, invented, tmp_path):
    invented.fails["gated"] = "error: the loss is nan"
    codes = [ask(COMMON + ARMS, "--shard", f"{i}/2") for i in (1, 2)]
    assert any(code == 1 and "missing: gated-seed" in err for code, _, err in codes) and len(invented.started) == 4
    assert "speeds must be measured" in ask(COMMON.replace("steps = 6", "seconds = 60") + ARMS, "--shard", "1/2")[2]
    for wrong in ("3/2", "0/2", "1", "1/0"):
        with pytest.raises(SystemExit):
            ask(COMMON + ARMS, "--shard", wrong)


def test_runs_of_other_settings_are_refused_or_set_aside(ask, invented, tmp_path):
    ask()
    invented.started.clear()
    changed = COMMON + ARMS.replace("32", "40")
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


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nerror: no\nTraining failed (exit code 1).\n", "error: no"),
        ("Traceback\n  File /a/b/c.py\ntorch.OutOfMemoryError: 3 GiB\nbye\n", "torch.OutOfMemoryError: 3 GiB"),
        ("hello\nKilled\n", "Killed"),
        ("", None),
    ],
)
def test_the_last_error_of_a_log(log, line):
    assert last_error(log) == line


def test_a_budget_in_seconds_becomes_steps_for_each_arm(ask, invented, tmp_path):
    assert steps_for(60, (20, 3.0), (120, 8.0)) == round((60 - 2) / 0.05)  # 2 s to start, then 0.05 s a step
    invented.speed = {"gated": 500.0, "plain": 2000.0}
    text = COMMON.replace("steps = 6", "seconds = 60") + ARMS
    assert "speed is measured first" in ask(text, "--dry-run")[1] and not invented.started
    assert ask(text)[0] == 0
    steps = {
        arm: RunFolder(tmp_path / "runs" / "gates" / f"{arm}-seed1").facts()["max_steps"] for arm in ("plain", "gated")
    }
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
