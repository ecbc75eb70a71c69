"""The small programs of benchmarks/: that they run, and that what they report follows from what they measured. No test looks at a speed.

    pytest tests/benchmarks/test_small_benchmarks.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest
from programs import run

from benchmarks import peer_averaging
from common.errors import RunError


def test_both_evaluations_of_a_tree_and_an_mlp_take_turns(tmp_path):
    done = run("benchmarks/tree_evaluation.py", "--depths", 2, 3, "--width", 8, "--images", 2, "--rounds", 2, "--devices", "cpu",
               "--json", tmp_path / "tree.json")
    rows = json.loads((tmp_path / "tree.json").read_text())["rows"]
    assert [(row["depth"], row["phase"]) for row in rows] == [(2, "forward"), (2, "training"), (3, "forward"), (3, "training")]
    for row in rows:
        # A binary tree whose nodes are neurons: a path visits one a level.
        assert row["neurons"] == 2 ** (row["depth"] + 1) - 1 and row["used"] == row["depth"] + 1
        assert set(row["seconds"]) == {"mask", "path", "mlp"} and all(len(times) == 2 for times in row["seconds"].values())
        assert row["median_seconds"] == {name: statistics.median(times) for name, times in row["seconds"].items()}
    assert done.out.count("depth 2") == done.out.count("depth 3") == 2


def test_the_share_of_watching_is_that_of_its_pieces(tmp_path):
    done = run("benchmarks/tracking_overhead.py", "--epochs", 4, "--epoch-seconds", 5, "--json", tmp_path / "watching.json")
    found = json.loads((tmp_path / "watching.json").read_text())
    assert set(found["seconds"]) == set(found["times"]) and all(seconds >= 0 for seconds in found["seconds"].values())
    assert found["times"]["TensorBoard: an epoch"] == 4 and found["times"]["a sample of utilisation"] == 20 / 2
    total = sum(found["times"][name] * seconds for name, seconds in found["seconds"].items())
    assert found["share"] == pytest.approx(total / 20) and f"{100 * found['share']:.2f}%" in done.out


@pytest.mark.timeout(120)
def test_peers_that_average_share_every_bit_of_every_exchange(tmp_path):
    run("benchmarks/peer_averaging.py", "--systems", "torchft", "--pairs", 2, "--rounds", 2, "--repeats", 1, "--no-churn", "--parameters", 2000,
        "--step-seconds", 0.05, "--json", tmp_path / "peers.json", "--markdown", tmp_path / "peers.md")
    report = json.loads((tmp_path / "peers.json").read_text())
    (steady,) = report["results"]["torchft"]["2 peers"]
    assert steady["exchanges"] == steady["shared"] == steady["same_bits"] >= 4 and steady["loss"][1] < steady["loss"][0]
    text = (tmp_path / "peers.md").read_text()
    assert report["commit"][:10] in text and "hivemind" not in text


@pytest.mark.parametrize(("python", "message"), [(sys.executable, "has no hivemind"), ("nowhere/python", "does not start")])
def test_a_python_without_hivemind_is_named(python, message):
    with pytest.raises(RunError, match=message):
        peer_averaging.hivemind_version(Path(python))
