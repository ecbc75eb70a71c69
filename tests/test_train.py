"""train.py from end to end on a generated dataset: run folder, validation split, rejected runs, several processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import zipfile
from unittest import mock

import programs
import psutil
import pytest
import torch
from programs import launch, run
from safetensors.torch import load_file
from small_runs import EPOCHS, STEPS_PER_EPOCH, STOPPED, TEST_PER_CLASS, TRAIN_PER_CLASS, checkpoints, copy_of, results

import train
from common.errors import DatasetError, SettingsError
from common.paths import PROJECT
from common.stop_signal import StopSignal
from config import command_line
from image_data.dataset import Dataset
from records.run_folder import RunFolder

NUM_TEST = 10 * TEST_PER_CLASS


# --- the run folder -----------------------------------------------------------------------------------------------


def test_the_run_folder_is_complete(unbroken, shapes):
    names = {path.name for path in unbroken.folder.iterdir()}
    assert {"run.json", "metrics.jsonl", "curves.png", "state", "weights.safetensors"} <= names
    assert not list(unbroken.folder.rglob("*unfinished*"))
    assert (unbroken.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    facts, dataset = unbroken.facts(), Dataset.open(shapes)
    assert (
        facts["settings"]["model"]["width"] == 32 and facts["settings"]["engine"]["optimizer"]["params"]["lr"] == 3e-3
    )
    assert facts["command"][0] == "train.py" and "--name" in facts["command"]
    assert facts["dataset"]["fingerprint"] == dataset.fingerprint and facts["dataset"]["classes"] == dataset.classes
    assert (facts["total_steps"], facts["num_processes"], facts["device"]) == (EPOCHS * STEPS_PER_EPOCH, 1, "CPU")
    assert (
        torch.__version__.startswith(facts["versions"]["torch"])
        and "commit" in facts
        and "uncommitted_changes" in facts
    )


def test_every_epoch_has_a_line_of_exact_counts(unbroken):
    lines = unbroken.metrics()
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines] == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    for line in lines:
        assert line["test_seen"] == NUM_TEST and line["test_accuracy"] == line["test_correct"] / NUM_TEST
        assert line["test_correct"] <= round(line["test_top5_accuracy"] * NUM_TEST) <= NUM_TEST
        assert line["images_per_second"] > 0 and 0 <= line["data_wait_seconds"] <= line["training_seconds"]


def test_the_learning_rate_of_a_line_is_that_of_the_last_step_made(unbroken):
    from config.settings import Settings
    from optim.lr_schedule import Schedule

    schedule = Schedule(Settings.from_dict(unbroken.facts()["settings"]).schedule, EPOCHS * STEPS_PER_EPOCH)
    for line in unbroken.metrics():
        assert line["learning_rate"] == pytest.approx(3e-3 * schedule(line["step"] - 1), rel=1e-12)


def test_the_loss_decreases_and_the_learning_rate_reaches_its_end(unbroken):
    lines = unbroken.metrics()
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] - 0.1
    assert lines[-1]["learning_rate"] == pytest.approx(3e-3 * 0.01)


def test_the_weights_are_a_plain_fp32_state_dict(unbroken, shapes):
    from config.settings import Settings
    from model import build_model

    weights = load_file(unbroken.folder / "weights.safetensors")
    model = build_model(Settings.from_dict(unbroken.facts()["settings"]).model, num_classes=10, image_side=32)
    model.load_state_dict(weights)  # every key, every shape
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_only_the_last_two_checkpoints_are_kept(unbroken):
    assert checkpoints(unbroken) == ["step-00000044", "step-00000048"]


def test_max_steps_ends_a_run_within_an_epoch_and_fresh_renames_the_old_one(training, runs):
    for more in ([], ["--fresh"]):
        run("train.py", *training, "--name", "short", "--max-steps", 6, *more)
        lines = RunFolder(runs / "short").metrics()
        assert [(line["epoch"], line["step"], line["test_seen"]) for line in lines] == [
            (1, 4, NUM_TEST),
            (2, 6, NUM_TEST),
        ]
        assert lines[-1]["learning_rate"] == pytest.approx(3e-3 * 0.01)
    old = RunFolder(runs / "short.old-1")
    assert results(old) == results(RunFolder(runs / "short")) and old.newest_checkpoint().name == "step-00000006"


# --- errors of several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DatasetError, SettingsError])
@pytest.mark.parametrize(
    ("rank", "is_ended", "printed"),
    [("0", False, "error: no dataset\n"), ("1", True, ""), ("1", False, "error in process 1: no dataset\n")],
    ids=["the first process", "another process, which the launcher ends", "another process alone"],
)
def test_an_error_that_all_processes_share_is_printed_once(kind, rank, is_ended, printed, monkeypatch, signals, capsys):
    def main() -> int:
        StopSignal()
        if is_ended:  # as launchers do when another process has failed
            os.kill(os.getpid(), signal.SIGTERM)
        raise kind("no dataset")

    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(command_line, "SHARED_ERROR_SECONDS", 0.1)
    monkeypatch.setenv("RANK", rank)
    assert train.run() == 1 and capsys.readouterr().err == printed


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "error: runs/a cannot be written, because its disk",
        ),
        (
            RuntimeError("NCCL: Error while creating shared memory segment /dev/shm/nccl-1"),
            "error: /dev/shm is full or",
        ),
        (RuntimeError("Gloo: Connection closed by peer"), "process 0 stops, because another process has ended"),
    ],
)
def test_an_error_of_the_system_is_one_sentence(error, printed, monkeypatch, capsys):
    monkeypatch.setattr(train, "main", mock.Mock(side_effect=error))
    assert train.run() == 1 and capsys.readouterr().err.startswith(printed)


# --- validation split ---------------------------------------------------------------------------------------------


def test_the_validation_split_selects_and_the_test_split_is_used_at_the_end_only(training, runs, shapes):
    run("train.py", *training, "--name", "held-out", "--hold-out", 0.2, "--epochs", 4)
    record = RunFolder(runs / "held-out")
    listed = [line.split("\t") for line in (record.folder / "validation_file_list.txt").read_text().splitlines()]
    held = Dataset.open(shapes).hold_out(0.2)
    assert [path for path, _ in listed] == held.splits["validation"].paths and len(listed) == 0.2 * 10 * TRAIN_PER_CLASS
    assert [int(label) for _, label in listed] == held.splits["validation"].labels.tolist()
    assert not set(held.splits["train"].paths) & {path for path, _ in listed}
    *early, last = record.metrics()
    assert len(early) == 3 and all(line["validation_seen"] == len(listed) for line in [*early, last])
    assert not any(key.startswith("test") for line in early for key in line) and last["test_seen"] == NUM_TEST
    best = run(
        "evaluate.py",
        record.folder,
        "--split",
        "validation",
        "--weights",
        "best.safetensors",
        "--json",
        record.folder / "best.json",
    )
    assert json.loads((record.folder / "best.json").read_text())["correct"] == max(
        line["validation_correct"] for line in [*early, last]
    )
    assert "Validation accuracy" in best.out


# --- rejected runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named", "code"),
    [
        (["--set", "model.depth=3"], "settings.model.depth was 2, is 3", 1),
        (["--seed", 5, "--epochs", 3], "settings.epochs was 12, is 3; seed was 0, is 5", 1),
        ([], "is finished; evaluate it with python evaluate.py", 2),
        (
            ["--epochs", 20],
            "is finished; its schedule ended with it (settings.epochs was 12, is 20). To train longer",
            2,
        ),
        (["--max-steps", 100], "start from its weights: --name unbroken-longer --init-weights ", 2),
    ],
)
def test_a_run_of_other_settings_and_a_finished_one_are_rejected(training, unbroken, changes, named, code):
    before = {path: path.read_bytes() for path in unbroken.folder.rglob("*") if path.is_file()}
    done = run("train.py", *training, "--name", "unbroken", *changes, code=code)
    assert named in done.err and "--fresh" in done.err and "Traceback" not in done.err
    assert {path: path.read_bytes() for path in unbroken.folder.rglob("*") if path.is_file()} == before


def test_a_missing_dataset_is_prepared_from_an_archive(tiny, shapes, tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for image in shapes.glob("images/*/[a-c]*/*_000[1-3].png"):
            archive.write(image, image.relative_to(shapes / "images"))
    run(
        "train.py",
        "--preset",
        tiny,
        "--runs-dir",
        tmp_path,
        "--data-dir",
        tmp_path / "mine",
        "--archive",
        tmp_path / "mine.zip",
        "--name",
        "new",
        "--max-steps",
        1,
        "--set",
        "train_batch_size=4",
    )
    assert RunFolder(tmp_path / "new").facts()["dataset"]["num_images"] == {
        "train": 12,
        "test": 12,
    }  # four classes of three


def test_images_in_the_data_dir_are_prepared_in_place(tiny, shapes, tmp_path):
    for image in shapes.glob("images/*/c*/*_000[1-4].png"):
        (copy := tmp_path / "pets" / image.relative_to(shapes / "images")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, copy)
    run(
        "train.py",
        "--preset",
        tiny,
        "--runs-dir",
        tmp_path,
        "--data-dir",
        tmp_path / "pets",
        "--name",
        "new",
        "--max-steps",
        1,
        "--set",
        "train_batch_size=4",
    )
    assert RunFolder(tmp_path / "new").facts()["dataset"]["name"] == "pets"


# --- several processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two(training, runs) -> RunFolder:
    """Two processes of DeepSpeed's launcher, stopped in the second epoch; without dropout, which differs by process."""
    launch(
        2,
        "train.py",
        *training,
        "--name",
        "on-two",
        "--set",
        "model.dropout=0.0",
        "--max-steps",
        8,
        "--stop-at",
        6,
        code=STOPPED,
    )
    return RunFolder(runs / "on-two")


