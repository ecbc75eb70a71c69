"""benchmarks/parallel_runs.py: all processes start together, a failed one is named, MPS is ended, ratios are right."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import parallel_runs
from benchmarks.lib.check import Check
from benchmarks.lib.gpu_check_phases import parallel_figures
from benchmarks.parallel_runs import rows, turn, why_no_mps
from common.errors import RunError
from config.settings import resolve

OPTIONS = Namespace(seconds=0.1, side=16)
# A worker that notes what it sees; its rate is its number + 1.
WORKER = """
import json, os, pathlib, sys, time
folder, number = pathlib.Path(sys.argv[1]), int(sys.argv[sys.argv.index("--number") + 1])
if number == FAILS:
    sys.exit("error: no memory left")
time.sleep(0.2 * number)
assert not (folder / "go").exists()
(folder / f"ready-{number}").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
assert len(list(folder.glob("ready-*"))) == 3
NOTE
(folder / f"rate-{number}").write_text(json.dumps(number + 1))
"""


def use_worker(monkeypatch, tmp_path: Path, fails: int = -1, note: str = "") -> None:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.replace("FAILS", str(fails)).replace("NOTE", note))
    monkeypatch.setattr(parallel_runs, "WORKER", path)


def test_processes_wait_for_one_another_and_their_rates_are_summed(monkeypatch, tmp_path):
    use_worker(monkeypatch, tmp_path)
    assert turn({}, 3, "alone", OPTIONS) == 1 + 2 + 3


def test_a_failed_process_ends_the_turn_with_its_reason(monkeypatch, tmp_path):
    use_worker(monkeypatch, tmp_path, fails=1)
    with pytest.raises(RunError, match="process 2 of 3 failed: error: no memory left"):
        turn({}, 3, "alone", OPTIONS)


@pytest.mark.parametrize("fails", [-1, 0])
def test_mps_serves_the_workers_and_is_ended_afterwards(monkeypatch, tmp_path, fails):
    log, seen = tmp_path / "mps.log", tmp_path / "seen"
    program = tmp_path / "bin" / parallel_runs.MPS
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$CUDA_MPS_PIPE_DIRECTORY $* $(cat)" >>{log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    use_worker(monkeypatch, tmp_path, fails, f"open({str(seen)!r}, 'w').write(os.environ['CUDA_MPS_PIPE_DIRECTORY'])")
    if fails < 0:
        assert turn({}, 3, "mps", OPTIONS) == 6
    else:
        with pytest.raises(RunError, match="process 1 of 3 failed"):
            turn({}, 3, "mps", OPTIONS)
    started, ended = log.read_text().splitlines()
    pipe = started.split()[0]
    assert started.split()[1:] == ["-d"] and ended.split() == [pipe, "quit"]
    assert fails == 0 or seen.read_text() == pipe
    assert not Path(pipe).exists()


def test_mps_is_left_out_with_a_reason(monkeypatch):
    assert why_no_mps("cpu") == "there is no GPU"
    monkeypatch.setenv("PATH", "")
    assert why_no_mps("cuda") == "the program nvidia-cuda-mps-control is not installed"


def test_a_real_process_trains_the_preset(monkeypatch, tiny):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert turn(resolve(str(tiny), ["strategy=ddp"], strategy="ddp").as_dict(), 1, "alone", OPTIONS) > 0


def test_the_table_has_ratios_to_one_run():
    rates = {"1 alone": [100.0, 110.0], "2 alone": [150.0, 165.0], "2 mps": [200.0, 220.0]}
    report = {"images_per_second": rates, "failed": {"4 mps": "no memory left"}}
    assert rows(json.loads(json.dumps(report)))[1:] == [
        ["1", "off", "105 (100 .. 110)", "105", "1.00"],
        ["2", "off", "158 (150 .. 165)", "79", "1.50"],
        ["2", "on", "210 (200 .. 220)", "105", "2.00"],
        ["4", "on", "failed: no memory left", "", ""],
    ]


@pytest.mark.parametrize("error", [RunError("no memory left"), OSError("no memory left")], ids=["process", "MPS"])
def test_a_failed_turn_is_reported_and_the_finished_ones_are_kept(tmp_path, error):
    """The report is on the disk before each turn; a number of processes that failed has no further turns."""
    options, seen = Namespace(json=tmp_path / "report.json", rounds=2), []

    def good() -> float:
        seen.append(json.loads(options.json.read_text()) if options.json.exists() else {})
        return 100.0

    def bad() -> float:
        raise error

    report: dict = {"images_per_second": {}, "failed": {}}
    parallel_runs.measure({"1 alone": good, "4 mps": bad, "8 mps": good}, options, report)
    assert seen[1] == {"images_per_second": {"1 alone": [100.0]}, "failed": {"4 mps": "no memory left"}}
    assert report["images_per_second"] == {"1 alone": [100.0, 100.0], "8 mps": [100.0, 100.0]}
    (tmp_path / "parallel_runs.json").write_text(json.dumps({**report, "no_mps": None}))
    figures = parallel_figures(Check(tmp_path, 1, False, None, None), "")
    assert figures["1 at once"] == "100 images/s" and figures["4 mps failed"] == "no memory left"
