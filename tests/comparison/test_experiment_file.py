"""comparison/experiment_file.py and experiment_keys.py: what an experiment file may hold, and its mistakes."""

from __future__ import annotations

import pytest
from comparisons import COMMON, VARIANTS
from torch import nn

from common.errors import SettingsError
from comparison.experiment_file import read
from models import feed_forward as feedforward


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
        (COMMON + "model.dropout = nan\n" + VARIANTS, "model.dropout must be in [0, 1), got nan"),
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


def test_files_with_the_former_key_arms_are_read(ask, invented, tmp_path):
    text = (
        COMMON
        + VARIANTS.replace("variants", "arms")
        + "[sizes.small]\narms.gated.model.feed_forward_options.hidden = 33\n"
    )
    assert ask(text, "--dry-run")[0] == 0
    _, gated = read(tmp_path / "gates.toml").variants
    assert gated.name == "gated" and gated.settings.model.feed_forward_options == {"hidden": 33}


def test_an_override_that_would_not_be_used_is_refused(ask, invented):
    for text, instead in (("epochs=7", "set epochs in the experiment file"), ("seeds=9", "use --seeds")):
        code, _, err = ask(COMMON + VARIANTS, "--set", text)
        assert code == 1 and f"--set {text} has no effect on a comparison; {instead}" in err and not invented.started


def test_a_part_of_a_file_that_is_not_there_is_named_with_the_experiment(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(COMMON + VARIANTS.replace('"geglu"', '"gone.py:Gate"'))
    with pytest.raises(SettingsError, match=r"own.toml: gone.py:Gate: there is no file .*gone.py"):
        read(file)


@pytest.mark.parametrize(("seeds", "fits"), [(0, False), (1, True), (1000, True), (1001, False)])
def test_an_experiment_has_1_to_1000_seeds(tmp_path, seeds, fits):
    file = tmp_path / "many.toml"
    text = COMMON.replace("tiny.toml", "cpu-quick").replace("seeds = 2", f"seeds = {seeds}")
    file.write_text(text + VARIANTS)
    if fits:
        assert read(file).seeds == seeds
    else:
        with pytest.raises(SettingsError, match=f"seeds must lie between 1 and 1000, not {seeds}"):
            read(file)