def test_two_processes_count_every_test_image_once(on_two, training, runs):
    (line,) = on_two.metrics()
    assert on_two.facts()["num_processes"] == 2 and on_two.facts()["batch"] == {
        "total": 64,
        "micro": 32,
        "accumulation": 1,
        "shards": 2,
    }
    assert line["test_seen"] == NUM_TEST
    alone = run("evaluate.py", on_two.folder, "--json", on_two.folder / "alone.json")
    assert f"({line['test_correct']}/{NUM_TEST})" in alone.out
    assert json.loads((on_two.folder / "alone.json").read_text())["loss"] == pytest.approx(line["test_loss"], abs=1e-5)


def test_two_processes_train_as_one_and_one_resumes_for_two(on_two, training, runs):
    fixed = ["--set", "model.dropout=0.0", "--max-steps", 8]
    run("train.py", *training, "--name", "on-one", *fixed)
    moved = copy_of(on_two, runs / "two-to-one")
    assert "resuming  after step 6 of 8" in run("train.py", *training, "--name", "two-to-one", *fixed).out
    one, two = results(RunFolder(runs / "on-one")), results(moved)
    assert [line["step"] for line in two] == [4, 8]
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    weights = [load_file(runs / name / "weights.safetensors") for name in ("on-one", "two-to-one")]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-4


