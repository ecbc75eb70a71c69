"""A comparison never mixes runs of two versions of the source or of a preset."""

from __future__ import annotations

from comparisons import COMMON, VARIANTS, write_run

import compare
from records.run_folder import RunFolder


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
