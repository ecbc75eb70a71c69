"""evaluate.py: exactly the accuracy of training, for every batch size and number of processes; and rejected input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from bomb import Bomb
from PIL import Image
from programs import clean_environment, launch, run
from safetensors.torch import load_file, save_file
from small_runs import TEST_PER_CLASS

import evaluate
from benchmarks.lib.forked_programs import Done
from common.errors import RunError
from common.paths import PROJECT
from image_data.dataset import Dataset
from image_data.preparation.prepare import prepare
from inference.evaluation import average_predictions, open_dataset
from inference.several_runs import average_weights, check_same_input
from inference.trained_model import TrainedModel
from records.run_folder import RunFolder

NUM_TEST = 10 * TEST_PER_CLASS


@pytest.fixture
def trained(unbroken, tmp_path) -> RunFolder:
    """A copy of the finished run that tests may damage; without checkpoints, which an evaluation must not need."""
    return RunFolder(
        shutil.copytree(unbroken.folder, tmp_path / "runs" / "trained", ignore=shutil.ignore_patterns("state"))
    )


@pytest.fixture(scope="module")
def report(unbroken, tmp_path_factory) -> tuple[Done, dict, Path]:
    """Output, JSON report and run folder of an evaluation with default options."""
    folder = Path(shutil.copytree(unbroken.folder, tmp_path_factory.mktemp("reported") / "trained"))
    done = run("evaluate.py", folder, "--json", folder / "report.json")
    return done, json.loads((folder / "report.json").read_text()), folder


def test_it_agrees_with_the_metrics_of_training(report, unbroken):
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


def test_the_json_report_is_consistent(report, unbroken):
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


def test_every_class_and_the_worst_confusions_are_printed(report):
    done, found, _ = report
    for name, counts in found["per_class"].items():
        assert (
            f"  {name:24} {100 * counts['correct'] / TEST_PER_CLASS:6.2f}%  ({counts['correct']}/{TEST_PER_CLASS})"
            in done.out
        )
    worst = found["worst_confusions"][0]
    assert f"{worst['true']} -> {worst['predicted']}: {worst['count']}" in done.out


def assert_same_report(path: Path, found: dict) -> None:
    other, found = json.loads(path.read_text()), dict(found)
    for key in ("loss", "expected_calibration_error"):
        assert other.pop(key) == pytest.approx(found.pop(key), rel=1e-5, abs=1e-5)
    confidences, expected = other.pop("calibration"), found.pop("calibration")
    assert confidences["confidence_sum"] == pytest.approx(expected["confidence_sum"], abs=1e-4)
    assert other == found


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
    (older / "evaluation_test.json").write_text("{}")  # evaluated after the newer one was trained
    failed = RunFolder(trained.folder.with_name("failed"))
    failed.create(trained.facts())  # a start that failed later still
    done = run("evaluate.py", "--runs-dir", trained.folder.parent)
    assert done.out.startswith(f"run       {trained.folder} (the newest)\n")
    assert_same_report(trained.folder / "evaluation_test.json", report[1])


def test_the_predictions_of_the_newest_run_stay_alone_on_stdout(trained, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images" / "black.png")
    done = run("evaluate.py", "--runs-dir", trained.folder.parent, "--predict", tmp_path / "images")
    assert done.out.startswith("path,") and f"run       {trained.folder} (the newest)\n" in done.err


def test_a_run_is_found_by_its_name(trained, report):
    run("evaluate.py", "trained", "--runs-dir", trained.folder.parent)
    assert_same_report(trained.folder / "evaluation_test.json", report[1])
    missing = run("evaluate.py", "trainde", "--runs-dir", trained.folder.parent, code=1)
    assert missing.err == f"error: there is no run 'trainde'. Did you mean {trained.folder}?\n"


def test_the_calibration_agrees_with_the_counts(report):
    _, found, folder = report
    calibration = found["calibration"]
    assert sum(calibration["seen"]) == found["seen"] and sum(calibration["correct"]) == found["correct"]
    gaps = [abs(a - b) for a, b in zip(calibration["correct"], calibration["confidence_sum"], strict=True)]
    assert found["expected_calibration_error"] == pytest.approx(sum(gaps) / found["seen"], abs=1e-5)
    assert (folder / "reliability_test.png").read_bytes().startswith(b"\x89PNG")


def test_test_time_flip_is_reported_apart(trained, report, shapes, tmp_path):
    done = run("evaluate.py", trained.folder, "--flip", "--json", tmp_path / "flip.json")
    found = json.loads((tmp_path / "flip.json").read_text())
    assert found.pop("test_time_flip")["seen"] == NUM_TEST and found["correct"] == report[1]["correct"]
    assert "With test-time flip: " in done.out and done.out.splitlines()[-1].startswith("Test accuracy: ")


def test_averaged_predictions_are_mean_probabilities():
    scores = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    mean = torch.stack([part.softmax(dim=1) for part in scores]).mean(dim=0)
    torch.testing.assert_close(average_predictions(scores).softmax(dim=1), mean)


def test_soup_and_ensemble_of_several_runs(trained, report, tmp_path):
    other = Path(shutil.copytree(trained.folder, trained.folder.with_name("other")))
    weights = load_file(other / "weights.safetensors")
    save_file({name: 0.9 * value for name, value in weights.items()}, other / "weights.safetensors")
    runs = (trained.folder, other)
    done = run("evaluate.py", *runs, "--soup", "--ensemble", "--json", tmp_path / "both.json")
    found = json.loads((tmp_path / "both.json").read_text())
    assert list(found["runs"].values())[0]["correct"] == report[1]["correct"]
    assert found["soup"]["seen"] == found["ensemble"]["seen"] == NUM_TEST
    assert [line.split()[0] for line in done.out.splitlines()[-2:]] == ["soup", "ensemble"]
    soup = {name: 0.95 * value for name, value in weights.items()}
    save_file(soup, other / "weights.safetensors")
    run("evaluate.py", other, "--json", tmp_path / "soup.json")
    assert json.loads((tmp_path / "soup.json").read_text())["loss"] == pytest.approx(found["soup"]["loss"], rel=1e-5)


def test_runs_that_cannot_be_combined(trained, tmp_path):
    other = Path(shutil.copytree(trained.folder, trained.folder.with_name("other")))
    facts = json.loads((other / "run.json").read_text())
    facts["settings"]["model"]["width"] = 16
    (other / "run.json").write_text(json.dumps(facts))
    both = [trained.folder, other]
    assert "several runs need --soup, --ensemble or both" in run("evaluate.py", *both, code=1).err
    assert "--soup needs at least two runs" in refusal(trained, "--soup")
    assert "--export takes one run, not 2" in run("evaluate.py", *both, "--export", "onnx", code=1).err
    assert "--flip does not apply to several runs" in run("evaluate.py", *both, "--soup", "--flip", code=1).err
    facts["precision"] = "autocast"
    (other / "run.json").write_text(json.dumps(facts))
    sentence = "the runs were trained in different precisions (autocast, fp32). Add --precision fp32"
    assert sentence in run("evaluate.py", *both, "--soup", code=1).err
    facts["dataset"]["mean"] = [0.5, 0.5, 0.5]
    (other / "run.json").write_text(json.dumps(facts))
    assert "differ in the mean of the images" in run("evaluate.py", *both, "--soup", code=1).err
    networks = [torch.nn.Linear(2, 3), torch.nn.Linear(2, 4)]
    with pytest.raises(RunError, match=r"cannot be averaged: bias has the shapes \(3,\) and \(4,\)"):
        average_weights(networks, [TrainedModel.open(trained.folder)] * 2)


def test_runs_of_different_validation_splits_are_not_evaluated_on_one(trained):
    """One of them would otherwise be evaluated on images that it was trained on."""
    facts = trained.facts()
    mine, same, without, elsewhere = (
        TrainedModel(trained, facts | {"hold_out": share, "dataset": facts["dataset"] | {"fingerprint": fingerprint}})
        for share, fingerprint in ((0.1, "sha256:a"), (0.1, "sha256:a"), (None, "sha256:a"), (0.1, "sha256:b"))
    )
    check_same_input([mine, same], "validation")
    check_same_input([mine, without, elsewhere], "test")
    for other in (without, elsewhere):
        with pytest.raises(RunError, match="have different validation splits .*. Add --split test"):
            check_same_input([mine, other], "validation")


@pytest.mark.parametrize(("task", "given"), [("evaluate_run", []), ("predict_images", ["--predict", "cat.png"])])
@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError("alloc_cpu: can't allocate memory")]
)
def test_out_of_memory_is_answered_with_a_smaller_batch(trained, monkeypatch, task, given, error):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(trained.folder), "--batch-size", "50", *given])
    monkeypatch.setattr(evaluate, task, Mock(side_effect=error))
    with pytest.raises(RunError, match="out of memory with batches of 50 images. Add --batch-size 12"):
        evaluate.main()


# --- output that cannot be written -----------------------------------------------------------------------------------


def test_a_run_folder_that_cannot_be_written_costs_one_warning(trained, report, tmp_path):
    for name in ("evaluation_test.json", "confusion_test.png"):
        (trained.folder / name).unlink(missing_ok=True)
        (trained.folder / name).mkdir()  # not writable as a file, even for root
    done = run("evaluate.py", trained.folder, "--json", tmp_path / "report.json")
    assert "Test accuracy: " in done.out
    assert done.err.startswith(f"warning: not everything was written to {trained.folder}: ")
    assert done.err.count("\n") == 1
    assert_same_report(tmp_path / "report.json", report[1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--json", "no/e.json"], "--json no/e.json: the folder no does not exist. Create it: mkdir -p no"),
        (["--export", "onnx", "--output", "no/m.onnx"], "--output no/m.onnx: the folder no does not exist."),
        (["--predict", "x.png", "--output", "no/p.csv"], "--output no/p.csv: the folder no does not exist."),
        (["--export", "onnx", "--output", "tests"], "--output tests is a folder. Name a file, for example"),
    ],
)
def test_an_output_that_cannot_be_written_is_rejected_before_the_work(trained, arguments, sentence):
    assert sentence in refusal(trained, *arguments)


def test_a_reader_that_goes_away_changes_nothing(trained, report):
    command = [sys.executable, "evaluate.py", str(trained.folder)]
    child = subprocess.Popen(
        command, cwd=PROJECT, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 0
    child.stderr.close()
    assert_same_report(trained.folder / "evaluation_test.json", report[1])


# --- rejected input ----------------------------------------------------------------------------------------------


def refusal(record: RunFolder, *arguments) -> str:
    """Return the one sentence that is printed."""
    done = run("evaluate.py", record.folder, *arguments, code=1)
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and done.out == ""
    assert not list(record.folder.glob("evaluation*"))
    return done.err


def test_missing_weights(trained):
    (trained.folder / "weights.safetensors").unlink()
    fix = "restore it, or train the run again with --fresh"
    assert refusal(trained) == f"error: {trained.folder}/weights.safetensors does not exist; {fix}\n"
    (trained.folder / "metrics.jsonl").unlink()
    trained.create(trained.facts() | {"command": ["train.py", "--name", "a b"]})
    assert refusal(trained) == (
        f"error: {trained.folder} has no finished epoch yet. Wait if it is training, or continue it: "
        "python train.py --name 'a b'\n"
    )
    trained.create(trained.facts() | {"num_processes": 2})
    assert refusal(trained).endswith("or continue it: ./launch_local_train.sh --name 'a b'\n")


def test_truncated_weights(trained):
    weights = trained.folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"{weights} is damaged or holds the weights of another network" in refusal(trained)


def test_damaged_metrics_are_named_before_the_work(trained):
    path = trained.folder / "metrics.jsonl"
    path.write_text("{ }\n{\n" + path.read_text())
    assert "metrics.jsonl is damaged (" in refusal(trained)
    path.write_text("3\n")
    assert "metrics.jsonl is damaged (a line is no JSON object)" in refusal(trained)


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
    assert "damaged or holds the weights of another network" in refusal(trained)


@pytest.mark.parametrize("how", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_weights_that_are_a_pickle_are_refused_and_not_executed(trained, tmp_path, how):
    target = tmp_path / "executed"
    with (trained.folder / "weights.safetensors").open("wb") as file:
        how(Bomb(target), file)
    assert "damaged or holds the weights of another network" in refusal(trained)
    assert not target.exists()
    with (
        pytest.raises(FileExistsError),
        (trained.folder / "weights.safetensors").open("rb") as file,
    ):  # loading it as a pickle would have run its code
        target.mkdir()
        pickle.load(file) if how is pickle.dump else torch.load(file, weights_only=False)


def test_a_dataset_of_other_classes(trained, shapes, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    names = (other / "labels.txt").read_text().splitlines()
    (other / "labels.txt").write_text("\n".join(["oval" if name == "circle" else name for name in names]) + "\n")
    assert "the dataset's classes are not the run's ('oval' instead of 'circle')" in refusal(
        trained, "--data-dir", other
    )


def test_a_dataset_that_was_moved(trained, tmp_path):
    facts = trained.facts()
    trained.create(facts | {"dataset": facts["dataset"] | {"folder": str(tmp_path / "my pets")}})
    assert refusal(trained) == (
        f"error: {tmp_path}/my pets, the dataset of the training, is not prepared. If it was moved, add "
        f"--data-dir NEW_PLACE. Otherwise run: python prepare_dataset.py --data-dir '{tmp_path}/my pets' "
        "--archive FILE (or --root DIR, or --dataset NAME)\n"
    )


def test_another_dataset_is_normalized_as_in_training(shapes, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"mean": [0.1] * 3, "std": [0.9] * 3}))
    dataset = Dataset.open(shapes)
    facts = {"mean": list(dataset.mean), "std": list(dataset.std), "image_side": dataset.image_side}
    trained: Any = SimpleNamespace(facts={"dataset": facts}, classes=dataset.classes)
    found = open_dataset(trained, other)
    assert found.folder == other and (found.mean, found.std) == (dataset.mean, dataset.std)
    assert Dataset.open(other).mean != found.mean


def test_the_result_of_another_dataset_stays_out_of_the_run_folder(trained, shapes, tmp_path):
    other = Path(shutil.copytree(shapes, tmp_path / "other"))
    description = json.loads((other / "dataset.json").read_text())
    (other / "dataset.json").write_text(json.dumps(description | {"fingerprint": "sha256:other"}))
    before = {path.name: path.read_bytes() for path in trained.folder.iterdir() if path.is_file()}
    done = run("evaluate.py", trained.folder, "--data-dir", other, "--json", tmp_path / "other.json")
    assert "this is not the dataset of the training" in done.err
    assert "the run folder keeps the result of its own dataset\n" in done.err  # without the advice to add --json
    assert {path.name: path.read_bytes() for path in trained.folder.iterdir() if path.is_file()} == before
    assert json.loads((tmp_path / "other.json").read_text())["dataset_fingerprint"] == "sha256:other"


def test_a_dataset_of_another_image_side(trained, tmp_path):
    prepare(
        tmp_path / "small", dataset="shapes", workers=1, shapes={"side": 16, "train_per_class": 1, "test_per_class": 1}
    )
    assert "the dataset has images of side 16 pixels, and the run was trained on 32 pixels" in refusal(
        trained, "--data-dir", tmp_path / "small"
    )


def test_a_dataset_that_is_gone(trained, tmp_path):
    assert "nowhere holds no prepared dataset" in refusal(trained, "--data-dir", tmp_path / "nowhere")


def test_a_split_that_the_run_does_not_have(trained):
    assert "has no validation split. Use --split test" in refusal(trained, "--split", "validation")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--batch-size", 0], "argument --batch-size: must be at least 1, not 0"),
        (["--bach-size", 5], "unknown option --bach-size; did you mean --batch-size?"),
    ],
)
def test_invalid_arguments(trained, arguments, sentence):
    done = run("evaluate.py", trained.folder, *arguments, code=2)
    assert sentence in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "x"], "--output does not apply to an evaluation"),
        (["--predict", "x.png", "--per-class"], "--per-class does not apply to --predict"),
        (["--export", "onnx", "--split", "validation"], "--split does not apply to --export"),
        (["--export", "onnx", "--predict", "x.png"], "--predict and --export exclude each other"),
    ],
)
def test_an_option_that_does_not_apply_is_rejected(trained, arguments, sentence):
    assert sentence in refusal(trained, *arguments)


def test_a_run_after_predict_is_not_taken_for_images(trained, tmp_path):
    for name in (trained.folder, trained.folder.name):
        done = run("evaluate.py", "--runs-dir", trained.folder.parent, "--predict", "my cat.png", name, code=1)
        assert done.err == (f"error: {name} is a run folder; write python evaluate.py {name} --predict 'my cat.png'\n")


def test_missing_weights_are_answered_with_the_existing_ones(trained):
    shutil.copy(trained.folder / "weights.safetensors", trained.folder / "best.safetensors")
    sentence = refusal(trained, "--weights", "bets.safetensors")
    assert (
        "did you mean 'best.safetensors'" in sentence and "(known: best.safetensors, weights.safetensors)" in sentence
    )


def test_no_run_at_all(tmp_path):
    (tmp_path / "stray").mkdir()
    assert "there is no run in" in run("evaluate.py", "--runs-dir", tmp_path, code=1).err
    assert "stray is not a run folder (no run.json)" in refusal(RunFolder(tmp_path / "stray"))
