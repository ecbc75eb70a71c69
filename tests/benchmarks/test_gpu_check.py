"""benchmarks/gpu_check.py: parts end within their limits, say what they found, and do not end one another.

pytest tests/benchmarks/test_gpu_check.py            without the parts that take minutes; those: -m slow
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_check
from benchmarks.lib.gpu_check_parts import CIFAR100_ACCURACY, PARTS, Check, NotReached, Part, Skipped, train_figures
from config.settings import Settings
from records.run_folder import RunFolder

PROJECT = Path(gpu_check.__file__).resolve().parent


def python(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


def part(code: str, read=lambda check, log: {"said": log.splitlines()[-1]}, limit: float = 30) -> Part:
    return Part("made for this test", lambda check: python(code), read, limit, limit)


def check_with(monkeypatch, tmp_path: Path, parts: dict[str, Part], *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "FIRST", ("first",))
    monkeypatch.setattr(Part, "limit", lambda self, check: self.limit_seconds)
    code = gpu_check.main(["--parts", ",".join(parts), "--out", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "check.json").read_text())


def test_a_part_that_fails_hangs_or_crashes_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    def disappoint(check, log):
        raise NotReached("3 % where 5 % was due")

    began = time.monotonic()
    code, report = check_with(
        monkeypatch,
        tmp_path,
        {
            "good": part("print('all well')"),
            "raises": part("raise ValueError('no such thing')"),
            "hangs": part(
                "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(99)'])", limit=1
            ),
            "crashes": part("import os; os.abort()"),
            "disappoints": part("pass", disappoint),
            "last": part("print('still here')"),
        },
    )
    found = {entry["name"]: entry for entry in report["parts"]}
    assert code == 1 and time.monotonic() - began < 60
    assert [entry["status"] for entry in report["parts"]] == [
        "passed",
        "failed",
        "failed",
        "failed",
        "failed",
        "passed",
    ]
    assert found["good"]["figures"] == {"said": "all well"} and found["last"]["figures"] == {"said": "still here"}
    assert "ValueError: no such thing" in found["raises"]["words"] and "raises.log" in found["raises"]["words"]
    assert "took too long" in found["hangs"]["words"] and "exit code -6" in found["crashes"]["words"]
    page, printed = (tmp_path / "check.md").read_text(), capsys.readouterr().out
    assert "3 % where 5 % was due" in page and "3 % where 5 % was due" in printed
    assert "2 passed, 4 failed, 0 skipped" in printed


def test_what_a_part_left_running_is_ended(monkeypatch, tmp_path):
    """A daemon that a part started and that outlives it, in its session."""
    mark, daemon = tmp_path / "mark", tmp_path / "daemon.py"
    daemon.write_text(
        f"import pathlib, time\nwhile True:\n    pathlib.Path({str(mark)!r}).write_text(str(time.time()))\n    time.sleep(0.05)\n"
    )
    code = (
        f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, {str(daemon)!r}])\n"
        f"while not os.path.exists({str(mark)!r}): time.sleep(0.05)\nprint('left it')"
    )
    assert check_with(monkeypatch, tmp_path, {"one": part(code)})[0] == 0
    before = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_check_ends_what_is_at_work(shapes, tmp_path, number):
    """The device part, stopped as soon as it is there."""
    check = subprocess.Popen(
        [sys.executable, "benchmarks/gpu_check.py", "--parts", "device", "--data-dir", shapes, "--out", tmp_path],
        cwd=PROJECT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children, deadline = [], time.monotonic() + 30
    while not children:
        assert time.monotonic() < deadline and check.poll() is None
        time.sleep(0.01)
        with suppress(psutil.Error):  # one that asked for GPUs or the commit has just ended
            children = [
                child
                for child in psutil.Process(check.pid).children(recursive=True)
                if "device_facts" in " ".join(child.cmdline())
            ]
    check.send_signal(number)
    assert check.wait(30) != 0
    _, left = psutil.wait_procs(children, timeout=10)
    assert not left


def test_without_what_all_need_nothing_else_is_tried(monkeypatch, tmp_path, capsys):
    code, report = check_with(
        monkeypatch, tmp_path, {"first": part("raise SystemExit(2)"), "second": part("print('never')")}
    )
    assert code == 1 and [entry["name"] for entry in report["parts"]] == ["first"]
    assert "without first the other parts can say nothing" in capsys.readouterr().out


def test_the_machine_is_described_and_the_data_looked_for(shapes, tmp_path, capsys):
    """The real parts that take a moment, on whatever machine the tests run."""
    assert gpu_check.main(["--parts", "device", "--data-dir", str(shapes), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in report["parts"]] == [
        ("device", "passed"),
        ("prepare", "skipped"),
    ]
    assert report["commit"] and report["versions"]["torch"] and "cores" in report["device"]["CPU"]
    page = (tmp_path / "check.md").read_text()
    assert report["device"]["CPU"] in page and "TFLOP/s" in page and str(tmp_path) not in page + json.dumps(report)


def test_a_missing_dataset_or_part_is_named(tmp_path, capsys):
    assert (
        gpu_check.main(["--parts", "data", "--data-dir", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 1
    )
    assert "holds no prepared dataset" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_check.main(["--parts", "trian"])
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_the_list_names_every_part(capsys):
    assert gpu_check.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed and PARTS[name].what in printed for name in PARTS)


def test_the_training_part_wants_its_accuracy_and_the_same_count_twice(unbroken, shapes, tmp_path):
    """With the run of the other tests in place of its own."""
    last = RunFolder(unbroken.folder).metrics()[-1]
    (tmp_path / "run").symlink_to(unbroken.folder)
    check = Check(tmp_path, 0, False, shapes, None)
    for counted, message in ((last["test_correct"], None), (last["test_correct"] + 5, "evaluate.py")):
        (tmp_path / "evaluation.json").write_text(json.dumps({"correct": counted}))
        if message:
            with pytest.raises(NotReached, match=message):
                train_figures(check, "")
    (tmp_path / "evaluation.json").write_text(json.dumps({"correct": last["test_correct"]}))
    if last["test_accuracy"] >= 2 / 10:
        assert f"{100 * last['test_accuracy']:.1f} %" in train_figures(check, "")["test accuracy"]
    (tmp_path / "shapes").symlink_to(shapes)  # of the drawn shapes more is due
    with pytest.raises(NotReached, match="at least 40 % was due"):
        train_figures(Check(tmp_path, 0, True, None, None), "")
    assert CIFAR100_ACCURACY > 0.1


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["data", "engines", "compile"])
def test_the_tests_that_a_part_runs_exist(name, quick, num_gpus, tmp_path):
    if name == "compile" and "compile" not in {field.name for field in fields(Settings)}:
        pytest.skip("this version has no setting `compile`")
    try:
        [command] = PARTS[name].commands(Check(tmp_path, num_gpus, quick, None, None))
    except Skipped:
        assert not num_gpus
        return
    found = subprocess.run([*command, "--collect-only"], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_quick_check_passes(tmp_path):
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert {entry["name"] for entry in report["parts"]} == set(PARTS)
    assert {"train", "step", "input", "engines", "data"} <= {
        entry["name"] for entry in report["parts"] if entry["status"] == "passed"
    }
