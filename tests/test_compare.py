"""compare.py: experiment files, errors before the first run, and which runs are made, reused and stopped."""

from __future__ import annotations

import os
import re
import signal
from types import SimpleNamespace

import pytest
from comparisons import COMMON, VARIANTS, Ended, report, write_run
from project_files import project_files
from torch import nn

import compare
from common.errors import DatasetError, SettingsError
from common.paths import PROJECT
from common.stop_signal import StopSignal
from common.text import last_error
from comparison import planning
from comparison.experiment_file import read
from comparison.matching import match_sizes
from comparison.paired_tests import seeds_needed
from comparison.planned_run import PlannedRun
from comparison.planning import Data, make_task
from comparison.run_queue import run_all
from comparison.time_budget import COMPILING, steps_for
from comparison.variant_costs import cost_of, costs
from config.settings import ResizingSettings
from image_data.preparation.prepare import prepare
from models import feed_forward as feedforward
from parallel.compile import CPU_IMAGES, FIRST_STEPS
from records.run_folder import RunFolder

EXPERIMENTS = [PROJECT / name for name in project_files(".toml") if name.startswith("experiments/")]
OTHER_QUESTIONS = ("attention-defaults", "space-to-depth")  # besides the eight ideas and the recipes


# --- experiment files of the project ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_can_be_planned_at_both_sizes(path, size):
    experiment = match_sizes(read(path, size), num_classes=100, image_side=32)
    found = costs(experiment, num_classes=100, image_side=32)
    assert len(found) == len(experiment.variants) and all(cost.parameters > 0 and cost.flops > 0 for cost in found)
    if size == "full":  # the first system's network, and enough seeds to confirm something
        for variant, cost in zip(experiment.variants, found, strict=True):
            assert variant.name != "mlp" or cost.parameters == 4_417_608
        assert experiment.seeds >= seeds_needed(len(experiment.variants) - 1)


def test_all_eight_ideas_are_in_one_experiment():
    variants = {variant.name for variant in read(PROJECT / "experiments" / "eight-ideas.toml").variants}
    ideas = [path for path in EXPERIMENTS if "recipe" not in path.name and path.stem not in OTHER_QUESTIONS]
    others = {variant.name for path in ideas for variant in read(path).variants} - {"fff-mask"}  # which is fff
    assert len(ideas) == 9 and variants == others


def test_flops_are_those_of_the_matrix_products():
    """An MLP's hidden neuron costs one product in and one out for each of the 64 tokens, each C multiply-adds of 2."""
    experiment = read(PROJECT / "experiments" / "hidden-size.toml", "small")
    usual, small = costs(experiment, 100, 32)
    assert usual.flops - small.flops == 2 * (4 * 128 - 256) * 64 * 128 * 2 * 2
    assert usual.parameters - small.parameters == 2 * (4 * 128 - 256) * (2 * 128 + 1)


def test_the_flops_of_a_run_count_the_smaller_images_of_its_first_steps():
    experiment = read(PROJECT / "experiments" / "hidden-size.toml", "small")
    variant = experiment.variants[0]
    plain = cost_of(variant, 100, 32)
    variant.settings.resizing = ResizingSettings(initial_scale=0.5, fraction=0.25)
    cost = cost_of(variant, 100, 32)
    assert plain.training_flops(100, 400, 8) == 3 * 8 * 100 * plain.flops and cost.flops == plain.flops
    # The matrix products and convolutions act on a quarter of the tokens; the products of attention on a sixteenth.
    assert 0.2 < cost.initial_flops / cost.flops < 0.26
    assert cost.training_flops(100, 400, 8) == 3 * 8 * 100 * cost.initial_flops
    assert cost.training_flops(101, 400, 8) == 3 * 8 * (100 * cost.initial_flops + cost.flops)


def test_a_planned_run_asks_for_the_resizing_of_its_preset_so_that_no_variant_trains_without():
    experiment = read(PROJECT / "experiments" / "space-to-depth.toml", "small")
    experiment.variants[0].settings.resizing = ResizingSettings(initial_scale=0.75)
    data = Data(PROJECT, 45_000, 100, 32, None)
    asks = [
        "resizing.initial_scale=0.75" in make_task(experiment, v, 0, data, PROJECT, 400).arguments
        for v in experiment.variants
    ]
    assert asks == [True, False]


