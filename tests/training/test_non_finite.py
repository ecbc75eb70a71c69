"""Non-finite losses and gradients: detected, reported with their images, or skipped on all processes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import run
from reference import batches, make_engine, perform, settings_for, with_batch_norm
from safetensors.torch import load, load_file
from small_runs import EPOCHS, STEPS_PER_EPOCH, STOPPED, checkpoints

from benchmarks.lib.forked_programs import Program, run_script
from common.errors import RunError, SettingsError
from image_data.augmentation import epoch_order
from image_data.dataset import Dataset
from records.checkpoint_store import Checkpoints, Interval
from records.run_folder import Progress, RunFolder
from training.checkpoint_writer import CheckpointWriter, Snapshot
from training.non_finite import LossMonitor, NonFiniteStep, check_finite, describe

BAD_STEP = 3  # of the engines, counted from 1
ENGINES = {
    "ddp": ("ddp", []),
    "fsdp": ("fsdp", []),
    "gossip": ("gossip", []),
    "zero 1": ("zero", []),
    "zero 1 in bf16": ("zero", ["bf16.enabled=true"]),
    "zero 3": ("zero", ["zero_optimization.stage=3"]),
}
SEEN = {
    **ENGINES,
    "zero 0": ("zero", ["zero_optimization.stage=0"]),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
    "unclipped": ("ddp", ["gradient_clipping=0.0"]),
}


def poisoned(engine):
    """The engine's batches; in the last process, those of step BAD_STEP hold a pixel that is not a number."""
    for i, (images, labels) in enumerate(batches(engine)):
        if i // engine.batch_sizes.accumulation == BAD_STEP - 1 and engine.data_shard[0] == engine.data_shard[1] - 1:
            images = images.clone()
            images[0, 0, 0, 0] = float("nan")
        yield images, labels


def job(out: str) -> None:
    """What each engine makes of a step that is bad in one process: asked to skip it, and not asked."""
    import torch.distributed as dist

    results: dict = {}
    for name, (strategy, overrides) in ENGINES.items():
        for kind, build in (("", None), (", batch norm", with_batch_norm)):
            engine = make_engine(
                strategy, settings_for("gradient_accumulation_steps=2", "ema.decay=0.5", *overrides), build
            )
            engine.skip_bad_steps()
            stream, skipped, states = poisoned(engine), [], []
            for _ in range(BAD_STEP + 2):
                engine.train_batch(stream)
                skipped.append(engine.all_gather_objects(engine.skipped))
                states.append(engine.gather_state())
            results[name + kind] = {"skipped": skipped, "states": states, "step": engine.step}
    for name, (strategy, overrides) in SEEN.items():
        engine = make_engine(strategy, settings_for(*overrides))
        stream, norms = poisoned(engine), []
        for _ in range(BAD_STEP):
            engine.train_batch(stream)
            norms.append(float(engine.grad_norm))
        results[f"seen by {name}"] = engine.all_gather_objects((norms, engine.skipped))
    if os.environ["RANK"] == "0":
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict:
    return perform(tmp_path_factory.mktemp("bad-steps") / "on-two", 2, job)


@pytest.mark.parametrize("name", [name + kind for name in ENGINES for kind in ("", ", batch norm")])
def test_a_bad_step_in_one_process_is_skipped_in_all_and_leaves_nothing(on_two, name):
    case = on_two[name]
    assert (
        case["skipped"] == [[False] * 2] * (BAD_STEP - 1) + [[True] * 2] + [[False] * 2] * 2
        and case["step"] == BAD_STEP + 2
    )
    before, after, later = (case["states"][i] for i in (BAD_STEP - 2, BAD_STEP - 1, -1))
    assert before.keys() == after.keys() and any(key.rpartition("ema/")[1] for key in after)
    if name.startswith("gossip"):  # the workers still average, which brings them closer
        assert all(value.isfinite().all() for value in after.values())
    else:
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(value.isfinite().all() for value in later.values())
    assert any(not torch.equal(later[key], after[key]) for key in after if key.endswith("weight"))


