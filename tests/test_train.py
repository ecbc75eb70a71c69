"""train.py from end to end, on a drawn dataset: the run folder, stopping and going on, what is refused, several processes.

Bit-identical means: the bytes of weights.safetensors, and every number of metrics.jsonl that is not a time.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import programs
import psutil
import pytest
import torch
from conftest import TEST_PER_CLASS, TRAIN_PER_CLASS
from programs import launch, run, start
from safetensors.torch import load_file

from dataset import Dataset
from run_record import Progress, RunError, RunRecord, choose_folder

EPOCHS, STEPS_PER_EPOCH = 12, 4  # what conftest.TINY and the number of images come to
NUM_TEST = 10 * TEST_PER_CLASS
STOPPED = 75


def results(record: RunRecord) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    measured = ("_seconds", "_per_second", "_gib")
    return [{key: value for key, value in line.items() if not key.endswith(measured)} for line in record.metrics()]


def assert_same_as(record: RunRecord, unbroken: RunRecord) -> None:
    assert results(record) == results(unbroken)
    assert (record.folder / "weights.safetensors").read_bytes() == (unbroken.folder / "weights.safetensors").read_bytes()


def checkpoints(record: RunRecord) -> list[str]:
    return sorted(path.name for path in (record.folder / "state").iterdir())


# --- the run folder -----------------------------------------------------------------------------------------------


def test_the_run_folder_holds_everything_a_reader_needs(unbroken, shapes):
    names = {path.name for path in unbroken.folder.iterdir()}
    assert {"run.json", "metrics.jsonl", "curves.png", "state", "weights.safetensors"} <= names
    assert not list(unbroken.folder.rglob("*unfinished*"))
    assert (unbroken.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    facts, dataset = unbroken.facts(), Dataset.open(shapes)
    assert facts["settings"]["model"]["width"] == 32 and facts["settings"]["engine"]["optimizer"]["params"]["lr"] == 3e-3
    assert facts["command"][0] == "train.py" and "--name" in facts["command"]
    assert facts["dataset"]["fingerprint"] == dataset.fingerprint and facts["dataset"]["classes"] == dataset.classes
    assert (facts["total_steps"], facts["num_processes"], facts["device"]) == (EPOCHS * STEPS_PER_EPOCH, 1, "CPU")
    assert torch.__version__.startswith(facts["versions"]["torch"]) and "commit" in facts and "uncommitted_changes" in facts


def test_every_epoch_has_a_line_of_exact_counts(unbroken):
    lines = unbroken.metrics()
    assert [line["epoch"] for line in lines] == list(range(1, EPOCHS + 1))
    assert [line["step"] for line in lines] == [STEPS_PER_EPOCH * epoch for epoch in range(1, EPOCHS + 1)]
    for line in lines:
        assert line["test_seen"] == NUM_TEST and line["test_accuracy"] == line["test_correct"] / NUM_TEST
        assert line["test_correct"] <= round(line["test_top5_accuracy"] * NUM_TEST) <= NUM_TEST
        assert line["images_per_second"] > 0 and 0 <= line["data_wait_seconds"] <= line["training_seconds"]


def test_it_learns_and_the_learning_rate_ends_its_course(unbroken):
    lines = unbroken.metrics()
    assert lines[-1]["train_loss"] < lines[0]["train_loss"] - 0.1
    assert lines[-1]["learning_rate"] == pytest.approx(3e-3 * 0.01)


def test_the_weights_are_a_plain_fp32_state_dict(unbroken, shapes):
    from model import build_model
    from settings import Settings

    weights = load_file(unbroken.folder / "weights.safetensors")
    model = build_model(Settings.from_dict(unbroken.facts()["settings"]).model, num_classes=10, image_side=32)
    model.load_state_dict(weights)  # every key, every shape
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_only_the_last_two_checkpoints_are_kept(unbroken):
    assert checkpoints(unbroken) == ["step-00000044", "step-00000048"]


# --- stopping and going on ----------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_and_resumed_three_times_equals_one_that_was_not(training, runs, unbroken):
    record = RunRecord(runs / "stopped")
    said = ""
    for step in (1, 6, 2 * STEPS_PER_EPOCH):  # the first step, in the middle of an epoch, the last of an epoch
        said = run("train.py", *training, "--name", "stopped", "--stop-at", step, code=STOPPED).out
        assert f"stopped after step {step} and saved" in said and record.newest_checkpoint().name == f"step-{step:08d}"
        assert not (record.folder / "weights.safetensors").exists() or step > STEPS_PER_EPOCH
    assert "resuming  after step 6 of 48" in said
    said = run("train.py", *training, "--name", "stopped").out
    assert "resuming  after step 8 of 48" in said
    assert_same_as(record, unbroken)


def test_sigterm_saves_and_the_run_goes_on(training, runs, unbroken):
    program = start("train.py", *training, "--name", "told-to-stop")
    program.wait_for("epoch  2/12")
    program.send(signal.SIGTERM)
    done = program.end()
    assert done.code == STOPPED, done.text
    record = RunRecord(runs / "told-to-stop")
    step = int(record.newest_checkpoint().name.removeprefix("step-"))
    assert 2 * STEPS_PER_EPOCH <= step < EPOCHS * STEPS_PER_EPOCH and f"stopped after step {step} and saved" in done.out
    assert f"resuming  after step {step}" in run("train.py", *training, "--name", "told-to-stop").out
    assert_same_as(record, unbroken)


def test_a_killed_run_goes_on_from_its_last_checkpoint(training, runs, unbroken):
    program = start("train.py", *training, "--name", "killed")
    program.wait_for("epoch  3/12")
    program.send(signal.SIGKILL)
    done = program.end()
    assert done.code == -signal.SIGKILL, done.text
    record = RunRecord(runs / "killed")
    # What a power cut may leave besides: a checkpoint that was being written, a line that was not whole.
    (record.folder / "state" / "unfinished").mkdir(exist_ok=True)
    (record.folder / "state" / "unfinished" / "state.safetensors").write_bytes(b"half")
    with (record.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 9, "st')
    step = int(record.newest_checkpoint().name.removeprefix("step-"))
    assert f"resuming  after step {step}" in run("train.py", *training, "--name", "killed").out
    assert_same_as(record, unbroken)
    assert len(checkpoints(record)) == 2


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(training, runs, unbroken):
    record = RunRecord(runs / "killed-early")
    record.create(unbroken.facts())
    record.append_metrics(unbroken.metrics()[0])  # written just before the checkpoint that is not there
    said = run("train.py", *training, "--name", "killed-early", "--stop-at", STEPS_PER_EPOCH + 1, code=STOPPED).out
    assert "resuming" not in said
    assert results(record) == results(unbroken)[:1]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_still_serves(training, runs, unbroken):
    record = copy_of(unbroken, runs / "damaged")
    damaged = record.folder / "state" / "step-00000048"
    state = damaged / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    (damaged / "engine.json").write_text(json.dumps({"step": 46}))
    damaged.rename(damaged.with_name("step-00000046"))
    done = run("train.py", *training, "--name", "damaged", code=1)
    assert "step-00000046 is damaged" in done.err and "delete it" in done.err and "Traceback" not in done.err
    shutil.rmtree(damaged.with_name("step-00000046"))
    run("train.py", *training, "--name", "damaged")
    assert_same_as(record, unbroken)


def copy_of(record: RunRecord, folder: Path) -> RunRecord:
    return RunRecord(shutil.copytree(record.folder, folder))


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(training, runs):
    exploding = [*training, "--name", "exploding", "--set", "optimizer.params.lr=1e30", "--set", "schedule.warmup_fraction=0.0"]
    run("train.py", *exploding, "--stop-at", 1, code=STOPPED)
    record = RunRecord(runs / "exploding")
    before = (record.newest_checkpoint() / "state.safetensors").read_bytes()
    done = run("train.py", *exploding, code=1)
    assert "error: the loss is nan at optimiser step 2; the last checkpoint is untouched" in done.err and "Traceback" not in done.err
    assert checkpoints(record) == ["step-00000001"] and (record.newest_checkpoint() / "state.safetensors").read_bytes() == before
    assert not (record.folder / "weights.safetensors").exists()


def test_max_steps_end_a_run_in_the_middle_of_an_epoch_and_fresh_sets_the_old_one_aside(training, runs):
    for more in ([], ["--fresh"]):
        run("train.py", *training, "--name", "short", "--max-steps", 6, *more)
        lines = RunRecord(runs / "short").metrics()
        assert [(line["epoch"], line["step"], line["test_seen"]) for line in lines] == [(1, 4, NUM_TEST), (2, 6, NUM_TEST)]
        assert lines[-1]["learning_rate"] == pytest.approx(3e-3 * 0.01)
    old = RunRecord(runs / "short.old-1")
    assert results(old) == results(RunRecord(runs / "short")) and old.newest_checkpoint().name == "step-00000006"


# --- a held-out part ----------------------------------------------------------------------------------------------


def test_a_held_out_part_chooses_and_the_test_split_waits_for_the_end(training, runs, shapes):
    run("train.py", *training, "--name", "held-out", "--hold-out", 0.2, "--epochs", 4)
    record = RunRecord(runs / "held-out")
    listed = [line.split("\t") for line in (record.folder / "validation_file_list.txt").read_text().splitlines()]
    held = Dataset.open(shapes).hold_out(0.2)
    assert [path for path, _ in listed] == held.splits["validation"].paths and len(listed) == 0.2 * 10 * TRAIN_PER_CLASS
    assert [int(label) for _, label in listed] == held.splits["validation"].labels.tolist()
    assert not set(held.splits["train"].paths) & {path for path, _ in listed}
    *early, last = record.metrics()
    assert len(early) == 3 and all(line["validation_seen"] == len(listed) for line in [*early, last])
    assert not any(key.startswith("test") for line in early for key in line) and last["test_seen"] == NUM_TEST
    best = run("evaluate.py", record.folder, "--split", "validation", "--weights", "best.safetensors",
               "--json", record.folder / "best.json")
    assert json.loads((record.folder / "best.json").read_text())["correct"] == max(line["validation_correct"] for line in [*early, last])
    assert "Validation accuracy" in best.out


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "named"), [
    (["--set", "model.depth=3"], "settings.model.depth was 2, is 3"),
    (["--seed", 5, "--epochs", 3], "settings.epochs was 12, is 3; seed was 0, is 5"),
    ([], "is finished; evaluate it with python evaluate.py"),
])
def test_a_run_of_other_settings_and_a_finished_one_are_refused(training, unbroken, changes, named):
    before = {path: path.read_bytes() for path in unbroken.folder.rglob("*") if path.is_file()}
    done = run("train.py", *training, "--name", "unbroken", *changes, code=1)
    assert named in done.err and "--fresh" in done.err and "Traceback" not in done.err
    assert {path: path.read_bytes() for path in unbroken.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--set", "model.widht=3"], "error: --set model.widht=3: unknown setting 'model.widht'; did you mean 'model.width'"),
    (["--set", "train_batch_size=301"], "error: the train split has 300 images, fewer than one global batch of 301"),
    (["--set", "gradient_accumulation_steps=3"], "error: train_batch_size=64 cannot be cut into 1 data-parallel processes"),
    (["--strategy", "nought"], "error: unknown strategy 'nought'"),
    (["--hold-out", 0.001], "error: holding out 0.001 of the 30 training images"),
    (["--data-dir", "new", "--archive", "/nowhere.zip"], "error: --archive /nowhere.zip does not exist"),
])
def test_a_mistake_gets_one_sentence_and_makes_no_run(training, runs, tmp_path, arguments, sentence):
    arguments = [tmp_path / "new" if argument == "new" else argument for argument in arguments]
    done = run("train.py", *training, "--name", "mistaken", *arguments, code=1)
    assert sentence in done.err and "Traceback" not in done.err
    assert not (runs / "mistaken").exists()


def test_a_dataset_that_is_not_there_yet_is_prepared_from_an_archive(tiny, shapes, tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for image in shapes.glob("images/*/[a-c]*/*_000[1-3].png"):
            archive.write(image, image.relative_to(shapes / "images"))
    run("train.py", "--preset", tiny, "--runs-dir", tmp_path, "--data-dir", tmp_path / "mine", "--archive", tmp_path / "mine.zip",
        "--name", "new", "--max-steps", 1, "--set", "train_batch_size=4")
    assert RunRecord(tmp_path / "new").facts()["dataset"]["num_images"] == {"train": 12, "test": 12}  # four classes of three


@pytest.mark.parametrize("flag", ["--max-steps", "--epochs", "--stop-at"])
def test_a_budget_of_nothing_is_refused(training, flag):
    done = run("train.py", *training, "--name", "nothing", flag, 0, code=2)
    assert f"argument {flag}: must be at least 1, not 0" in done.err


# --- run folders, without training --------------------------------------------------------------------------------


FACTS = {"settings": {"a": 1}, "seed": 0, "max_steps": None, "hold_out": None, "preset": "x/tiny.toml", "total_steps": 8,
         "dataset": {"name": "shapes", "fingerprint": "f"}}


def choice(runs_dir: Path, facts: dict = FACTS, name: str | None = None, fresh: bool = False) -> RunRecord:
    return choose_folder(SimpleNamespace(runs_dir=runs_dir, name=name, fresh=fresh, seed=facts["seed"]), facts)


def checkpoint(record: RunRecord, step: int) -> None:
    with record.new_checkpoint(step) as folder:
        RunRecord.write_progress(folder, Progress(epoch=step))


def test_without_a_name_a_run_goes_on_where_one_of_the_same_settings_is_unfinished(tmp_path):
    first = choice(tmp_path)
    assert first.folder.name == "tiny-shapes-seed0"
    first.create(FACTS)
    checkpoint(first, 4)
    assert choice(tmp_path).folder == first.folder
    checkpoint(first, 8)  # finished
    assert choice(tmp_path).folder.name == "tiny-shapes-seed0-2"
    other = choice(tmp_path, {**FACTS, "settings": {"a": 2}})
    other.create({**FACTS, "settings": {"a": 2}})
    assert other.folder.name == "tiny-shapes-seed0-2" and choice(tmp_path).folder.name == "tiny-shapes-seed0-3"


@pytest.mark.parametrize(("changed", "sentence"), [
    ({"settings": {"a": 2}}, "settings.a was 1, is 2"),
    ({"max_steps": 3}, "max_steps was None, is 3"),
    ({"hold_out": 0.1}, "hold_out was None, is 0.1"),
    ({"dataset": {"name": "shapes", "fingerprint": "g"}}, "the dataset's fingerprint was 'f', is 'g'"),
])
def test_a_name_that_holds_another_run_is_refused_by_what_differs(tmp_path, changed, sentence):
    choice(tmp_path, name="mine").create(FACTS)
    with pytest.raises(RunError, match=sentence):
        choice(tmp_path, {**FACTS, **changed}, name="mine")
    assert choice(tmp_path, {**FACTS, **changed}, name="mine", fresh=True).folder == tmp_path / "mine"
    assert RunRecord(tmp_path / "mine.old-1").facts() == FACTS and not (tmp_path / "mine").exists()


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    record = RunRecord(tmp_path / "mine")
    for step in (2, 4, 6):
        checkpoint(record, step)
    with pytest.raises(OSError, match="disk"), record.new_checkpoint(8) as folder:
        (folder / "state.safetensors").write_bytes(b"half")
        raise OSError("the disk is full")
    assert record.newest_checkpoint().name == "step-00000006" and RunRecord.read_progress(record.newest_checkpoint()).epoch == 6
    checkpoint(record, 8)
    assert checkpoints(record) == ["step-00000006", "step-00000008"]


def test_a_run_folder_without_a_readable_run_json_is_named(tmp_path):
    record = RunRecord(tmp_path / "mine")
    with pytest.raises(RunError, match="mine is not a run folder"):
        record.facts()
    record.create(FACTS)
    (record.folder / "run.json").write_text("{")
    with pytest.raises(RunError, match="run.json is damaged"):
        record.facts()


# --- several processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_two(training, runs) -> RunRecord:
    """Two processes of DeepSpeed's launcher, stopped in the second epoch; without dropout, which differs by process."""
    launch(2, "train.py", *training, "--name", "on-two", "--set", "model.dropout=0.0", "--max-steps", 8, "--stop-at", 6, code=STOPPED)
    return RunRecord(runs / "on-two")