def test_a_killed_process_ends_the_job(training):
    command = programs.launcher(2, "train.py", *training, "--name", "orphaned", "--epochs", 100_000)
    job = subprocess.Popen(
        command,
        cwd=programs.PROJECT,
        env=programs.clean_environment(),
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    ranks: list[psutil.Process] = []
    try:
        for line in job.stdout:
            if line.startswith("epoch"):
                ranks = psutil.Process(job.pid).children()
                break
        assert len(ranks) == 2, "it ended before its first epoch did"
        ranks[1].kill()
        job.communicate(timeout=60)
        assert job.returncode not in (0, STOPPED)
        assert psutil.wait_procs(ranks, timeout=30)[1] == []  # none is left
    finally:
        for process in [*ranks, psutil.Process(job.pid)] if job.poll() is None else ranks:
            if process.is_running():
                process.kill()


def test_the_folder_that_was_given_is_recorded_not_its_copy(training, shapes, tmp_path, runs):
    programs.run("train.py", *training, "--name", "staged", "--max-steps", 1, "--stage-to", tmp_path / "local")
    folder = RunFolder(runs / "staged").facts()["dataset"]["folder"]
    assert (PROJECT / folder).resolve() == shapes.resolve() and next((tmp_path / "local").iterdir()).is_dir()


def test_an_archive_beside_prepared_data_is_refused_unless_the_data_came_from_it(tiny, zipped, tmp_path):
    common = [
        "--preset",
        tiny,
        "--data-dir",
        tmp_path / "pets",
        "--runs-dir",
        tmp_path / "runs",
        "--max-steps",
        1,
        "--set",
        "train_batch_size=2",
    ]
    programs.run("train.py", *common, "--archive", zipped, "--name", "a")
    programs.run("train.py", *common, "--archive", zipped, "--name", "b")
    other = shutil.copy(zipped, tmp_path / "other.zip")
    assert (
        "was prepared from pets.zip, and --archive"
        in programs.run("train.py", *common, "--archive", other, "--name", "c", code=1).err
    )
    assert (
        "was prepared from pets.zip, and --dataset shapes"
        in programs.run("train.py", *common, "--dataset", "shapes", "--name", "c", code=1).err
    )
    assert (
        "--archive /none.zip does not exist"
        in programs.run("train.py", *common, "--archive", "/none.zip", "--name", "c", code=1).err
    )
    (tmp_path / "pets" / "prepared_from.json").unlink()  # as earlier versions left it
    assert "was not read" in programs.run("train.py", *common, "--archive", other, "--name", "d").out


def test_a_broken_image_is_skipped_by_the_option_that_the_error_names(tree, training, tmp_path):
    (tree / "train/cat/empty.png").touch()
    common = [*training, "--data-dir", tree, "--runs-dir", tmp_path, "--max-steps", 1, "--set", "train_batch_size=2"]
    assert "use prepare_dataset.py --skip-broken" in programs.run("train.py", *common, code=1).err
    assert "6 train" in programs.run("train.py", *common, "--skip-broken").out
