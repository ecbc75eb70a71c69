"""Stopping and resuming, end to end: whatever ended a run, the same command resumes it to the same bits.

`benchmarks/fault_matrix.py` does the same at random moments, for as many rounds as one likes.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess

import pytest
from programs import run, run_ranks
from small_runs import EPOCHS, RESIZING, STEPS_PER_EPOCH, STOPPED, assert_same_as, checkpoints, copy_of, results

from benchmarks.lib.forked_programs import Program, run_script, start
from common.errors import RunError, RunFinishedError
from records.checkpoint_store import read_facts
from records.run_folder import RunFolder
from training.resume import choose_folder
from training.resume_conditions import CHANGES

LAST = f"step-{EPOCHS * STEPS_PER_EPOCH:08d}"


def test_a_run_that_is_stopped_and_resumed_three_times_equals_one_that_was_not(training, runs, unbroken):
    record = RunFolder(runs / "stopped")
    said = ""
    for step in (1, 6, 2 * STEPS_PER_EPOCH):  # the first step, in the middle of an epoch, the last of an epoch
        said = run("train.py", *training, "--name", "stopped", "--stop-at", step, code=STOPPED).out
        assert f"stopped after step {step} and saved" in said and record.newest_checkpoint().name == f"step-{step:08d}"
        assert not (record.folder / "weights.safetensors").exists() or step > STEPS_PER_EPOCH
    assert "resuming  after step 6 of 48" in said and "not bitwise the same" not in said
    said = run("train.py", *training, "--name", "stopped").out
    assert "resuming  after step 8 of 48" in said
    assert_same_as(record, unbroken)
    assert "changes" not in record.facts()


def test_a_run_without_a_checkpoint_starts_over_and_records_the_source_that_trains_it(training, runs):
    """run.json names the code that trained, not that of a start which was killed before its first checkpoint."""
    said = run("train.py", *training, "--name", "killed-at-once", "--stop-at", 1, code=STOPPED).out
    assert "stopped after step 1" in said
    record = RunFolder(runs / "killed-at-once")
    shutil.rmtree(record.folder / "state")
    code = record.facts()["code"]
    record.create(record.facts() | {"code": {"fingerprint": "0", "files": {**code["files"], "train.py": "another"}}})
    run("train.py", *training, "--name", "killed-at-once", "--stop-at", 1, code=STOPPED)
    assert record.facts()["code"] == code


def test_a_run_with_accumulation_resumes_within_an_epoch_to_the_same_bits(training, runs):
    """The position in the epoch counts micro-batches, of which a step has several."""
    words = [*training, "--set", "gradient_accumulation_steps=4", "--max-steps", 9]
    run("train.py", *words, "--name", "accumulated")
    for step in (2, 7):
        run("train.py", *words, "--name", "accumulated-stopped", "--stop-at", step, code=STOPPED)
    run("train.py", *words, "--name", "accumulated-stopped")
    assert_same_as(RunFolder(runs / "accumulated-stopped"), RunFolder(runs / "accumulated"))


def test_a_run_resumes_where_its_images_grow_to_the_same_bits(training, runs):
    """Of 8 steps the first 2 have smaller images."""
    words = ["train.py", *training, *RESIZING, "--max-steps", 8]
    said = run(*words, "--name", "growing").out
    assert "images of 0.5 x the side in the first 25% of the steps" in said
    for stop in (1, 2, 3):
        run(*words, "--name", "growing-stopped", "--stop-at", stop, code=STOPPED)
    run(*words, "--name", "growing-stopped")
    assert_same_as(RunFolder(runs / "growing-stopped"), RunFolder(runs / "growing"))


@pytest.mark.parametrize("strategy", ["zero", "ddp"])
def test_two_optimizers_in_one_keep_their_counts_over_several_stops(training, runs, strategy):
    """Muon's matrices have no count of steps, the rest, which AdamW trains, has."""
    words = [*training, "--strategy", strategy, "--set", "optimizer.type=Muon", "--max-steps", 9]
    run("train.py", *words, "--name", f"muon-{strategy}")
    for step in (2, 4, 6):
        run("train.py", *words, "--name", f"muon-stopped-{strategy}", "--stop-at", step, code=STOPPED)
    run("train.py", *words, "--name", f"muon-stopped-{strategy}")
    assert_same_as(RunFolder(runs / f"muon-stopped-{strategy}"), RunFolder(runs / f"muon-{strategy}"))


