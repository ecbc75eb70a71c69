"""Bad input gets one sentence that names the problem and the fix, no traceback, and changes no existing run.

A table of cases, run one after the other in two forked processes. Hostfiles: tests/cluster. Archives: tests/image_data.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from bomb import Bomb
from safetensors.torch import load_file
from small_runs import copy_of

from benchmarks.lib.forked_programs import Program
from common.paths import PROJECT
from records.checkpoint_store import Checkpoints
from records.run_folder import RunFolder


@dataclass(frozen=True)
class Case:
    """Arguments of train.py, where `{place}` is the folder of `scene`; the expected message; what is replaced."""

    arguments: list[str]
    sentence: str
    code: int = 1
    broken: dict[str, Any] = field(default_factory=dict)  # "module.attribute": its replacement


def full_disk(path: Any) -> Any:
    return mock.Mock(free=1_000_000)


def out_of_memory(*_: Any, **__: Any) -> None:
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cannot(*_: Any, **__: Any) -> None:
    raise RuntimeError(
        "upsample_bicubic2d_backward_out_cuda does not have a deterministic implementation, but you set ..."
    )


SET, NAMED = "--set", ["--name", "mistaken"]
NEW = {  # none of these may leave a run folder
    # settings
    "unknown": Case(
        [SET, "model.widht=3"], "--set model.widht=3: unknown setting 'model.widht'; did you mean 'model.width'"
    ),
    "wrong type": Case(
        [SET, "model.depth=two"], "--set model.depth=two: model.depth must be of type int (now 2), not 'two'"
    ),
    "no value": Case(
        [SET, "model.depth"], "--set model.depth: write it as path=value, for example optimizer.params.lr=3e-4"
    ),
    "a group": Case([SET, "optimizer=3"], "optimizer is a group; its members are type, params"),
    "unused": Case(
        ["--strategy", "ddp", SET, "zero_optimization.stage=2"], "strategy ddp would not use zero_optimization.stage=2"
    ),
    "unused by this strategy": Case(
        [SET, "parallel.topology=complete"], "strategy zero would not use parallel.topology=complete"
    ),
    "unknown strategy": Case(["--strategy", "nought"], "unknown strategy 'nought'"),
    "unknown preset": Case(["--preset", "cpp"], "unknown preset 'cpp'; did you mean 'cpu'?"),
    "a preset that is not TOML": Case(["--preset", "{place}/broken.toml"], "broken.toml is not valid TOML"),
    "too large a batch": Case(
        [SET, "train_batch_size=301"], "the train split has 300 images, fewer than one global batch of 301"
    ),
    "too large a batch in parts": Case(
        [SET, "train_batch_size=302", SET, "gradient_accumulation_steps=2"],
        "the train split has 300 images, fewer than one global batch of 302",
    ),
    "a batch that does not divide": Case(
        [SET, "gradient_accumulation_steps=3"], "train_batch_size=64 is not divisible by 1 data-parallel processes"
    ),
    "a micro-batch that does not divide": Case(
        ["--micro-batch", "7"],
        "--micro-batch 7 does not divide a global batch of 64 on 1 process(es); "
        "choose 2, 4, 8 or another divisor of 64",
    ),
    "asking a GPU that is not there": Case(
        ["--micro-batch", "auto"], "--micro-batch auto measures GPU memory, and there is no GPU here"
    ),
    "skipping where it is impossible": Case(
        ["--skip-bad-steps", SET, "zero_optimization.stage=0"], "--skip-bad-steps needs zero_optimization.stage 1"
    ),
    "skipping with an optimizer that counts steps": Case(
        ["--skip-bad-steps", SET, "optimizer.type=Lamb", SET, "zero_optimization.stage=0"],
        "--skip-bad-steps: optimizer.type=Lamb counts its steps itself",
    ),
    "smaller images for a network of one size": Case(
        [SET, "model.architecture=dhvt-t-4", SET, "resizing.initial_scale=0.5"],
        "resizing.initial_scale=0.5: the network was built for images of 32 pixels and fails on the 16 pixels",
    ),
    "an empty validation split": Case(["--hold-out", "0.001"], "holding out 0.001 of the 30 training images"),
    "steps": Case(["--max-steps", "0"], "argument --max-steps: must be at least 1, not 0", 2),
    "epochs": Case(["--epochs", "few"], "argument --epochs: must be a whole number of at least 1, not few", 2),
    "stop": Case(["--stop-at", "-1"], "argument --stop-at: must be at least 1, not -1", 2),
    "interval": Case(
        ["--checkpoint-every", "5 hours"],
        "argument --checkpoint-every: write it as 500steps, 10min, 30s or epochs:5, not 5 hours",
        2,
    ),
    "no checkpoints": Case(["--keep-checkpoints", "0"], "argument --keep-checkpoints: must be at least 1, not 0", 2),
    # what is wrong is said before a dataset is prepared: no folder `new` may be there at the end
    **{
        f"before the data: {' '.join(words)}": Case(
            ["--data-dir", "{place}/new", "--dataset", "shapes", *words], sentence, code
        )
        for words, sentence, code in [
            ([SET, "model.feed_forward=gegl"], "unknown feed-forward 'gegl'; did you mean 'geglu'?", 1),
            (["--strategy", "fdsp"], "unknown strategy 'fdsp'; did you mean 'fsdp'?", 1),
            (["--hold-out", "10"], "argument --hold-out: must be a number between 0 and 1", 2),
            ([SET, "model.feed_forward_options.hiden=3"], "unknown option 'hiden'; did you mean 'hidden'?", 1),
            ([SET, "schedule.shape=cosin"], "unknown schedule.shape 'cosin'; did you mean 'cosine'?", 1),
            ([SET, "model.width=60000", SET, "model.depth=900"], "parameters, which need ", 1),
            ([SET, "optimizer.type=SGD", SET, "optimizer.params.momentum=0.0"], "optimizer.params", 1),
            ([SET, "model.dropout=1.5"], "model.dropout must be in [0, 1), got 1.5", 1),
            ([SET, "train_batch_size=0"], "train_batch_size must be >= 1, got 0", 1),
            ([SET, "parallel.topology=complete"], "strategy zero would not use parallel.topology=complete", 1),
            (["--strategy", "pipeline", SET, "channels_last=true"], "pipeline would not use channels_last", 1),
            ([SET, "optimizer.type=AdamWScheduleFree"], "needs a constant learning rate after the warmup", 1),
            (["--init-weights", "{place}/none.pt"], "none.pt: there is no such file", 1),
            (["--seed", "9" * 20], "argument --seed: must be a whole number from 0 to 9223372036854775807", 2),
            (["--name", ".."], "argument --name: must be a single folder name, not '..'", 2),
        ]
    },
    # the dataset
    "no archive": Case(
        ["--data-dir", "{place}/new", "--archive", "/nowhere.zip"], "--archive /nowhere.zip does not exist"
    ),
    "nothing there": Case(
        ["--data-dir", "{place}/new"],
        "new holds neither a prepared dataset nor images in train/<class>/. Check the path",
    ),
    "no list": Case(["--data-dir", "{place}/no-list"], "no-list is damaged"),
    "damaged facts": Case(["--data-dir", "{place}/no-facts"], "no-facts is damaged"),
    "damaged pixels": Case(
        ["--data-dir", "{place}/cut-pixels"],
        "packed/train.npy is damaged (mmap length is greater than file size). Run: python prepare_dataset.py",
    ),
    "pixels that are a pickle": Case(["--data-dir", "{place}/pickled-pixels"], "packed/train.npy is damaged"),
    # weights to start from
    "no weights": Case(["--init-weights", "{place}/none.pt"], "none.pt: there is no such file"),
    "pickled code": Case(["--init-weights", "{place}/bomb.pt"], "which could run code. If you trust it"),
    "weights cut short": Case(
        ["--init-weights", "{place}/cut.safetensors"], "cut.safetensors cannot be read as safetensors"
    ),
    "weights of another network": Case(["--init-weights", "{place}/other.pt"], "other.pt"),
    # the disk and the GPU
    "no folder for runs": Case(
        ["--runs-dir", "{place}/broken.toml/runs"],
        "mistaken cannot be written (Not a directory); choose another --runs-dir",
    ),
    "no room": Case([], "MB for its checkpoints and weights, and the disk of", broken={"shutil.disk_usage": full_disk}),
}
OLD = {  # these concern an existing run
    "a changed dataset": Case(
        ["--name", "changed", "--data-dir", "{place}/relabelled"], "the dataset's fingerprint was "
    ),
    "a missing image": Case(
        ["--name", "new", "--data-dir", "{place}/no-image", "--source", "files"],
        "(No such file or directory). Restore the file, or run: python prepare_dataset.py --data-dir ",
    ),
    "another architecture": Case(["--name", "other-network"], "the checkpoint holds another network: "),
    "other classes": Case(["--name", "other-classes"], "3.classify.weight is (9, 32), here (10, 32)"),
    "another kind of state": Case(
        ["--name", "gossiped"], "the checkpoint holds the state of one worker a process, for gossip"
    ),
    "another device": Case(
        ["--name", "from-a-gpu"], "would not resume as the same training: device type: GPU before, CPU now"
    ),
    "no memory": Case(
        ["--name", "new"],
        "out of GPU memory with a micro-batch of 64 images; 32 fit. Start the same run again with --micro-batch 32: "
        "2 accumulation steps give the same global batch",
        broken={"training.loop.Loop.run": out_of_memory},
    ),
    "no deterministic kernel": Case(
        ["--name", "new"],
        "--deterministic: upsample_bicubic2d_backward_out_cuda does not have a deterministic "
        "implementation; leave the flag out",
        broken={"training.loop.Loop.run": cannot},
    ),
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory, shapes, unbroken) -> Path:
    """A folder with everything that the cases need."""
    place = tmp_path_factory.mktemp("scene")
    (place / "broken.toml").write_text("epochs = ")
    datasets = {
        name: Path(shutil.copytree(shapes, place / name))
        for name in ("no-list", "no-facts", "cut-pixels", "pickled-pixels", "relabelled")
    }
    (datasets["no-list"] / "test_file_list.txt").unlink()
    (datasets["no-facts"] / "dataset.json").write_text('{"packed": true')
    os.truncate(datasets["cut-pixels"] / "packed" / "train.npy", 5000)
    with (datasets["pickled-pixels"] / "packed" / "train.npy").open("wb") as file:
        pickle.dump(Bomb(place / "executed"), file)
    facts = json.loads((shapes / "dataset.json").read_text())
    (datasets["relabelled"] / "dataset.json").write_text(json.dumps({**facts, "fingerprint": "another"}))
    no_image = Path(shutil.copytree(shapes, place / "no-image"))
    next((no_image / "images" / "train").glob("*/*.png")).unlink()
    torch.save({"model": Bomb(place / "executed")}, place / "bomb.pt")
    torch.save({"some.weight": torch.zeros(3)}, place / "other.pt")
    (place / "cut.safetensors").write_bytes((unbroken.folder / "weights.safetensors").read_bytes()[:500])
    for name in ("changed", "other-network", "other-classes", "gossiped", "from-a-gpu"):
        unfinished(copy_of(unbroken, place / "runs" / name), name)
    return place


def unfinished(record: RunFolder, name: str) -> None:
    """Turn a run into one with a single earlier checkpoint, which is changed as the name says."""
    shutil.rmtree(record.folder / "state" / "step-00000048")
    (folder,) = (record.folder / "state").iterdir()
    tensors = load_file(folder / "state.safetensors")
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".jsonl")}
    engine = json.loads(texts["engine.json"])
    head = next(key for key in tensors if key.startswith("weights/") and tensors[key].shape == (10, 32))
    if name == "other-network":
        tensors = {key: tensor for key, tensor in tensors.items() if "/3." not in key}
    elif name == "other-classes":
        tensors[head] = tensors[head][:9].contiguous()
    elif name == "gossiped":
        engine["kind"] = "one worker a process, for gossip"
    elif name == "from-a-gpu":
        engine["conditions"]["device"] = "GPU"
    texts["engine.json"] = json.dumps(engine)
    Checkpoints(record.folder / "state", 2).write(44, tensors, texts)


def attempt(cases: dict[str, Case], common: list[str], place: str, out: str) -> None:
    """Run every case in a process of its own, and write down exit code and stderr."""
    sys.path.insert(0, str(PROJECT))
    import train

    said = {}
    for name, case in cases.items():
        sys.argv = ["train.py", *common, *(word.format(place=place) for word in case.arguments)]
        screen = io.StringIO()
        with contextlib.ExitStack() as stack:
            for target, stand_in in case.broken.items():
                stack.enter_context(mock.patch(target, stand_in))
            stack.enter_context(contextlib.redirect_stderr(screen))
            try:
                code: Any = train.run()
            except SystemExit as end:
                code = end.code
            except BaseException as error:
                code = repr(error)
        said[name] = (code, screen.getvalue())
    Path(out).write_text(json.dumps(said))


def attempts(cases: dict[str, Case], training: list, place: Path, *more: str) -> dict[str, tuple[Any, str]]:
    out = place / "said.json"
    common = [*map(str, training), "--runs-dir", str(place / "runs"), *more]
    done = Program(attempt, (cases, common, str(place), str(out)), {}).end()
    assert done.code == 0, done.text
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def said(training, scene) -> dict[str, tuple[Any, str]]:
    return {**attempts(NEW, training, scene, *NAMED), **attempts(OLD, training, scene)}


@pytest.mark.parametrize("name", [*NEW, *OLD])
def test_bad_input_gets_one_sentence(said, name):
    case, (code, screen) = {**NEW, **OLD}[name], said[name]
    assert case.sentence in screen and code == case.code, f"{code}\n{screen}"
    assert "Traceback" not in screen
    if case.code == 1:
        (line,) = [line for line in screen.splitlines() if line.startswith("error")]
        assert case.sentence in line


def test_bad_input_creates_no_run_runs_no_code_and_changes_no_run(said, scene, unbroken):
    assert (
        not (scene / "runs" / "mistaken").exists()
        and not (scene / "executed").exists()
        and not (scene / "new").exists()
    )
    for name in ("changed", "other-network", "other-classes", "gossiped", "from-a-gpu"):
        record = RunFolder(scene / "runs" / name)
        assert record.newest_checkpoint().name == "step-00000044" and record.facts() == unbroken.facts()
        assert (record.folder / "weights.safetensors").read_bytes() == (
            unbroken.folder / "weights.safetensors"
        ).read_bytes()