# --- bad experiment files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            COMMON + VARIANTS.replace("geglu", "gegul"),
            "variant 'gated': unknown feed-forward 'gegul'; did you mean 'geglu'?",
        ),
        (
            COMMON + VARIANTS.replace("hidden", "hiden"),
            "variant 'gated': feed_forward=geglu: unknown option 'hiden'; did you mean 'hidden'?",
        ),
        (
            COMMON + VARIANTS.replace("model.feed_forward =", "model.feedforward ="),
            "gates.toml, variant 'gated': unknown setting 'model.feedforward'",
        ),
        (COMMON + "model.widht = 3\n" + VARIANTS, "error: gates.toml: unknown setting 'model.widht'"),
        ("seedz = 3\n" + COMMON + VARIANTS, "error: gates.toml: unknown key 'seedz'; did you mean 'seeds'?"),
        ("lr = 3\n" + COMMON + VARIANTS, "gates.toml: unknown key 'lr'; did you mean 'optimizer.params.lr'?"),
        (COMMON + VARIANTS + 'idae = "x"\n', "variant 'gated': unknown key 'idae'; did you mean 'idea'?"),
        (COMMON + VARIANTS + "[sizes.small]\nseedz = 3\n", "[sizes.small]: unknown key 'seedz'; did you mean 'seeds'?"),
        (
            COMMON + VARIANTS + "[sizes.small]\nvariants.gated.mach = 'none'\n",
            "variant 'gated', this size: unknown key 'mach'; did you mean 'match'?",
        ),
        (
            COMMON + VARIANTS.replace("32", '"32"'),
            "variant 'gated': feed_forward=geglu: option hidden must be of type int",
        ),
        (COMMON + "epochs = 3\n" + VARIANTS, "give exactly one budget (epochs, steps, seconds), not epochs and steps"),
        (COMMON.replace("steps = 6", "") + VARIANTS, "give exactly one budget (epochs, steps, seconds), not none"),
        (COMMON.replace("6", "0") + VARIANTS, "steps must be a whole number above 0, not 0"),
        (COMMON + VARIANTS + "epochs = 3\n", "variant 'gated': epochs is the same for all variants"),
        (
            COMMON + VARIANTS.replace("gated", "plain"),
            "every variant needs its own name of up to 100 letters, digits, '.', '_' and '-', not 'plain'",
        ),
        (COMMON + VARIANTS.replace('"gated"', '"a/b"'), "not 'a/b'"),
        (COMMON + VARIANTS.replace("gated", "x" * 101), "up to 100 letters"),
        (COMMON + VARIANTS[: VARIANTS.index("model")], "the variants 'plain' and 'gated' have the same settings"),
        (COMMON + VARIANTS[: VARIANTS.rindex("[[")], "a comparison needs at least two [[variants]]"),
        (COMMON + VARIANTS.replace('idea = "A gate."', ""), "variant 'gated': state the idea in one sentence"),
        (COMMON + "hold_out = 0.0\n" + VARIANTS, "hold_out=0 leaves no validation split to compare variants on"),
        (COMMON.replace("seeds = 2", "seeds = 0") + VARIANTS, "seeds must lie between 1 and 1000, not 0"),
        (COMMON.replace("tiny.toml", "tinny") + VARIANTS, "unknown preset 'tinny'"),
        (COMMON + 'schedule.shape = "cosin"\n' + VARIANTS, "error: gates.toml: unknown schedule.shape 'cosin'"),
        (COMMON + "train_batch_size = 512\n" + VARIANTS, "train_batch_size=512 is more than the 270 training images"),
        (
            COMMON + VARIANTS + "[sizes.small]\nvariants.gatd.model.width = 3\n",
            "unknown variant 'gatd'; did you mean 'gated'?",
        ),
        ("experiment = ", "gates.toml is not valid TOML"),
        ("sizes = 3\n" + COMMON + VARIANTS, "[sizes] must be a table, not 3"),
        ("variants = [1, 2]\n" + COMMON, "each of [[variants]] must be a table, not 1"),
        (COMMON + VARIANTS.replace('"gated"', "{ a = 1 }"), "not {'a': 1}"),
        (COMMON + VARIANTS + "[sizes.small]\nvariants.gated = 3\n", "variants.gated of a size must be a table, not 3"),
        (COMMON + "arms = []\n" + VARIANTS, "[[arms]] is the former name of variants; use one of the two names"),
        (COMMON.replace("steps = 6", "seconds = inf") + VARIANTS, "seconds must be a number above 0, not inf"),
        (COMMON + "model.dropout = nan\n" + VARIANTS, "model.dropout must be a finite number, not nan"),
        (COMMON + 'match = "parameter"\n' + VARIANTS, "unknown match 'parameter'; did you mean 'parameters'?"),
        (COMMON + 'match = "seconds"\n' + VARIANTS, 'match = "seconds" is a budget; use seconds = N'),
        (COMMON + VARIANTS + 'match = "flops"\n', "variant 'gated': match must be \"none\" here"),
        (COMMON + "margin = -1\n" + VARIANTS, "margin must be a number of points between 0 and 100, not -1"),
        (COMMON + 'margin = "1"\n' + VARIANTS, "margin must be a number without quotes, not '1'"),
        ('max_runs = "9"\n' + COMMON + VARIANTS, "max_runs must be a whole number without quotes, not '9'"),
        ("evaluate_every = 3\n" + COMMON + VARIANTS, "evaluate_every must be a text in quotes, not 3"),
        (COMMON.replace("6", '"6"') + VARIANTS, "steps must be a whole number above 0 without quotes, not '6'"),
        (COMMON.replace('question = "Is a gate better?"', "") + VARIANTS, "question is missing"),
    ],
)
def test_a_mistake_ends_everything_before_the_first_run(ask, invented, tmp_path, text, sentence):
    code, _, err = ask(text)
    assert code == 1 and sentence in err and err.startswith("error: ") and err.count("\n") == 1
    assert not invented.started and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["..toml", "...toml", "a\nb.toml"])