def test_checkpoints_within_epochs_change_nothing_and_cost_no_training_time(training, runs, unbroken):
    run("train.py", *training, "--name", "often", "--checkpoint-every", "1step", "--keep-checkpoints", 3)
    record = RunFolder(runs / "often")
    assert_same_as(record, unbroken)
    assert checkpoints(record) == ["step-00000046", "step-00000047", LAST]
    assert all(line["checkpoint_seconds"] > 0 for line in record.metrics())
    assert read_facts(record.newest_checkpoint(), "engine.json")["conditions"].keys() == CHANGES.keys()


def test_sigterm_saves_and_the_run_resumes(training, runs, unbroken):
    program = start("train.py", *training, "--name", "told-to-stop")
    program.wait_for("epoch  2/12")
    program.send(signal.SIGTERM)
    done = program.end()
    assert done.code == STOPPED, done.text
    record = RunFolder(runs / "told-to-stop")
    step = int(record.newest_checkpoint().name.removeprefix("step-"))
    assert 2 * STEPS_PER_EPOCH <= step < EPOCHS * STEPS_PER_EPOCH and f"stopped after step {step} and saved" in done.out
    assert f"resuming  after step {step}" in run("train.py", *training, "--name", "told-to-stop").out
    assert_same_as(record, unbroken)


