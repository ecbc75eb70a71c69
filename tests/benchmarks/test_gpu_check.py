"""benchmarks/gpu_check.py: parts end within their limits, report their results, and do not affect one another.

pytest tests/benchmarks/test_gpu_check.py            without the parts that take minutes; those: -m slow
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from benchmarks import gpu_check
from benchmarks.lib import gpu_check_phases as phases
from benchmarks.lib.check import Check, NotReached, Part, Skipped
from benchmarks.lib.gpu_check_parts import PARTS, strategies_figures, train_figures
from benchmarks.lib.gpu_check_phases import PHASES
from common.paths import PROJECT
from image_data.dataset import Dataset
from records.provenance import commit_text


def python(code: str) -> list[list[str]]:
    return [[sys.executable, "-c", code]]


def part(code: str, read=lambda check, log: {"said": log.splitlines()[-1]}, limit: float = 30, **more) -> Part:
    return Part("part of this test", lambda check: python(code), read, limit, limit, **more)


def check_with(monkeypatch, tmp_path: Path, parts: dict[str, Part], *arguments: str) -> tuple[int, dict]:
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "PHASES", parts)
    monkeypatch.setattr(gpu_check, "FIRST", ("first",))
    monkeypatch.setattr(Part, "limit", lambda self, check: min(self.limit_seconds, check.seconds_left()))
    code = gpu_check.main(["--parts", ",".join(parts), "--out", str(tmp_path), *arguments])
    return code, json.loads((tmp_path / "check.json").read_text())


def test_a_part_that_fails_hangs_or_crashes_leaves_the_others_alone(monkeypatch, tmp_path, capsys):
    def disappoint(check, log):
        raise NotReached("3 %, expected 5 %")

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
            "surprises": part("pass", lambda check, log: {"ms": 1e3 * None}),
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
        "failed",
        "passed",
    ]
    assert found["good"]["figures"] == {"said": "all well"} and found["last"]["figures"] == {"said": "still here"}
    assert "ValueError: no such thing" in found["raises"]["words"] and "raises.log" in found["raises"]["words"]
    assert "exceeded its time limit" in found["hangs"]["words"] and "exit code -6" in found["crashes"]["words"]
    page, printed = (tmp_path / "check.md").read_text(), capsys.readouterr().out
    assert "3 %, expected 5 %" in page and "3 %, expected 5 %" in printed
    assert "2 passed, 5 failed, 0 skipped" in printed


def test_a_part_that_is_cut_off_keeps_its_figures(monkeypatch, tmp_path):
    """Such as a run whose epochs so far are on the disk."""
    mark = tmp_path / "epochs"
    code = f"import pathlib, time; pathlib.Path({str(mark)!r}).write_text('7'); time.sleep(60)"
    parts = {"long": part(code, lambda check, log: {"epochs": mark.read_text()}, limit=2)}
    code, report = check_with(monkeypatch, tmp_path, parts)
    assert code == 1 and report["parts"][0]["status"] == "failed" and report["parts"][0]["figures"] == {"epochs": "7"}
    assert (
        "exceeded its time limit" in (tmp_path / "check.md").read_text()
        and "epochs: 7" in (tmp_path / "check.md").read_text()
    )


def test_a_timed_check_ends_in_time_and_reports_what_it_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "LEAST_SECONDS", 2.0)
    parts = {"hangs": part("import time; time.sleep(60)", limit=50), "late": part("print('never')")}
    began = time.monotonic()
    code, report = check_with(monkeypatch, tmp_path, parts, "--minutes", "0.06", "--small")
    assert code == 1 and time.monotonic() - began < 20
    assert [(entry["status"], entry["words"]) for entry in report["parts"]][1] == ("skipped", "no time left")


def test_the_report_is_written_after_each_part(monkeypatch, tmp_path):
    """A check that is killed loses the part at work only."""
    seen = {}

    def look(check, log):
        seen.update(json.loads((check.out / "check.json").read_text()))
        return {}

    check_with(monkeypatch, tmp_path, {"one": part("print('done')"), "two": part("pass", look)})
    assert [entry["name"] for entry in seen["parts"]] == ["one"] and seen["parts"][0]["figures"] == {"said": "done"}


def test_commands_of_a_part_can_run_at_once(monkeypatch, tmp_path):
    """Each waits for the file of the other."""
    files = [str(tmp_path / name) for name in "ab"]
    code = (
        "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch()\n"
        "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)\n"
        "print('met')"
    )
    commands = [[sys.executable, "-c", code, *order] for order in (files, files[::-1])]
    both = Part(
        "part of this test", lambda check: commands, lambda check, log: {"met": log.count("\nmet")}, 60, 60, True
    )
    failing = Part(
        "part of this test", lambda check: [*commands, *python("raise SystemExit(3)")], both.read, 60, 60, True
    )
    code, report = check_with(monkeypatch, tmp_path, {"both": both, "failing": failing})
    assert code == 1 and [entry["status"] for entry in report["parts"]] == ["passed", "failed"]
    assert [entry["figures"] for entry in report["parts"]] == [{"met": 2}, {"met": 2}]
    assert "exit code 3" in report["parts"][1]["words"] and "failing-3.log" in report["parts"][1]["words"]


@pytest.mark.parametrize("group", ["None", "os.setpgrp"], ids=["of the part", "of its own"])
def test_what_a_part_left_running_is_ended(monkeypatch, tmp_path, group):
    """A process that a part started in its session, in some process group, and that outlives it."""
    mark, daemon = tmp_path / "mark", tmp_path / "daemon.py"
    daemon.write_text(
        f"import pathlib, time\nwhile True:\n"
        f"    pathlib.Path({str(mark)!r}).write_text(str(time.time()))\n    time.sleep(0.05)\n"
    )
    code = (
        f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, {str(daemon)!r}], preexec_fn={group})\n"
        f"while not os.path.exists({str(mark)!r}): time.sleep(0.05)\nprint('left it')"
    )
    assert check_with(monkeypatch, tmp_path, {"one": part(code)})[0] == 0
    before = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_check_ends_its_processes(shapes, tmp_path, number):
    """The device part, stopped as soon as its process exists."""
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
    # Its parent has ended, so it may wait for the first process of the machine to collect it.
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)


def test_nothing_else_runs_if_a_part_fails_that_all_others_need(monkeypatch, tmp_path, capsys):
    code, report = check_with(
        monkeypatch, tmp_path, {"first": part("raise SystemExit(2)"), "second": part("print('never')")}
    )
    assert code == 1 and [entry["name"] for entry in report["parts"]] == ["first"]
    assert "first failed, and the other parts need it" in capsys.readouterr().out


def test_the_report_describes_the_machine(shapes, tmp_path, capsys):
    """The real parts that take a moment, on whatever machine the tests run."""
    assert gpu_check.main(["--parts", "device", "--data-dir", str(shapes), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert [(entry["name"], entry["status"]) for entry in report["parts"]] == [
        ("device", "passed"),
        ("prepare", "skipped"),
    ]
    assert report["versions"]["torch"] and "cores" in report["device"]["CPU"]
    page = (tmp_path / "check.md").read_text()
    assert f"commit: {commit_text(report)}\n" in page
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


def test_the_training_part_checks_its_accuracy_and_the_count_of_evaluate(unbroken, shapes, tmp_path):
    """With the last line of the run of the other tests, and another accuracy."""
    last = unbroken.metrics()[-1]
    (tmp_path / "run").mkdir()

    def figures(check: Check, accuracy: float, evaluated: int) -> dict:
        line = {**last, "test_accuracy": accuracy, "test_correct": 14}
        (tmp_path / "run/metrics.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / "evaluation.json").write_text(json.dumps({"correct": evaluated}))
        return train_figures(check, "")

    check = Check(tmp_path, 0, False, shapes, None)
    assert figures(check, 0.2, 14)["test accuracy"].startswith("20.0 % after 12 epochs")
    with pytest.raises(NotReached, match=r"evaluate\.py 19"):
        figures(check, 0.2, 19)
    with pytest.raises(NotReached, match="expected at least 20 %"):
        figures(check, 0.19, 14)
    (tmp_path / "shapes").symlink_to(shapes)  # the drawn shapes need a higher accuracy
    with pytest.raises(NotReached, match="expected at least 40 %"):
        figures(Check(tmp_path, 0, True, None, None), 0.39, 14)


@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ["data", "engines", "compile"])
def test_the_tests_that_a_part_runs_exist(name, quick, num_gpus, tmp_path):
    """Each word that selects tests stands in the name of a test, or of a case of one."""
    try:
        [command] = PARTS[name].commands(Check(tmp_path, num_gpus, quick, None, None))
    except Skipped:
        assert not num_gpus
        return
    [file] = [PROJECT / word for word in command if word.startswith("tests/")]
    lines = [line for line in file.read_text().splitlines() if line.startswith("def test_") or '"' in line]
    chosen = re.sub(r"\bnot \w+|\b(and|or)\b", " ", command[command.index("-k") + 1]).split()
    assert chosen and all(any(word in line for line in lines) for word in chosen), command


def check_after(tmp_path: Path, **facts) -> Check:
    """Return a check of a GPU that begins after the files in its output folder were written."""
    facts = {"num_gpus": 1, "quick": False, "data_dir": None, "archive": None, **facts}
    return Check(tmp_path, began=time.time() + 10, **facts)


def test_results_of_an_earlier_check_do_not_count(shapes, tmp_path):
    """Each part that reads a file: it reports nothing, or that the file was not written."""
    (tmp_path / "runs/speedrun-seed0").mkdir(parents=True)
    (tmp_path / "runs/speedrun-seed0/metrics.jsonl").write_text('{"epoch": 1}\n')
    for name in ("device", "kernel", "parts", "input_pipeline", "profile-100ep", "training_step", "compile_modes"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"batch": 1, "turns": {"on": {"step_ms": [1e6]}}}))
    check = check_after(tmp_path, data_dir=shapes, end_at=time.monotonic() + 600)
    for name in ("device", "kernel", "input", "step-100ep", "step", "modes", "parallel", "parts"):
        with pytest.raises(FileNotFoundError, match="was not written"):
            PHASES[name].read(check, "")
    assert PHASES["seeds"].read(check, "") == {}
    assert phases.long_epochs(check) > 1  # planned with the speed of the earlier check, there would be none


def test_a_check_replaces_the_report_of_an_earlier_one_at_once(monkeypatch, tmp_path):
    (tmp_path / "check.json").write_text('{"parts": ["earlier"]}')
    (tmp_path / "old.json").write_text("7")
    os.utime(tmp_path / "old.json", (1, 1))
    seen = []
    parts = {
        "old": part("pass", lambda check, log: {"read": check.read("old.json")}),
        "new": part(
            f"open({str(tmp_path / 'new.json')!r}, 'w').write('8')",
            lambda check, log: (
                seen.append(json.loads(check.read("check.json"))["parts"]) or {"read": check.read("new.json")}
            ),
        ),
    }
    code, report = check_with(monkeypatch, tmp_path, parts)
    assert [entry["figures"] for entry in report["parts"]] == [{}, {"read": "8"}]
    assert "old.json was not written" in report["parts"][0]["words"] and [one["name"] for one in seen[0]] == ["old"]


def test_a_relative_path_of_an_archive_refers_to_the_current_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        gpu_check.main(["--archive", "one.zip"])
    assert "--archive one.zip does not exist; check the path" in capsys.readouterr().err
    Path("one.zip").touch()
    check = gpu_check.make_check(gpu_check.parse_arguments(["--archive", "one.zip"]), 0.0)
    assert check.archive == tmp_path / "one.zip"


@pytest.mark.parametrize("known", [PARTS, PHASES], ids=["parts", "phases"])
def test_another_archive_is_prepared_again(shapes, tmp_path, known):
    archives = [tmp_path / "a" / "one.zip", tmp_path / "b" / "other.zip"]
    for archive in archives:
        archive.parent.mkdir()
        archive.write_bytes(b"12")
    check = check_after(tmp_path, archive=archives[0])
    [command] = known["prepare"].commands(check)
    assert command[command.index("--archive") + 1] == str(archives[0]) and "--force" not in command
    shutil.copytree(shapes, check.data)
    (check.data / "prepared_from.json").write_text(json.dumps({"archive": "one.zip", "bytes": 2}))
    with pytest.raises(Skipped, match="one.zip is already prepared"):
        known["prepare"].commands(check)
    [command] = known["prepare"].commands(check_after(tmp_path, archive=archives[1]))
    assert command[command.index("--archive") + 1] == str(archives[1]) and command[-1] == "--force"


def test_a_rehearsal_or_a_plain_check_leaves_the_timed_check_its_own_images(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.lib.check.PROJECT", tmp_path / "empty")
    small, large = check_after(tmp_path, small=True), check_after(tmp_path)
    shutil.copytree(shapes, large.data)
    for check, images in ((small, "2000"), (large, "50000")):
        [command] = phases.prepare_commands(check)
        assert command[-1] == images
        shutil.copytree(shapes, command[2])


# --- timed phases -------------------------------------------------------------------------------------------------


def blocked(folder: Path, *packages: str) -> str:
    """Return a folder for PYTHONPATH that makes packages look as if they were not installed."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"""import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name in {packages!r} or name.startswith(tuple(p + "." for p in {packages!r})):
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
"""
    )
    return str(folder)


def rehearse(tmp_path: Path, monkeypatch, *arguments: str, without: tuple[str, ...] = ()) -> tuple[int, dict]:
    """Run `gpu_check.sh --small` in a process of its own, with this Python, without some packages."""
    monkeypatch.setenv("PYTHONPATH", blocked(tmp_path / "blocked", *without))
    monkeypatch.setenv("PYTHON", sys.executable)
    words = [str(PROJECT / "gpu_check.sh"), "--small", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1400)
    report = tmp_path / "out" / "check.json"
    assert report.is_file(), done.stdout + done.stderr
    return done.returncode, json.loads(report.read_text())


def problems(report: dict) -> dict[str, str]:
    return {entry["name"]: entry["words"] for entry in report["parts"] if entry["status"] != "passed"}


def test_a_rehearsal_trains_without_dali_and_deepspeed(tmp_path, monkeypatch):
    """The last phase, on the data that the rehearsal writes itself."""
    code, report = rehearse(
        tmp_path, monkeypatch, "--minutes", "6", "--parts", "long", without=("nvidia.dali", "deepspeed")
    )
    assert code == 0 and problems(report) == {}, report
    [(name, found)] = report["parts"][-1]["figures"].items()
    assert name == "long-100ep" and "speed only (no CIFAR-100) after 1 epochs, 3 steps" in found
    assert report["small"] and report["parts"][1]["figures"] == {
        "dataset": "noise-2000",
        "train": "2,000",
        "test": "400",
    }


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("without", [(), ("nvidia.dali", "deepspeed")], ids=["all packages", "without DALI, DeepSpeed"])
def test_the_full_rehearsal_passes(tmp_path, monkeypatch, without):
    code, report = rehearse(tmp_path, monkeypatch, "--minutes", "20", without=without)
    assert [entry["name"] for entry in report["parts"]] == list(PHASES)
    assert code == 0 and problems(report) == {}, problems(report)
    assert all(entry["figures"] for entry in report["parts"])


def test_the_phases_come_in_order_of_value():
    order = list(PHASES)
    assert order[:2] == ["device", "prepare"] and order[-1] == "long"
    assert order.index("tests") < order.index("input") < order.index("step-speedrun") < order.index("seeds")
    assert sum(PHASES[name].limit_seconds for name in order[: order.index("seeds") + 1]) < 15 * 60
    assert min(PHASES[f"step-{preset}"].limit_seconds for preset in ("100ep", "300ep")) >= 150
    assert phases.START_SECONDS > 60  # compiling 100ep took as long on an H100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes: must be a number above 0, not 0"),
        (["--minutes", "5", "--quick"], "--quick does not apply to --minutes"),
        (["--small", "--parts", "seed"], "did you mean 'seeds'?"),
    ],
)
def test_invalid_flags_of_a_timed_check_are_rejected(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert message in capsys.readouterr().err


def test_a_memory_floor_that_was_not_counted_is_left_out(shapes, tmp_path):
    turn = {"step_ms": [10], "host_ms": [1], "memory_bytes": None, "warm_up_seconds": 2}
    report = {"batch": 100, "turns": {"on": turn}, "bytes_per_step": None, "copy_bytes_per_second": 1e9}
    (tmp_path / "profile-100ep.json").write_text(json.dumps(report))
    figures = PHASES["step-100ep"].read(Check(tmp_path, 1, False, shapes, None), "")
    assert list(figures) == ["on"] and "10.00 ms per step, 10,000 images/s" in figures["on"]


def test_strategies_without_a_reference_have_no_speed_up(tmp_path):
    common = {"processes": 2, "failed": None, "images_per_second": [100.0]}
    rows = [{"name": "one process", "processes": 1, "failed": "no memory"}, {"name": "ddp", **common}]
    rows.append({"name": "fsdp", **common, "speed_up": [1.5]})
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "strategies.json").write_text(json.dumps({"rows": rows}))
    assert strategies_figures(Check(tmp_path, 2, False, None, None), "") == {
        "one process x 1": "no memory",
        "ddp x 2": "100 images/s",
        "fsdp x 2": "100 images/s, 1.50 x one process",
    }


def test_the_long_recipe_gets_the_epochs_that_fit(shapes, tmp_path):
    """At the speed of its profile: 1,000 images/s, and overhead per epoch and per run."""
    images = len(Dataset.open(shapes).splits["train"])
    (tmp_path / "profile-100ep.json").write_text(
        json.dumps({"batch": 100, "turns": {"on": {"step_ms": [90, 100, 110]}}})
    )
    overhead = phases.START_SECONDS + phases.ENDING_SECONDS
    for seconds, epochs in ((overhead + 0.5, 0), (overhead + 5.5 * (images / 1000 + 0.9), 5)):
        check = Check(tmp_path, 1, False, shapes, None, end_at=time.monotonic() + seconds)
        assert max(0, phases.long_epochs(check)) == epochs
    assert "--epochs 5" in " ".join(phases.long_commands(check)[0])
    with pytest.raises(Skipped, match="no time left for one epoch"):
        phases.long_commands(Check(tmp_path, 1, False, shapes, None, end_at=time.monotonic() + 60))


@pytest.mark.parametrize(
    ("installed", "loaders"), [(True, "tensor,whole_batch,resident"), (False, "tensor,whole_batch")]
)
def test_phases_use_dali_and_deepspeed_only_where_installed(monkeypatch, shapes, tmp_path, installed, loaders):
    monkeypatch.setattr(phases, "is_installed", lambda package: installed or package == "pytest")
    check = Check(tmp_path, 1, False, shapes, None, end_at=time.monotonic() + 600)
    [command] = phases.input_commands(check)
    assert command[command.index("--loaders") + 1] == loaders
    [command] = phases.baseline_commands(check)
    assert command[command.index("--strategies") + 1] == "ddp" + ",zero 1" * installed
    marks = {command[command.index("-m", 3) + 1] for command in phases.test_commands(check)}
    assert marks == {"gpu" + " and not needs_dali and not needs_deepspeed" * (not installed)}


def test_the_script_installs_nothing_for_a_timed_check(tmp_path):
    """A Python without PyTorch is an error that says what to do; pip is not started."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    copy = tmp_path / "gpu_check.sh"
    copy.write_text((PROJECT / "gpu_check.sh").read_text())
    copy.chmod(0o755)
    done = subprocess.run(
        [copy, "--minutes", "1"], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "lacks PyTorch, NumPy, Pillow, safetensors or tqdm. Set PYTHON=" in done.stderr


@pytest.mark.parametrize("package", ["torch", "safetensors"])
def test_a_python_without_a_package_that_the_parts_import_is_not_used(tmp_path, monkeypatch, package):
    monkeypatch.setenv("PYTHONPATH", blocked(tmp_path / "blocked", package))
    monkeypatch.setenv("PYTHON", sys.executable)
    done = subprocess.run(
        [shutil.copy(PROJECT / "gpu_check.sh", tmp_path), "--small"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "lacks PyTorch, NumPy, Pillow, safetensors or tqdm" in done.stderr


def test_help_and_parts_need_no_pytorch(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", blocked(tmp_path / "blocked", "torch", "PIL", "safetensors", "tqdm"))
    monkeypatch.setenv("PYTHON", sys.executable)
    for word, said in (("--help", "usage: "), ("--list", "train")):
        done = subprocess.run([PROJECT / "gpu_check.sh", word], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and said in done.stdout and not done.stderr


@pytest.mark.parametrize(("deepspeed", "strategy"), [(False, ["--strategy", "ddp"]), (True, ["--fresh"])])
def test_the_training_part_installs_no_missing_package(shapes, tmp_path, monkeypatch, deepspeed, strategy):
    """The launcher would, and is used only where nothing is missing."""
    check = Check(tmp_path, 1, False, shapes, None)
    assert PARTS["train"].commands(check)[0][1] == str(PROJECT / "launch_local_train.sh")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("benchmarks.lib.gpu_check_parts.is_installed", lambda package: deepspeed)
    command = PARTS["train"].commands(check)[0]
    assert command[:2] == [str(python), str(PROJECT / "train.py")] and command[-len(strategy) :] == strategy


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_full_quick_check_passes(tmp_path):
    assert gpu_check.main(["--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert {entry["name"] for entry in report["parts"]} == set(PARTS)
    assert {"train", "step", "input", "engines", "data"} <= {
        entry["name"] for entry in report["parts"] if entry["status"] == "passed"
    }