def test_the_name_of_an_experiment_file_must_be_that_of_a_folder(tmp_path, name):
    (tmp_path / name).write_text(COMMON + VARIANTS)
    with pytest.raises(SettingsError, match="the name of an experiment must .*; rename the file"):
        read(tmp_path / name)


def test_a_size_that_is_not_there_is_named(ask, invented):
    assert (
        "unknown size 'ful'; did you mean 'full'?"
        in ask(COMMON + VARIANTS + "[sizes.full]\nseeds = 3\n", "--size", "ful")[2]
    )
    assert "it has no table [sizes]" in ask(COMMON + VARIANTS, "--size", "full")[2]


def test_an_override_beats_the_file_and_its_size_and_a_variant_beats_all(tmp_path):
    file = tmp_path / "sizes.toml"
    text = COMMON.replace("tiny.toml", "cpu-quick") + VARIANTS.replace("gated", "narrow").replace('"geglu"', '"mlp"')
    file.write_text(f"model.width = 64\n{text}model.width = 48\n[sizes.small]\nmodel.width = 96\n")
    assert [variant.settings.model.width for variant in read(file, "small").variants] == [96, 48]
    overrides = ["model.width=144"]
    assert [variant.settings.model.width for variant in read(file, "small", None, overrides).variants] == [144, 48]


def test_options_of_the_file_for_a_part_that_a_variant_replaces_are_named(ask, invented, tmp_path):
    text = COMMON + "model.feed_forward_options.hidden = 64\n" + VARIANTS.replace("options.hidden = 32", "options = {}")
    code, out, _ = ask(text.replace("model.feed_forward_options = {}\n", ""), "--dry-run")
    assert code == 0 and "'gated' names another part" in out and ": model.feed_forward_options.hidden=64\n" in out
    plain, gated = read(tmp_path / "gates.toml").variants
    assert plain.settings.model.feed_forward_options == {"hidden": 64} and plain.left_out == ()
    assert gated.settings.model.feed_forward_options == {}


def test_a_part_with_a_bug_is_found_before_anything_runs(ask, invented, monkeypatch):
    class Broken(nn.Module):
        """Loses half of the channels."""

        def __init__(self, dims):
            super().__init__()

        def forward(self, x):
            return x[..., ::2]

    monkeypatch.setitem(feedforward.FEED_FORWARDS, "broken", Broken)
    code, _, err = ask(
        COMMON + VARIANTS.replace('"geglu"', '"broken"').replace("model.feed_forward_options.hidden = 32", "")
    )
    assert code == 1 and "variant 'gated' cannot be built: RuntimeError" in err and not invented.started


# --- runs ----------------------------------------------------------------------------------------------------------


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


def test_a_run_that_diverged_is_not_repeated_until_its_source_changes(ask, invented, monkeypatch, tmp_path):
    """An edit after the divergence does not mix two versions of the source: without --redo-changed nothing is run."""

    def diverging(task, environment):
        if task.name == "gated-seed1":
            write_run(task, 0.5, 1000.0, {}, done=False)
            invented.fails["gated-seed1"] = (
                "error: the loss is nan at optimizer step 1; the last checkpoint is unchanged."
            )
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", diverging)
    code, _, err = ask()
    assert code == 1 and "missing: gated-seed1: error: the loss is nan" in err and len(invented.started) == 4
    invented.started.clear()
    assert ask()[0] == 1 and not invented.started
    folder = RunFolder(tmp_path / "runs" / "gates" / "gated-seed1")
    folder.create(folder.facts() | {"code": {"fingerprint": "1", "files": {"models/feed_forward.py": "another"}}})
    assert ask()[0] == 1 and not invented.started
    monkeypatch.setattr(compare, "launch", invented)
    invented.fails.clear()
    assert ask(COMMON + VARIANTS, "--redo-changed")[0] == 0 and invented.started == ["gated-seed1"]


