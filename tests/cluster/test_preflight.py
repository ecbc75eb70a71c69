"""The preflight without several machines: a host's answer, the problems in it, and the documentation of every message.

    ./run_tests.sh tests/cluster/test_preflight.py

test_several_hosts.py runs it on simulated hosts.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from cluster import host_checks as checks
from cluster import preflight, probe, remote
from cluster.remote import Host, Unreachable
from common.paths import PROJECT
from image_data.preparation.prepare import prepare

# --- a host's answer, and the problems in it -----------------------------------------------------------------------

GPU = {"index": "0", "name": "H200", "total": 141000, "free": 140000, "driver": "580.1"}
NOW = time.time()
GOOD = {
    "project": True,
    "cwd": True,
    "commit": "a" * 40,
    "code": {"train.py": "1", "training/loop.py": "2"},
    "given": {"/my.toml": "9"},
    "environment": {
        "python": "3.11.7",
        "torch": "2.11.0",
        "cuda": "13.0",
        "deepspeed": "0.19.8",
        "dali": "2.4.0",
        "numpy": "2.1",
    },
    "gpus": [GPU, {**GPU, "index": "1"}],
    "data": {"fingerprint": "sha256:abc", "sizes": {"packed/train.npy": 10}, "missing": []},
    "disk": 100,
    "shm": 60,
    "cores": 8,
    "asked": NOW,
    "time": NOW + 1,
    "arrived": NOW + 2,
    "addresses": [["eth0", "10.0.0.1"]],
}
HOSTS = [Host("node1", 2), Host("node2", 2)]


def problems_of(change, on_cpu=False):
    """The problems when the second of two hosts differs from a good one."""
    second = copy.deepcopy(GOOD)
    for path, value in change.items():
        tree, *keys = path.split(".")
        if keys:
            second[tree] = {**second[tree], keys[0]: value}
        else:
            second[tree] = value
    return checks.check(HOSTS, [GOOD, second], GOOD, on_cpu)


def test_hosts_that_agree_have_no_problem():
    assert problems_of({}) == []
    assert problems_of({"environment.python": "3.11.9"}) == []


@pytest.mark.parametrize(
    "change, sentence, is_warning",
    [
        ({"code": {}, "project": False}, "does not have the project", False),
        (
            {"commit": "b" * 40, "code": {"train.py": "1", "training/loop.py": "3"}},
            "another commit (bbbbbbbb, here aaaaaaaa): training/loop.py",
            False,
        ),
        ({"code": {"train.py": "1"}}, "the same commit, but other uncommitted changes: training/loop.py", False),
        ({"cwd": False}, "does not have your current folder", False),
        ({"given": {}}, "does not have /my.toml", False),
        ({"given": {"/my.toml": "8"}}, "other content in /my.toml", False),
        ({"environment": None}, "no usable Python environment", False),
        ({"environment.torch": "2.7.0"}, "other versions: torch 2.7.0 (node1: 2.11.0)", False),
        ({"environment.python": "3.10.2"}, "has Python 3.10 (node1: 3.11)", False),
        ({"gpus": [GPU]}, "has 1 GPUs and 2 slots", False),
        ({"gpus": []}, "shows no GPU", False),
        ({"gpus": [GPU, {**GPU, "index": "1", "free": 12000}]}, "GPU 1: 12 of 138 GB free", True),
        ({"gpus": [{**GPU, "name": "A100"}] * 2}, "other GPUs (A100) than node1 (H200)", True),
        ({"data": None}, "does not have the dataset", False),
        ({"data": {"fingerprint": "sha256:xyz", "sizes": {}}}, "another dataset (xyz, elsewhere abc)", False),
        ({"data.sizes": {"packed/train.npy": 4}}, "incomplete copy of the dataset (packed/train.npy)", False),
        ({"data.missing": ["/big/a.png"]}, "does not have images of the dataset (/big/a.png)", False),
        ({"disk": 0.1}, "0.1 GB left", False),
        ({"disk": 3}, "3 GB left", True),
        ({"shm": 0.06}, "/dev/shm", True),
        ({"time": NOW - 600}, "clock that is 600 s behind", True),
        ({"time": NOW + 90}, "clock that is 88 s ahead", True),
    ],
)
def test_a_difference_is_reported_for_the_right_host(change, sentence, is_warning):
    (problem,) = problems_of(change)
    assert problem.host == "node2" and sentence in problem.what and problem.warning == is_warning and problem.fix


def test_gpus_do_not_count_on_the_cpu_and_a_dataset_that_no_host_has_is_no_problem():
    assert problems_of({"gpus": []}, on_cpu=True) == []
    nobody = {**GOOD, "data": None}
    assert checks.check(HOSTS, [nobody, nobody], nobody, False) == []


def test_the_table_has_a_row_per_host_and_marks_differences():
    other = {
        **GOOD,
        "commit": "b" * 40,
        "code": {},
        "environment": {**GOOD["environment"], "torch": "2.7.0"},
        "gpus": [GPU],
    }
    hosts = [*HOSTS, Host("node3", 1)]
    rows = checks.table(
        hosts, [GOOD, other, Unreachable("does not answer", "-")], GOOD, {"node1": "ok"}, False
    ).splitlines()
    assert [row.split()[0] for row in rows] == ["host", "node1", "node2", "node3"]
    assert (
        "!" not in rows[1]
        and "missing!" in rows[2]
        and "2.7.0!" in rows[2]
        and "1/2!" in rows[2]
        and "does not answer" in rows[3]
    )


@pytest.mark.parametrize(
    "code, words, reason",
    [
        (255, "me@a: Permission denied (publickey).", "refuses the key"),
        (255, "Host key verification failed.", "unknown or changed host key"),
        (255, "ssh: Could not resolve hostname a: Name or service not known", "does not resolve"),
        (255, "ssh: connect to host a port 22: Connection refused", "no SSH server"),
        (255, "ssh: connect to host a port 22: No route to host", "does not answer"),
        (127, "bash: line 1: python3: command not found", "has no python3"),
        (255, "something new", "something new"),
        (255, "", "exit code 255"),
        (1, "PermissionError: [Errno 13] Permission denied: '/a'", "(PermissionError: [Errno 13] Permission denied"),
    ],
)
def test_messages_of_ssh_are_explained(code, words, reason):
    assert reason in remote.explain("a", code, words).reason


def test_the_probe_runs_in_a_bare_python_and_reports_the_host(tmp_path, shapes):
    project = tmp_path / "project"
    (project / "cluster").mkdir(parents=True)
    (project / "runs").mkdir()
    for path in ("train.py", "cluster/job.py", "runs/no.py"):
        (project / path).write_text(path)
    (tmp_path / "git/worktrees/one").mkdir(parents=True)
    (tmp_path / "git/worktrees/one/HEAD").write_text("ref: refs/heads/main\n")
    (tmp_path / "git/worktrees/one/commondir").write_text("../..\n")
    (tmp_path / "git/packed-refs").write_text(f"# packed\n{'d' * 40} refs/heads/main\n")
    (project / ".git").write_text("gitdir: ../git/worktrees/one\n")
    request = {
        "project": str(project),
        "python": sys.executable,
        "data": str(shapes),
        "given": [str(project / "train.py"), "/nowhere", "/proc/self/mem"],  # the last one exists, but cannot be read
    }
    words = [sys.executable, "-I", "-S", "-", json.dumps(request)]
    done = subprocess.run(
        words, input=(PROJECT / "cluster/probe.py").read_text(), capture_output=True, text=True, timeout=60
    )
    answer = remote.answer_in(f"Welcome!\n{done.stdout}", "probe.py")
    assert sorted(answer["code"]) == ["cluster/job.py", "train.py"] and answer["commit"] == "d" * 40
    assert answer["data"]["fingerprint"] == json.loads((shapes / "dataset.json").read_text())["fingerprint"]
    assert list(answer["given"]) == [str(project / "train.py")]
    assert answer["environment"]["torch"] and answer["environment"]["deepspeed"] and answer["environment"]["cuda"]
    assert abs(checks.skew({**answer, "asked": time.time() - 60, "arrived": time.time()})) == 0


def test_the_probe_names_images_that_lie_outside_the_data_folder_and_are_not_there(tree, tmp_path):
    def missing() -> list[str]:
        return probe.data_of(str(tmp_path / "data"))["missing"]

    prepare(tmp_path / "data", root=tree, pack_limit_gib=0)
    assert missing() == []
    tree.rename(tmp_path / "elsewhere")
    first, last = "big dog/image 0.png", "cat/image {}.png"
    due = [f"train/{first}", f"train/{last.format(2)}", f"test/{first}", f"test/{last.format(1)}"]
    assert missing() == [str(tree / path) for path in due]
    (tmp_path / "elsewhere").rename(tree)
    prepare(tmp_path / "data", root=tree, force=True)
    shutil.rmtree(tree)
    assert missing() == []  # training reads the packed pixels


def test_all_files_that_the_command_line_needs_are_compared(tmp_path, monkeypatch):
    for folder in ("here", "home", "presets"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("import neighbor, torch\n")
        (tmp_path / folder / "neighbor.py").touch()
        (tmp_path / folder / "unused.py").touch()
    (tmp_path / "presets/mine.toml").write_text('[model]\nattention = "mine.py:Attention"\n')
    (tmp_path / "home/weights").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def given(*arguments: str) -> list[str]:
        paths = preflight.request("python", tmp_path / "data", tmp_path / "runs", [*arguments])["given"]
        return [str(Path(path).relative_to(tmp_path)) for path in paths]

    for words in (
        ["--set", "model.feed_forward=mine.py:F"],
        ["--set=model.feed_forward=mine.py:F"],
        ['x="mine.py:F.a"'],
    ):
        assert given(*words) == ["here/mine.py", "here/neighbor.py"]
    assert given("--set", "model.feed_forward=~/mine.py:F") == ["home/mine.py", "home/neighbor.py"]
    assert given("--preset=../presets/mine.toml") == ["presets/mine.py", "presets/mine.toml", "presets/neighbor.py"]
    assert given("--init-weights=~/weights") == given("--init-weights", "~/weights") == ["home/weights"]
    assert given("--set", "model.feed_forward=absent.py:F", "--name", "x" * 300) == []


def test_answers_of_nvidia_smi_are_read():
    text = "0, NVIDIA H200, 143771, 143000, 580.65.06\n1, NVIDIA H200, [N/A], [N/A], 580.65.06\n"
    assert [(gpu["index"], gpu["total"]) for gpu in probe.gpus_of(text)] == [("0", 143771), ("1", None)]
    assert probe.gpus_of("") == []


def test_a_connection_is_checked_and_measured():
    listener = subprocess.Popen(
        [sys.executable, "-", json.dumps({"role": "listen", "token": "t", "seconds": 20})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        listener.stdin.write((PROJECT / "cluster/reachability.py").read_text())
        listener.stdin.close()
        port = remote.answer_in(listener.stdout.readline(), "reachability.py")["port"]
        asked = {"role": "connect", "token": "t", "port": port, "addresses": ["127.0.0.1"], "measure": True}
        reached = remote.ask("localhost", "reachability.py", asked)["reached"]["127.0.0.1"]
        assert reached["gigabits"] > 0 and reached["latency_ms"] > 0 and reached["here"] == "127.0.0.1"
        stranger = remote.ask("localhost", "reachability.py", {**asked, "token": "u"})["reached"]["127.0.0.1"]
        assert "error" in stranger
    finally:
        listener.kill()
        listener.wait()


def test_links_are_measured_at_the_interface_that_training_uses(monkeypatch):
    asked = []

    def ask(name, script, request):
        asked.extend(request["addresses"])
        return {"reached": {"10.0.0.2": {"gigabits": 9.4, "latency_ms": 0.1}}}

    monkeypatch.setattr(preflight, "listening", lambda name: nullcontext((21000, "t")))
    monkeypatch.setattr(remote, "ask", ask)
    answer = {"addresses": [["docker0", "172.17.0.1"], ["eth0", "10.0.0.2"]]}
    (line,) = preflight.measure(HOSTS, [answer, answer], {"node1": "docker0", "node2": "eth0"})
    assert asked == ["10.0.0.2"] and line.startswith("node1 -> node2: 9.4 Gbit/s")


def test_a_master_address_that_is_a_name_leads_to_the_interface_of_the_first_host_too(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    answers = [{"addresses": [["eth0", "10.0.0.1"], ["lo", "127.0.0.1"]]}] * 2
    found, problems = preflight.find_rendezvous([Host("localhost", 1), Host("127.0.0.1", 1)], answers)
    assert found.address == "localhost" and found.interfaces == {"localhost": "lo", "127.0.0.1": "lo"}
    assert problems == []


# --- the documentation --------------------------------------------------------------------------------------------

READS_ON = re.compile(r"(has|does|is|cannot|could|refuses|closes|gives|shows) ")  # after a host's name
PREFLIGHT = [PROJECT / "cluster" / name for name in ("host_checks.py", "preflight.py", "remote.py", "sync.py")]


def texts(tree):
    """All string literals of a program; each inserted value is a NUL."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def messages():
    """All messages of the preflight and --sync about a host, as patterns; found by first words and constructors."""
    found = set()
    for path in PREFLIGHT:
        tree = ast.parse(path.read_text())
        found |= {text for text in texts(tree) if READS_ON.match(text)}
        for call in (
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Problem", "Unreachable")
        ):
            said = call.args[call.func.id == "Problem"]
            if isinstance(said, (ast.Constant, ast.JoinedStr)):
                text = next(texts(said))
                assert READS_ON.match(text) or text.startswith("\0"), (
                    f"{path.name}: '{text}' is not checked against the docs: add its verb to READS_ON"
                )
    return {text: re.compile(".+".join(map(re.escape, text.split("\0")))) for text in found}


def test_the_documentation_lists_every_message_and_no_other():
    page = (PROJECT / "docs/cluster.md").read_text()
    rows = re.findall(r"^\| (.+?) \|", page.split("## Preflight messages")[1].split("\n## ")[0], re.MULTILINE)
    listed = [message for row in rows if row not in ("message", "---") for message in row.split("; ")]
    said = messages()
    assert len(said) > 30
    missing = [
        text.replace("\0", "...")
        for text, pattern in said.items()
        if not any(pattern.match(message) for message in listed)
    ]
    assert not missing, f"docs/cluster.md does not list: {missing}"
    stale = [message for message in listed if not any(pattern.match(message) for pattern in said.values())]
    assert not stale, f"docs/cluster.md lists messages that do not exist: {stale}"