@pytest.mark.parametrize("name", SEEN)
def test_the_gradients_norm_shows_a_bad_step_without_being_asked(on_two, name):
    seen = on_two[f"seen by {name}"]
    if name == "gossip":  # each worker has a gradient of its own
        seen = seen[1:]
    for norms, skipped in seen:
        assert not skipped and [math.isfinite(norm) for norm in norms] == [True] * (BAD_STEP - 1) + [False]
    assert len({round(norms[0], 4) for norms, _ in seen}) == 1  # one norm, of the whole gradient


# --- detection ----------------------------------------------------------------------------------------------------


def test_losses_are_read_late_and_the_first_bad_step_is_found():
    monitor = LossMonitor()
    for i, (loss, norm) in enumerate(((2.0, 1.0), (1.5, 1.0), (1.0, math.inf), (math.nan, math.nan))):
        monitor.add(10 + i, i, torch.tensor(loss), torch.tensor(norm))
        assert monitor.bad is None  # the device is not synchronized yet
    monitor.collect()
    assert (monitor.bad.step, monitor.bad.index, monitor.bad.what, monitor.bad.own) == (
        12,
        2,
        "the gradient's norm is inf",
        False,
    )


def test_every_loss_is_returned_once():
    monitor = LossMonitor()
    monitor.add(1, 0, torch.tensor(2.0), None)
    monitor.add(2, 1, torch.tensor(1.5), None)
    assert monitor.collect() == [(1, 2.0), (2, 1.5)] and monitor.collect() == [] and monitor.bad is None
    assert check_finite(7, 6, math.nan, math.nan).what == "the loss is nan" and check_finite(7, 6, 1.0, 1.0) is None


def test_a_state_with_nan_is_never_saved(tmp_path):
    record = RunFolder(tmp_path)
    record.create({})
    writer = CheckpointWriter(
        SimpleNamespace(step=4, any=bool), Interval(), {}, record, Checkpoints(tmp_path / "state", 2)
    )
    weights = {"a": torch.tensor([1.0, math.nan])}
    writer.write(Snapshot(4, {"weights/a": weights["a"]}, {}, {"weights.safetensors": weights}, [0.0], 0.0), Progress())
    with pytest.raises(
        RunError,
        match="weights/a contains NaN after step 4, so this state is not saved; the last checkpoint is unchanged",
    ):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_images_of_a_bad_step_are_those_of_all_its_micro_batches_on_the_process_with_the_bad_loss(tmp_path, rank):
    asked, bad = [], NonFiniteStep(step=13, index=3, what="the loss is nan", own=True)
    only_gradient = NonFiniteStep(step=13, index=3, what="the gradient's norm is nan", own=False)
    seen = [only_gradient, bad]

    def all_gather_objects(value):
        if isinstance(value, NonFiniteStep):
            return seen
        return [value, ["7\tcat/7.png\tcat"]] if rank == 0 else [[], value]

    def positions(epoch, start, stop):
        asked.append((epoch, start, stop))
        return torch.tensor([7])

    split = SimpleNamespace(paths=[f"cat/{i}.png" for i in range(9)], labels=[0] * 9)
    training = SimpleNamespace(
        source="tensor", split=split, dataset=SimpleNamespace(classes=["cat"]), positions=positions
    )
    engine = SimpleNamespace(batch_sizes=SimpleNamespace(accumulation=4), all_gather_objects=all_gather_objects)
    first, text = describe(engine, seen[rank], training, Progress(epoch=2), tmp_path)
    assert first == bad and "its 1 images, 7 cat/7.png cat" in text
    assert asked == ([] if rank == 0 else [(2, 12, 16)])  # index 3 of 4 micro-batches each
    assert (tmp_path / "bad_steps" / "step-00000013.txt").read_text() == "7\tcat/7.png\tcat\n"


# --- in a run -----------------------------------------------------------------------------------------------------