def test_two_processes_count_every_test_image_once(on_two, training, runs):
    (line,) = on_two.metrics()
    assert on_two.facts()["num_processes"] == 2 and on_two.facts()["batch"] == {"total": 64, "micro": 32, "accumulation": 1, "shards": 2}
    assert line["test_seen"] == NUM_TEST
    alone = run("evaluate.py", on_two.folder, "--json", on_two.folder / "alone.json")
    assert f"({line['test_correct']}/{NUM_TEST})" in alone.out
    assert json.loads((on_two.folder / "alone.json").read_text())["loss"] == pytest.approx(line["test_loss"], abs=1e-5)


def test_two_processes_train_as_one_does_and_one_goes_on_for_two(on_two, training, runs):
    fixed = ["--set", "model.dropout=0.0", "--max-steps", 8]
    run("train.py", *training, "--name", "on-one", *fixed)
    moved = copy_of(on_two, runs / "two-to-one")
    assert "resuming  after step 6 of 8" in run("train.py", *training, "--name", "two-to-one", *fixed).out
    one, two = results(RunRecord(runs / "on-one")), results(moved)
    assert [line["step"] for line in two] == [4, 8]
    for a, b in zip(one, two, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    weights = [load_file(runs / name / "weights.safetensors") for name in ("on-one", "two-to-one")]
    assert max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0]) < 1e-4


def test_a_process_that_dies_takes_the_job_down(training):
    command = programs.launcher(2, "train.py", *training, "--name", "orphaned", "--epochs", 100_000)
    job = subprocess.Popen(command, cwd=programs.ROOT, env=programs.clean_environment(), start_new_session=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
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
