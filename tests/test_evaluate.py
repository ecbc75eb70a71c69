"""evaluate.py: the accuracy that training printed, exactly, for every batch size and number of processes; and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from pathlib import Path

import pytest
import torch
from programs import launch, run
from safetensors.torch import load_file, save_file
from small_runs import TEST_PER_CLASS

from benchmarks.lib.forked_programs import Done
from image_data.preparation.prepare import prepare
from records.run_folder import RunFolder

NUM_TEST = 10 * TEST_PER_CLASS


@pytest.fixture
def trained(unbroken, tmp_path) -> RunFolder:
    """A copy of the finished run, to be spoilt; without the checkpoints, which evaluation must not need."""
    return RunFolder(
        shutil.copytree(unbroken.folder, tmp_path / "runs" / "trained", ignore=shutil.ignore_patterns("state"))
    )


@pytest.fixture(scope="module")
def report(unbroken, tmp_path_factory) -> tuple[Done, dict, Path]:
    """What is printed, the JSON, and the run folder, of an evaluation without special wishes."""
    folder = Path(shutil.copytree(unbroken.folder, tmp_path_factory.mktemp("reported") / "trained"))
    done = run("evaluate.py", folder, "--json", folder / "report.json")
    return done, json.loads((folder / "report.json").read_text()), folder


def test_it_agrees_with_what_training_said(report, unbroken):
    done, found, _ = report
    line = unbroken.metrics()[-1]
    assert (found["correct"], found["seen"], found["accuracy"]) == (
        line["test_correct"],
        line["test_seen"],
        line["test_accuracy"],
    )
    assert found["top5_accuracy"] == line["test_top5_accuracy"] and found["loss"] == pytest.approx(
        line["test_loss"], rel=1e-6
    )
    assert (
        f"Test accuracy: {100 * line['test_accuracy']:.2f}% ({line['test_correct']}/{NUM_TEST})"
        in done.out.splitlines()
    )


def test_the_json_adds_up(report, unbroken):
    _, found, folder = report
    classes = found["per_class"]
    assert list(classes) == unbroken.facts()["dataset"]["classes"]
    assert all(
        counts["seen"] == TEST_PER_CLASS and 0 <= counts["correct"] <= TEST_PER_CLASS for counts in classes.values()
    )
    assert sum(counts["correct"] for counts in classes.values()) == found["correct"] <= found["correct_top5"]
    confusions = found["worst_confusions"]
    assert [pair["count"] for pair in confusions] == sorted((pair["count"] for pair in confusions), reverse=True)
    assert all(
        pair["true"] != pair["predicted"] and {pair["true"], pair["predicted"]} <= set(classes) for pair in confusions
    )
    assert (found["run"], found["split"], found["precision"]) == ("trained", "test", "fp32")
    assert (found["weights"], found["epochs"]) == ("weights.safetensors", len(unbroken.metrics()))
    assert json.loads((folder / "evaluation_test.json").read_text()) == found
    assert (folder / "confusion_test.png").read_bytes().startswith(b"\x89PNG")


def test_the_screen_names_every_class_and_the_worst_confusions(report):
    done, found, _ = report
    for name, counts in found["per_class"].items():
        assert (
            f"  {name:24} {100 * counts['correct'] / TEST_PER_CLASS:6.2f}%  ({counts['correct']}/{TEST_PER_CLASS})"
            in done.out
        )
    worst = found["worst_confusions"][0]
    assert f"{worst['true']} taken for {worst['predicted']}: {worst['count']}" in done.out


def assert_same_report(path: Path, found: dict) -> None:
    other = json.loads(path.read_text())
    assert other.pop("loss") == pytest.approx(found["loss"], rel=1e-6)
    assert other == {key: value for key, value in found.items() if key != "loss"}


@pytest.mark.parametrize(
    "arguments", [["--batch-size", 1], ["--batch-size", 7], ["--batch-size", 1000], ["--source", "files"]], ids=str
)
def test_batch_size_and_source_do_not_matter(report, trained, tmp_path, arguments):
    run("evaluate.py", trained.folder, "--json", tmp_path / "other.json", *arguments)
    assert_same_report(tmp_path / "other.json", report[1])


def test_the_number_of_processes_does_not_matter(report, trained, tmp_path):
    done = launch(2, "evaluate.py", trained.folder, "--batch-size", 8, "--json", tmp_path / "other.json")
    assert_same_report(tmp_path / "other.json", report[1])
    assert done.out.count("Test accuracy:") == 1


def test_without_a_run_it_takes_the_newest(trained, report):
    older = shutil.copytree(trained.folder, trained.folder.with_name("older"))
    past = time.time() - 3600
    for file in older.iterdir():
        os.utime(file, (past, past))
    run("evaluate.py", "--runs-dir", trained.folder.parent)
    assert not list(older.glob("evaluation*"))
    assert_same_report(trained.folder / "evaluation_test.json", report[1])


# --- what is refused ----------------------------------------------------------------------------------------------


def refusal(record: RunFolder, *arguments) -> str:
    """The one sentence on the screen."""
    done = run("evaluate.py", record.folder, *arguments, code=1)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.out == ""
    assert not list(record.folder.glob("evaluation*"))
    return done.err


def test_missing_weights(trained):
    (trained.folder / "weights.safetensors").unlink()
    assert "weights.safetensors does not exist; the run has not finished an epoch yet" in refusal(trained)


def test_truncated_weights(trained):
    weights = trained.folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is damaged or of another network" in refusal(trained)


@pytest.mark.parametrize("change", ["a shape", "a missing key", "a key too many"])
def test_weights_of_another_network(trained, change):
    path = trained.folder / "weights.safetensors"
    weights = load_file(path)
    name = next(name for name, value in weights.items() if value.ndim == 2)
    if change == "a shape":
        weights[name] = torch.zeros(3, 3)
    elif change == "a missing key":
        del weights[name]
    else:
        weights["one.more"] = torch.zeros(3)
    save_file(weights, path)
    assert "damaged or of another network" in refusal(trained)


class Bomb:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("how", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_weights_that_are_a_pickle_are_refused_and_not_executed(trained, tmp_path, how):
    target = tmp_path / "executed"
    with (trained.folder / "weights.safetensors").open("wb") as file:
        how(Bomb(target), file)
    assert "damaged or of another network" in refusal(trained)
    assert not target.exists()
    with (
        pytest.raises(FileExistsError),
        (trained.folder / "weights.safetensors").open("rb") as file,
    ):  # it would have gone off
        target.mkdir()
        pickle.load(file) if how is pickle.dump else torch.load(file, weights_only=False)


def test_a_dataset_of_other_classes(trained, shapes, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    names = (other / "labels.txt").read_text().splitlines()
    (other / "labels.txt").write_text("\n".join(["oval" if name == "circle" else name for name in names]) + "\n")
    assert "the dataset's classes are not the run's ('oval' instead of 'circle')" in refusal(
        trained, "--data-dir", other
    )


def test_a_dataset_of_another_image_side(trained, tmp_path):
    prepare(
        tmp_path / "small", dataset="shapes", workers=1, shapes={"side": 16, "train_per_class": 1, "test_per_class": 1}
    )
    assert "the dataset has images of side 16, the run was trained on 32" in refusal(
        trained, "--data-dir", tmp_path / "small"
    )


def test_a_dataset_that_is_gone(trained, tmp_path):
    assert "nowhere holds no prepared dataset" in refusal(trained, "--data-dir", tmp_path / "nowhere")


def test_a_split_that_the_run_does_not_have(trained):
    assert "held out no part of the training split" in refusal(trained, "--split", "validation")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", 0], "argument --batch-size: must be at least 1, not 0"),
        (["--bach-size", 5], "unknown option --bach-size; did you mean --batch-size?"),
    ],
)
def test_arguments_that_cannot_be(trained, arguments, sentence):
    done = run("evaluate.py", trained.folder, *arguments, code=2)
    assert sentence in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "x"], "--output has no meaning for an evaluation"),
        (["--predict", "x.png", "--per-class"], "--per-class has no meaning for --predict"),
        (["--export", "onnx", "--split", "validation"], "--split has no meaning for --export"),
        (["--export", "onnx", "--predict", "x.png"], "give --predict or --export, not both"),
    ],
)
def test_an_option_that_would_change_nothing(trained, arguments, sentence):
    assert sentence in refusal(trained, *arguments)


def test_weights_that_are_not_there_are_answered_with_those_that_are(trained):
    shutil.copy(trained.folder / "weights.safetensors", trained.folder / "best.safetensors")
    sentence = refusal(trained, "--weights", "bets.safetensors")
    assert (
        "did you mean 'best.safetensors'" in sentence and "(known: best.safetensors, weights.safetensors)" in sentence
    )


def test_no_run_at_all(tmp_path):
    (tmp_path / "stray").mkdir()
    assert "there is no run in" in run("evaluate.py", "--runs-dir", tmp_path, code=1).err
    assert "stray is not a run folder (no run.json)" in refusal(RunFolder(tmp_path / "stray"))