def test_a_preset_that_is_edited_meanwhile_stops_the_comparison(ask, invented, monkeypatch, tmp_path):
    def editing(task, environment):
        child = invented(task, environment)
        preset = tmp_path / "tiny.toml"
        preset.write_text(preset.read_text().replace("epochs = ", "ema.decay = 0.5\nepochs = "))
        return child

    monkeypatch.setattr(compare, "launch", editing)
    code, out, err = ask()
    assert code == 1 and len(invented.started) == 1 and "3 run(s) are not started: the preset or ds_config.json" in out
    assert "ema.decay was 0.0, is 0.5" in err and "--redo-changed" in err


def test_a_run_that_ends_with_0_unfinished_counts_as_failed(tmp_path, signals):
    tasks = [PlannedRun(f"run{i}", tmp_path / f"run{i}", [], {}) for i in range(2)]

    def start(task, environment):
        record = RunFolder(task.folder)
        record.create({"total_steps": 6})
        (task.folder / "state" / f"step-0000000{6 if task is tasks[0] else 3}").mkdir(parents=True)
        return Ended(0)

    failures = run_all(tasks, [{}], StopSignal(), start)
    assert failures == {"run1": "ended with exit code 0 and no output"}


def test_files_with_the_former_key_arms_are_read(ask, invented, tmp_path):
    text = (
        COMMON
        + VARIANTS.replace("variants", "arms")
        + "[sizes.small]\narms.gated.model.feed_forward_options.hidden = 33\n"
    )
    assert ask(text, "--dry-run")[0] == 0
    _, gated = read(tmp_path / "gates.toml").variants
    assert gated.name == "gated" and gated.settings.model.feed_forward_options == {"hidden": 33}


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


def test_an_override_that_would_not_be_used_is_refused(ask, invented):
    for text, instead in (("epochs=7", "set epochs in the experiment file"), ("seeds=9", "use --seeds")):
        code, _, err = ask(COMMON + VARIANTS, "--set", text)
        assert code == 1 and f"--set {text} has no effect on a comparison; {instead}" in err and not invented.started


def test_code_that_changes_between_two_seeds_is_refused_or_redone(ask, invented, monkeypatch, tmp_path):
    """A variant never has runs of two versions of the source; an edit after all runs is no reason to run them again."""
    assert ask()[0] == 0
    for name in ("gated-seed0", "plain-seed1"):
        folder = RunFolder(tmp_path / "runs" / "gates" / name)
        facts = folder.facts()
        facts["code"]["files"]["models/feed_forward.py"] = "another"
        folder.create(facts)
        invented.started.clear()
        code, _, err = ask(COMMON + VARIANTS, "--seeds", "3")
        assert code == 1 and not invented.started and err.count("\n") == 1
        assert f"'models/feed_forward.py' changed after {name} was started" in err and "--redo-changed" in err
        code, _, err = ask(COMMON + VARIANTS, "--report-only")
        assert code == 1 and "mixes two versions of the source code" in err and "'models/feed_forward.py'" in err
        assert ask(COMMON + VARIANTS, "--redo-changed")[0] == 0 and invented.started == [name]
    monkeypatch.setattr("records.provenance.digest_of", lambda path: "edited later")
    invented.started.clear()
    assert ask()[0] == 0 and not invented.started
    code, _, err = ask(COMMON + VARIANTS, "--seeds", "3")
    assert code == 1 and "changed after" in err


def test_an_edit_while_a_comparison_is_running_ends_it_before_the_next_run(ask, invented, monkeypatch):
    def start(task, environment):
        child = invented(task, environment)
        monkeypatch.setattr("records.provenance.digest_of", lambda path: "edited meanwhile")
        return child

    monkeypatch.setattr(compare, "launch", start)
    code, out, err = ask()
    (first,) = invented.started
    assert code == 1 and f"'train.py', 'models/feed_forward.py' changed after {first} was started" in err
    assert "3 run(s) are not started" in out and err.count("missing: ") == 3


