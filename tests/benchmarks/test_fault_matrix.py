"""Fault injection: a round of a few faults, and that a lost run would be noticed. All faults: -m slow."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from programs import run

from benchmarks import checkpoint_cost
from benchmarks.fault_matrix import as_table, difference, make_scene, may_mount, run_round, run_undisturbed
from benchmarks.lib.faults import FAULTS
from records.run_folder import RunFolder


class Scene(NamedTuple):
    folder: object
    words: list
    undisturbed: RunFolder
    seconds: float
    operations: int


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    folder = tmp_path_factory.mktemp("faults")
    words = make_scene(folder)
    return Scene(folder, words, *run_undisturbed(folder, words))


def survives(scene: Scene, fault: str, seed: int) -> None:
    outcome = run_round(fault, seed, *scene)
    assert outcome.lost is None, outcome.lost


@pytest.mark.parametrize("fault", ["killed-saving", "no-room", "cut"])
def test_a_run_survives(scene, fault):
    survives(scene, fault, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_survives_every_fault(scene, fault):
    if fault == "disk-full" and not may_mount():
        pytest.skip("this process may not mount a disk")
    for seed in range(2, 5):
        survives(scene, fault, seed)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("weights.safetensors", "weights.safetensors differs"),
        ("best.safetensors", "best.safetensors differs"),
        ("metrics.jsonl", "metrics.jsonl differs"),
    ],
)
def test_a_single_bit_is_noticed(scene, tmp_path, name, said):
    copy = RunFolder(shutil.copytree(scene.undisturbed.folder, tmp_path / "copy"))
    assert difference(copy, scene.undisturbed) is None
    path = copy.folder / name
    content = (
        path.read_text().replace('"test_correct": ', '"test_correct": 1').encode()
        if name == "metrics.jsonl"
        else path.read_bytes()[:-1] + b"x"
    )
    path.write_bytes(content)
    assert difference(copy, scene.undisturbed).startswith(said)


def test_the_table_counts_what_was_lost():
    from benchmarks.fault_matrix import Outcome

    table = as_table(
        [
            Outcome("cut", 0, 4, False, None),
            Outcome("cut", 1, 4, False, "weights differ"),
            Outcome("killed-saving", 2, 2, True, None),
        ]
    )
    assert "| 2 | 1 | 1 | 0 |" in table and "| 1 | 1 | 0 | 1 |" in table and table.endswith("| all | | 3 | 2 | 1 | 1 |")


def test_no_checkpoint_is_still_being_written_when_a_turn_begins(tmp_path, monkeypatch):
    events: list[str] = []

    class Writer:
        def __init__(self, *_):
            pass

        def take_snapshot(self, *_):
            return SimpleNamespace(seconds=0.0)

        def write(self, *_):
            events.append("write")

        def wait(self):
            events.append("wait")

    monkeypatch.setattr("training.checkpoint_writer.CheckpointWriter", Writer)
    engine = SimpleNamespace(device=torch.device("cpu"), weights=None, train_batch=lambda stream: events.append("step"))
    record = SimpleNamespace(folder=tmp_path, newest_checkpoint=lambda: tmp_path)
    checkpoint_cost.measure(engine, None, record, Namespace(steps=1, rounds=2))
    told = " ".join(events)
    assert "write" in told and "write step" not in told


def test_the_cost_of_checkpoints_is_measured_and_written(training, tmp_path):
    """It runs and reports its measurements; the figures are those of a busy moment."""
    preset, data_dir = training[1], training[3]
    run(
        "benchmarks/checkpoint_cost.py",
        "--preset",
        preset,
        "--data-dir",
        data_dir,
        "--steps",
        2,
        "--rounds",
        2,
        "--out",
        tmp_path / "cost",
    )
    facts, text = json.loads((tmp_path / "cost.json").read_text()), (tmp_path / "cost.md").read_text()
    assert len(facts["plain"]) == len(facts["saving"]) == len(facts["waited"]) == 2 and facts["bytes"] > 10_000
    assert f"**{100 * facts['share']:.2f} %**" in text and f"{facts['bytes'] / 1e6:.1f} MB per checkpoint" in text