def test_a_killed_run_resumes_from_its_last_checkpoint(training, runs, unbroken):
    program = start("train.py", *training, "--name", "killed")
    program.wait_for("epoch  4/12")
    program.send(signal.SIGKILL)
    done = program.end()
    assert done.code == -signal.SIGKILL, done.text
    record = RunFolder(runs / "killed")
    step = int(record.newest_checkpoint().name.removeprefix("step-"))
    # A power loss may also leave a checkpoint being written, a partial line and a partial file.
    for left in (record.folder / "state").glob("unfinished-*"):
        shutil.rmtree(left)  # where the kill interrupted a write
    half = record.folder / "state" / "unfinished-step-00000099"
    half.mkdir()
    (half / "state.safetensors").write_bytes(b"half")
    with (record.folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 9, "st')
    (record.folder / "run.json").write_text('{"settings": {')
    said = run("train.py", *training, "--name", "killed").out
    assert f"resuming  after step {step}" in said
    assert (
        "note      the run ended while step-00000099 was being written; the partial checkpoint is now "
        "state/damaged-step-00000099" in said
    )
    assert f"note      run.json was lost or damaged and is restored from step-{step:08d}" in said
    assert_same_as(record, unbroken)
    assert checkpoints(record) == ["damaged-step-00000099", "step-00000044", LAST]


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(training, runs, unbroken):
    record = RunFolder(runs / "killed-early")
    record.create(unbroken.facts())
    record.append_metrics(unbroken.metrics()[0])  # written just before the missing checkpoint
    said = run("train.py", *training, "--name", "killed-early", "--stop-at", STEPS_PER_EPOCH + 1, code=STOPPED).out
    assert "resuming" not in said
    assert results(record) == results(unbroken)[:1]


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_is_used(training, runs, unbroken):
    record = copy_of(unbroken, runs / "damaged")
    damaged = (record.folder / "state" / LAST).rename(record.folder / "state" / "step-00000046")
    (damaged / "state.safetensors").write_bytes((damaged / "state.safetensors").read_bytes()[:1000])
    (damaged / "progress.json").write_text(
        (damaged / "progress.json").read_text().replace("true", "false")
    )  # it was the last one's
    said = run("train.py", *training, "--name", "damaged").out
    assert (
        "note      step-00000046 is damaged (state.safetensors does not match its checksum); it is now "
        "state/damaged-step-00000046" in said
    )
    assert "resuming  after step 44 of 48" in said
    assert_same_as(record, unbroken)


def test_without_an_intact_checkpoint_nothing_is_overwritten(training, runs, unbroken):
    record = copy_of(unbroken, runs / "all-damaged")
    shutil.rmtree(record.folder / "state" / LAST)
    (record.folder / "state" / "step-00000044" / "engine.json").unlink()
    weights = (record.folder / "weights.safetensors").read_bytes()
    for sentence in (
        "has 12 finished epochs, but no intact checkpoint; step-00000044 is damaged (engine.json is missing)",
        "has 12 finished epochs, but no intact checkpoint. Start over with --fresh",
    ):
        done = run("train.py", *training, "--name", "all-damaged", code=1)
        assert sentence in done.err and "Traceback" not in done.err
    assert (record.folder / "weights.safetensors").read_bytes() == weights and results(record) == results(unbroken)


def limited(size: int, *words: str) -> None:
    """Run train.py on a disk that allows no file of more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    run_script("train.py", *words)


@pytest.fixture
def small_disk(tmp_path):
    """A separate disk of 6 MB; skipped where this process may not mount one."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("may not mount a disk here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_ends_the_run_with_a_sentence_and_it_resumes_with_free_space(training, unbroken, small_disk):
    here = [*training, "--runs-dir", small_disk, "--name", "full", "--checkpoint-every", "3steps"]
    program = start("train.py", *here)
    program.wait_for("epoch  3/12")
    with (small_disk / "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 14)):
                pass
        except OSError:
            pass
    done = program.end()
    assert (
        done.code == 1
        and "No space left on device" in done.err
        and "free or repair the disk" in done.err.lower()
        and "Traceback" not in done.err
    )
    record = RunFolder(small_disk / "full")
    whole = record.newest_checkpoint()
    assert whole is not None and not list((record.folder / "state").glob("unfinished-*"))
    (small_disk / "ballast").unlink()
    assert "resuming  after step" in run("train.py", *here).out
    assert_same_as(record, unbroken)


def test_a_write_that_fails_in_the_background_ends_the_run_with_a_sentence(training, runs, unbroken):
    words = [str(word) for word in (*training, "--name", "too-large", "--checkpoint-every", "3steps")]
    done = Program(limited, (100_000, *words), {}).end()  # the weights fit, but not the state
    assert done.code == 1 and "error: the checkpoint after step 3 could not be written (File too large" in done.err
    assert (
        "there is no earlier one; free or repair the disk and start the same run again" in done.err
        and "Traceback" not in done.err
    )
    run("train.py", *words)
    assert_same_as(RunFolder(runs / "too-large"), unbroken)


# --- changed conditions -------------------------------------------------------------------------------------------


def test_resuming_under_edited_code_is_rejected_with_the_file_or_allowed_and_noted(training, runs, unbroken):
    record = copy_of(unbroken, runs / "edited")
    shutil.rmtree(record.folder / "state" / LAST)
    facts = record.facts()
    assert "models/attention.py" in facts["code"]["files"]
    facts["code"]["files"]["models/attention.py"] = "0" * 16  # as if it had another content when the run started
    (record.folder / "run.json").write_text(json.dumps(facts))
    words = [*training, "--name", "edited"]
    done = run("train.py", *words, code=1)
    assert "the code has changed since the run started: models/attention.py. Start it as before" in done.err
    run("train.py", *words, "--allow-inexact-resume")
    (change,) = record.facts()["changes"]
    assert change["what"] == ["the code has changed since the run started: models/attention.py"]


def test_resuming_under_other_conditions_is_rejected_with_the_reason_or_allowed_and_noted(training, runs, unbroken):
    record = copy_of(unbroken, runs / "moved")
    shutil.rmtree(record.folder / "state" / LAST)
    words = [*training, "--name", "moved", "--source", "resident"]
    done = run("train.py", *words, code=1)
    assert (
        "would not resume as the same training: image source: tensor before, resident now (pixels differ by" in done.err
    )
    assert (
        "--allow-inexact-resume" in done.err
        and checkpoints(record) == ["step-00000044"]
        and "changes" not in record.facts()
    )
    said = run("train.py", *words, "--allow-inexact-resume", "--strategy", "ddp").out
    assert (
        "note      from step 44 on not bitwise the same as an uninterrupted run: strategy: zero before, ddp "
        "now (same sums" in said
    )
    assert "image source: tensor before, resident now" in said
    (change,) = record.facts()["changes"]
    assert change["after_step"] == 44 and len(change["what"]) == 2
    assert results(record)[:-1] == results(unbroken)[:-1] and len(results(record)) == EPOCHS


def test_a_run_may_resume_with_another_form_of_compilation_but_not_in_another_named_precision(unbroken, runs):
    record = copy_of(unbroken, runs / "elsewhere")
    shutil.rmtree(record.folder / "state" / LAST)
    facts = json.loads(json.dumps(record.facts()))
    assert facts["settings"].get("compile", "auto") == "auto"
    facts["settings"]["compile"] = "off"
    assert choose_folder(runs, "elsewhere", False, facts)[0].folder == record.folder
    with pytest.raises(RunError, match="holds a run of other settings .*compile_evaluation"):
        choose_folder(runs, "elsewhere", False, facts | {"settings": facts["settings"] | {"compile_evaluation": True}})
    facts["settings"]["engine"]["bf16"]["enabled"] = True
    with pytest.raises(RunError, match="holds a run of other settings .*bf16.enabled"):
        choose_folder(runs, "elsewhere", False, facts)


def test_a_run_resumes_without_the_resizing_that_had_no_effect(unbroken, runs):
    """Earlier commits trained with it on full images, and recorded it; this one turns it off before the run starts."""
    record = copy_of(unbroken, runs / "rounded")
    shutil.rmtree(record.folder / "state" / LAST)
    facts = record.facts()
    record.create(facts | {"settings": {**facts["settings"], "resizing": {"initial_scale": 0.9, "fraction": 0.5}}})
    assert choose_folder(runs, "rounded", False, facts)[0].folder == record.folder
    record.create(facts | {"settings": {**facts["settings"], "resizing": {"initial_scale": 0.5, "fraction": 0.5}}})
    with pytest.raises(RunError, match="holds a run of other settings .*initial_scale"):
        choose_folder(runs, "rounded", False, facts)


def test_two_processes_resume_with_the_same_bits_and_one_process_with_a_note(training, runs):
    common = [str(word) for word in (*training, "--max-steps", 8, "--checkpoint-every", "3steps")]
    run_ranks(2, "train.py", *common, "--name", "pair")
    run_ranks(2, "train.py", *common, "--name", "pair-stopped", "--stop-at", "6", code=STOPPED)
    stopped = RunFolder(runs / "pair-stopped")
    alone = copy_of(stopped, runs / "pair-to-one")
    run_ranks(2, "train.py", *common, "--name", "pair-stopped")
    assert_same_as(stopped, RunFolder(runs / "pair"))
    said = run("train.py", *common, "--name", "pair-to-one").out
    assert (
        "note      from step 6 on not bitwise the same as an uninterrupted run: processes: 2 before, 1 now (same sums"
        in said
    )
    assert "other dropout masks" in said and "micro-batch size: 32 before, 64 now" in said
    assert results(alone)[0] == results(stopped)[0] and len(results(alone)) == 2


def test_the_commands_for_a_finished_run_can_be_typed_as_they_are(unbroken, tmp_path):
    """The folder of the runs and the name have a space."""
    record = copy_of(unbroken, tmp_path / "my runs" / "a b")
    for changes, command in (
        ({}, f"python evaluate.py '{record.folder}'"),
        ({"max_steps": 100}, f"--name 'a b-longer' --init-weights '{record.folder}/weights.safetensors'"),
    ):
        with pytest.raises(RunFinishedError, match=command):
            choose_folder(record.folder.parent, "a b", False, record.facts() | changes)


def test_a_second_run_into_one_folder_is_rejected_and_a_kill_releases_it(training, runs):
    first = start("train.py", *training, "--name", "locked", "--epochs", 1000)
    first.wait_for("epoch    1/1000")
    second = run("train.py", *training, "--name", "locked", "--epochs", 1000, code=1)
    assert f"locked is in use: process {first.process.pid} on " in second.err and "Traceback" not in second.err
    assert first.process.is_alive()
    first.send(signal.SIGKILL)
    first.end()
    RunFolder(runs / "locked").lock()