def test_a_deepspeed_that_does_not_check_the_norm_cannot_skip(monkeypatch):
    """As 0.16, the one of the environment for CUDA 11."""
    from parallel import zero

    monkeypatch.delattr(zero.stage_1_and_2, "is_invalid_grad_norm")
    engine = SimpleNamespace(stage=1, refuse_own_count=lambda: None)
    with pytest.raises(SettingsError, match="--skip-bad-steps does not work with DeepSpeed"):
        zero.Engine.skip_bad_steps(engine)


def poisoned_train(epoch: int, index: int, *words: str) -> None:
    """Run train.py with a NaN pixel in batch `index` of epoch `epoch`."""
    from dali_pipeline import Batches

    plain = Batches.epoch

    def epoch_of(self, number=0, start=0, stop=None):
        for i, (images, labels) in enumerate(plain(self, number, start, stop), start):
            if self.training and (number, i) == (epoch, index):
                images = images.clone()
                images[0, 0, 0, 0] = float("nan")
            yield images, labels

    Batches.epoch = epoch_of
    run_script("train.py", *words)


def test_a_bad_step_stops_the_run_with_its_images_and_can_be_skipped(training, runs, shapes):
    words = [str(word) for word in (*training, "--name", "poisoned", "--checkpoint-every", "1step")]
    bad_step = STEPS_PER_EPOCH + 3
    done = Program(poisoned_train, (1, 2, *words), {}).end()
    assert (
        done.code == 1
        and f"error: the loss is nan at optimizer step {bad_step}; the last checkpoint is unchanged" in done.err
    )
    assert "--skip-bad-steps" in done.err and "Traceback" not in done.err
    record = RunFolder(runs / "poisoned")
    assert record.newest_checkpoint().name == f"step-{bad_step - 1:08d}"
    train = Dataset.open(shapes).splits["train"]
    due = epoch_order(0, 1, len(train))[2 * 64 : 3 * 64]
    listed = [
        line.split("\t") for line in (record.folder / "bad_steps" / f"step-{bad_step:08d}.txt").read_text().splitlines()
    ]
    assert [(int(position), path) for position, path, _ in listed] == [(i, train.paths[i]) for i in due]
    assert f"its 64 images, {due[0]} {train.paths[due[0]]}" in done.err
    done = Program(poisoned_train, (1, 2, *words, "--skip-bad-steps"), {}).end()
    assert done.code == 0 and f"skipped   step {bad_step}: the loss is nan; its 64 images, " in done.out
    lines = record.metrics()
    assert [line["skipped_steps"] for line in lines] == [0, 1, *[0] * (EPOCHS - 2)]
    assert all(math.isfinite(line["train_loss"]) for line in lines) and lines[1]["train_loss"] == pytest.approx(
        lines[0]["train_loss"], rel=0.1
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_checkpoint(training, runs):
    exploding = [
        *training,
        "--name",
        "exploding",
        "--set",
        "optimizer.params.lr=1e30",
        "--set",
        "schedule.warmup_fraction=0.0",
    ]
    run("train.py", *exploding, "--stop-at", 1, code=STOPPED)
    record = RunFolder(runs / "exploding")
    before = (record.newest_checkpoint() / "state.safetensors").read_bytes()
    done = run("train.py", *exploding, code=1)
    assert (
        "error: the loss is nan at optimizer step 2; the last checkpoint is unchanged" in done.err
        and "Traceback" not in done.err
    )
    assert (
        checkpoints(record) == ["step-00000001"]
        and (record.newest_checkpoint() / "state.safetensors").read_bytes() == before
    )
    assert not (record.folder / "weights.safetensors").exists()
    done = run("train.py", *exploding, "--skip-bad-steps", code=1)
    assert (
        "error: 10 steps in a row had a loss or a gradient that is not finite" in done.err
        and "optimizer.params.lr" in done.err
    )
    first, last = load(before), load_file(record.newest_checkpoint() / "state.safetensors")
    assert all(torch.equal(first[key], last[key]) for key in first)  # skipped steps change nothing
