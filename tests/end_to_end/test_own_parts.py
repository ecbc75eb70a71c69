"""User-defined parts from training to evaluation: two processes, a changed file, a lost file, and experiments."""

from __future__ import annotations

import shutil
from pathlib import Path

import programs
from small_runs import STOPPED

from inference.trained_model import TrainedModel
from records.own_part_files import copies_of, with_digests
from records.run_folder import RunFolder

PART = """\
from torch import nn
import helper


class Part(nn.Module):
    \"\"\"A scaled linear map.\"\"\"

    def __init__(self, dims, size: int = 8):
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(dims.width, size), nn.Linear(size, dims.width))

    def forward(self, x):
        return helper.FACTOR * self.maps(x)
"""
VARIANTS = """
[[variants]]
name = "first"
idea = "A part."
model.feed_forward = "a/mine.py:Part"
[[variants]]
name = "larger"
idea = "The same part with another size."
model.feed_forward = "a/mine.py:Part"
model.feed_forward_options.size = 16
[[variants]]
name = "other"
idea = "A part of another file of that name."
model.feed_forward = "b/mine.py:Part"
"""


def write_part(folder: Path, factor: float) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(PART)
    (folder / "helper.py").write_text(f"FACTOR = {factor}\n")
    return folder


def test_a_run_of_own_parts_needs_their_files_unchanged_to_resume_and_not_at_all_to_evaluate(training, runs, tmp_path):
    own, network = write_part(tmp_path / "my parts", 1.0), write_part(tmp_path / "other", 2.0)
    words = [*training, "--name", "own", "--max-steps", "8", "--strategy"]
    parts = ["--set", f"model.feed_forward={own}/mine.py:Part", "--set", f"model.attention={network}/mine.py:Part"]
    programs.run_ranks(2, "train.py", *words, "zero", *parts, "--stop-at", "3", code=STOPPED)
    record = RunFolder(runs / "own")
    kept = {f"{own}/mine.py": "own_parts/2/mine.py", f"{network}/mine.py": "own_parts/1/mine.py"}
    assert record.facts()["own_parts"] == kept
    assert sum(path.endswith(("mine.py", "helper.py")) for path in record.facts()["code"]["files"]) == 4

    write_part(own, 3.0)
    assert (
        "the code has changed since the run started: " in programs.run("train.py", *words, "ddp", *parts, code=1).text
    )
    said = programs.run_ranks(2, "train.py", *words, "ddp", *parts, "--allow-inexact-resume")[0].text
    assert "resuming  after step 3 of 8" in said and "my parts/helper.py" in said
    assert (record.folder / "own_parts" / "2" / "helper.py").read_text() == "FACTOR = 3.0\n"
    before = record.folder / "own_parts.before-step-00000003" / "2" / "helper.py"
    assert before.read_text() == "FACTOR = 1.0\n"

    for folder in (own, network):
        shutil.rmtree(folder)
    moved = record.folder.rename(tmp_path / "moved")
    line = RunFolder(moved).metrics()[-1]
    done = programs.run("evaluate.py", moved)
    assert f"({line['test_correct']}/{line['test_seen']})" in done.out
    network_here = TrainedModel.open(moved).network()
    assert "own_parts" in str(network_here[1].feed_forward.part.forward.__code__.co_filename)


def test_an_experiment_compares_parts_of_one_file_and_of_files_of_one_name(ask, tmp_path):
    for folder, factor in (("a", 1.0), ("b", 2.0)):
        write_part(tmp_path / folder, factor)
    common = 'question = "Which part?"\npreset = "tiny.toml"\nsteps = 6\nseeds = 2\n'
    code, out, err = ask(common + VARIANTS, "--dry-run")
    assert code == 0, err
    assert all(f"{name}-seed1" in out for name in ("first", "larger", "other"))
    (tmp_path / "b" / "helper.py").write_text("FACTOR = 1 / 0\n")
    code, out, err = ask(common + VARIANTS, "--dry-run")
    assert code == 1 and "variant 'other': " in err and "ZeroDivisionError: division by zero (helper.py, line 1)" in err


def test_runs_and_experiments_print_the_warnings_of_a_part_and_continue(training, ask, tmp_path):
    for folder in ("a", "b"):
        (write_part(tmp_path / folder, 1.0) / "mine.py").write_text(
            PART.replace("self.maps(x)", "self.maps(x).detach()")
        )
    text = "no gradient reaches the parameters 'maps.0.weight', "
    words = [
        *training,
        "--name",
        "warned",
        "--max-steps",
        "1",
        "--set",
        f"model.feed_forward={tmp_path}/a/mine.py:Part",
    ]
    said = programs.run("train.py", *words).text
    assert said.count(text) == 1 and f"warning   model.feed_forward={tmp_path}/a/mine.py:Part" in said
    common = 'question = "Which part?"\npreset = "tiny.toml"\nsteps = 6\nseeds = 2\n'
    code, out, err = ask(common + VARIANTS, "--dry-run")
    assert code == 0, err
    assert out.count(text) == 3 and "warning: variant 'larger': model.feed_forward=" in out


def test_equal_files_have_equal_digests_on_every_machine(tmp_path):
    here, there = (
        {"model": {"feed_forward": f"{write_part(tmp_path / name, 1.0)}/mine.py:Part"}} for name in ("a", "b")
    )
    assert with_digests(here) == with_digests(there) and copies_of(here) != copies_of(there)
    write_part(tmp_path / "b", 2.0)
    assert with_digests(here) != with_digests(there)