def test_runs_that_do_not_record_their_source_are_not_mixed_with_new_ones(ask, invented, tmp_path):
    assert ask()[0] == 0
    for name in ("gated-seed0", "gated-seed1", "plain-seed0", "plain-seed1"):
        folder = RunFolder(tmp_path / "runs" / "gates" / name)
        folder.create({key: value for key, value in folder.facts().items() if key != "code"})
    assert ask(COMMON + VARIANTS, "--report-only")[0] == 0 and ask()[0] == 0
    code, _, err = ask(COMMON + VARIANTS, "--seeds", "3")
    assert code == 1 and "does not record its source" in err


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nerror: no\nTraining failed (exit code 1).\n", "error: no"),
        ("Traceback\n  File /a/b/c.py\ntorch.OutOfMemoryError: 3 GiB\nbye\n", "torch.OutOfMemoryError: 3 GiB"),
        ("[rank0]:   File a.py\n[rank0]: OSError: no\n[rank0]:[W1 A.cpp:1] Warning: not called\n", "OSError: no"),
        ("hello\nKilled\n", "Killed"),
        ("", None),
    ],
)
def test_the_last_error_of_a_log(log, line):
    assert last_error(log) == line


def test_a_budget_in_seconds_becomes_steps_for_each_variant(ask, invented, tmp_path):
    assert steps_for(60, (20, 3.0), (120, 8.0)) == round((60 - 2) / 0.05)  # 2 s to start, then 0.05 s a step
    invented.speed = {"gated": 500.0, "plain": 2000.0}
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    assert "the speed of each variant is measured first" in ask(text, "--dry-run")[1] and not invented.started
    assert ask(text)[0] == 0
    steps = {
        name: RunFolder(tmp_path / "runs" / "gates" / f"{name}-seed1").facts()["max_steps"]
        for name in ("plain", "gated")
    }
    assert steps == {"plain": round(59.5 * 2000 / 64), "gated": round(59.5 * 500 / 64)}
    text, data = report(tmp_path)
    assert all(variant["unequal"] == [] for variant in data["arms"].values()) and "60 seconds" in text
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + VARIANTS, "--report-only")[0] == 0


@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_budget_in_seconds_is_measured_compiled_where_long_runs_are_compiled(
    ask, invented, monkeypatch, tmp_path, has_compiler
):
    """In bf16 on a CPU, 60 s at 4,000 images/s are more than CPU_IMAGES, at 2,000 they are less."""

    def start(task, environment):
        is_compiled = task.expected["settings"]["compile"] == "on"
        if is_compiled and not has_compiler:
            invented.fails[task.name] = "error: compile=on: torch.compile does not work on this machine"
        invented.facts[task.name] = {"precision": "bf16"}
        invented.speed = {"gated": 2000.0, "plain": 4000.0}
        if task.name == "calibration-plain-compiled":
            invented.speed = {"plain": 8000.0}
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", start)
    assert COMPILING[0] == FIRST_STEPS["on"] and 60 * 2000 < CPU_IMAGES < 59 * 4000
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    assert ask(text)[0] == 0
    measured = {name for name in invented.started if "calibration" in name and "short" not in name}
    assert measured == {"calibration-gated-long", "calibration-plain-long", "calibration-plain-compiled"}
    steps = RunFolder(tmp_path / "runs" / "gates" / "plain-seed0").facts()["max_steps"]
    assert (steps > 1.2 * 60 * 4000 / 64) is has_compiler
    invented.started.clear()
    assert ask(text)[0] == 0 and not invented.started


def test_a_budget_in_seconds_is_refused_where_runs_share_a_device(ask, invented, monkeypatch):
    text = COMMON.replace("steps = 6", "seconds = 60") + VARIANTS
    for parallel in ("auto", "2"):
        code, _, err = ask(text, "--parallel", parallel)
        assert code == 1 and not invented.started and "leave out --parallel" in err
    assert ask(text, "--parallel", "1", "--dry-run")[0] == 0
    monkeypatch.setattr(compare, "visible_gpus", lambda: ["0", "1"])
    assert ask(text, "--parallel", "2", "--dry-run")[0] == 0
    assert ask(text, "--parallel", "3", "--dry-run")[0] == 1


def test_a_budget_in_seconds_that_was_missed_is_named(ask, invented, monkeypatch, tmp_path):
    def slower(task, environment):
        if task.name.startswith("gated-seed"):
            invented.speed["gated"] = 700.0
        return invented(task, environment)

    monkeypatch.setattr(compare, "launch", slower)
    assert ask(COMMON.replace("steps = 6", "seconds = 60") + VARIANTS)[0] == 0
    assert report(tmp_path)[1]["arms"]["gated"]["unequal"] == ["training seconds: 86 on average instead of 60"]
