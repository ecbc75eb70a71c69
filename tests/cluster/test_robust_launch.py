"""The launcher against odd surroundings: a blocked screen, noisy login scripts, a busy port, stale code, strangers.

    ./run_tests.sh tests/cluster/test_robust_launch.py

Everything runs on this machine without root.
"""

from __future__ import annotations

import io
import os
import pickle
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from bomb import Bomb
from launching import environment
from programs import git, run, run_ranks

from cluster import host_checks, preflight, probe, remote, sync
from cluster.job import Agent, Job, message_in
from cluster.remote import Host
from cluster.screen import QueuedStream
from common.launch_facts import launch_facts_in
from common.machine import free_port
from common.paths import PROJECT
from parallel import plain_objects, process_group, rank_store

# --- a blocked screen ----------------------------------------------------------------------------------------------

CHATTY = """
import os, pathlib, time
out = pathlib.Path(os.environ["STUB_OUT"])
for line in range(4000):
    print("x" * 99, flush=True)
(out / "started").touch()
while not (out / "go").exists():
    time.sleep(0.05)
print("the end", flush=True)
"""


def test_a_blocked_screen_does_not_end_training(repo):
    (repo / "train.py").write_text(CHATTY)
    (repo / "hostfile").write_text("localhost slots=1\n")
    words = [sys.executable, str(repo / "cluster/run_hosts.py"), "--hostfile", str(repo / "hostfile")]
    variables = environment(repo, SILENCE_SECONDS="2", GRACE_SECONDS="1", DS_ACCELERATOR="cpu")
    launcher = subprocess.Popen(
        words, env=variables, cwd=repo, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    started = repo.parent / "started"
    deadline = time.monotonic() + 90
    while not started.exists() and launcher.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(6)  # three times the limit of silence, and nobody reads what the launcher prints
    (repo.parent / "go").touch()
    text = launcher.communicate(timeout=60)[0].decode()
    assert launcher.returncode == 0, text[-2000:]
    assert text.count("x" * 99) == 4000 and "the end" in text


class Blocked(io.StringIO):
    """A stream whose write blocks until `go` is set."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def write(self, text):
        self.go.wait()
        return super().write(text)


def test_a_queued_stream_never_blocks_and_reports_what_it_dropped():
    blocked = Blocked()
    stream = QueuedStream(blocked, max_waiting=3)
    began = time.monotonic()
    for number in range(10):
        print(f"line {number}", file=stream)
    assert time.monotonic() - began < 1 and not stream.drain(time.monotonic() + 0.1)
    blocked.go.set()
    assert stream.drain(time.monotonic() + 5)
    assert blocked.getvalue().startswith("line 0\n") and "pieces of output are not shown" in blocked.getvalue()


def test_a_closed_screen_does_not_end_the_launcher():
    reader, writer = os.pipe()
    os.close(reader)
    stream = QueuedStream(open(writer, "w"))
    print("to nobody", file=stream)
    assert stream.drain(time.monotonic() + 5)


def test_a_screen_without_unicode_shows_the_text_all_the_same():
    raw = io.BytesIO()
    stream = QueuedStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("é", file=stream)
    assert stream.drain(time.monotonic() + 5) and raw.getvalue() == b"\\xe9\n"


def test_a_host_that_reads_nothing_does_not_block_the_launcher():
    process = subprocess.Popen(["sleep", "30"], stdin=subprocess.PIPE, text=True)
    agent = Agent(Host("node1", 1), process)
    began = time.monotonic()
    agent.send("x" * 10**6)
    agent.send("beat")
    assert time.monotonic() - began < 1
    process.kill()
    process.wait()


# --- what hosts print, and what train.py prints -------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "end", "code": 0}',
        "agent: hello",
        "agent:{",
        'agent:["event"]',
        "agent:3",
        "Welcome!",
        'agent:{"a": 1}',
    ],
)
def test_what_a_login_script_prints_is_no_message_of_the_agent(line):
    assert message_in(line) is None


def test_a_marked_line_is_a_message():
    assert message_in('agent:{"event": "gone", "rank": 3}\n') == {"event": "gone", "rank": 3}


def test_an_answer_is_found_between_the_lines_of_a_login_script():
    assert remote.answer_in('probe: loading modules\nprobe:{"a": 1}\nprobe:[1]\nprobe: bye', "probe.py") == {"a": 1}
    assert remote.answer_in("probe: loading modules", "probe.py") == {}


def test_facts_of_the_run_are_learned_and_not_shown(capsys):
    agents = [SimpleNamespace(host=Host("node1", 2), heard=0.0, send=lambda words: sent.append(words))]
    job, sent = Job.__new__(Job), []  # without its agents, which would be started over SSH
    job.agents, job.name, job.folder, job.batch = agents, "job", "", None
    job.plan = SimpleNamespace(hosts=[Host("node1", 8), Host("node2", 8)])
    for text in ("epoch 1/2", 'facts for the launcher: ["/shared/runs/big", [1024, 2, 8]]'):
        job._handle(0, {"event": "line", "text": text})
    assert (job.folder, job.batch) == ("/shared/runs/big", (1024, 2, 2))  # 16 ranks in 8 shards
    assert sent == ["logs /shared/runs/big/logs/job/node1"] and capsys.readouterr().out == "epoch 1/2\n"


def test_train_py_prints_the_facts_for_the_launcher_alone_and_also_with_quiet(training, runs):
    words = (*training, "--quiet", "--max-steps", 1, "--name")
    lines = run("train.py", *words, "facts", CLUSTER_JOB="job:0").out.splitlines()
    folder, batch = next(facts for facts in map(launch_facts_in, lines) if facts)
    assert folder == str(runs / "facts") and batch[0] == batch[1] * batch[2] * 64
    assert not any(map(launch_facts_in, run("train.py", *words, "no-facts").out.splitlines()))


# --- hosts and ports ----------------------------------------------------------------------------------------------


def test_a_host_name_cannot_become_an_option_of_ssh(monkeypatch):
    monkeypatch.setattr(remote, "is_here", lambda name: False)
    words = remote.command("node1", ["echo", "a b"])
    assert words[words.index("--") + 1 :] == ["node1", "echo 'a b'"]


@pytest.mark.parametrize("value", ["soon", "80", "70000", "-1", "٣٠٠٠"])
def test_a_wrong_master_port_is_one_sentence(repo, value):
    (repo / "hostfile").write_text("localhost slots=1\n")
    words = [sys.executable, str(repo / "cluster/run_hosts.py"), "--hostfile", str(repo / "hostfile")]
    done = subprocess.run(words, env=environment(repo, MASTER_PORT=value), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"error: MASTER_PORT must be a port number from 1024 to 65535, not '{value}'\n"


def test_an_empty_master_port_counts_as_unset(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "")
    assert preflight.master_port() is None


def test_a_chosen_port_can_be_used_again_at_once_after_a_start(monkeypatch):
    """Connections of the last start stay in TIME_WAIT for 60 s, and a restart waits for 30 s."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        connection = server.accept()[0]
        connection.close()  # the side that closes first keeps TIME_WAIT
        client.recv(1)
        client.close()
    monkeypatch.setenv("MASTER_PORT", str(port))
    with preflight.listening("localhost") as (found, _):
        assert found == port


def test_a_port_in_use_is_still_noticed(monkeypatch):
    with socket.create_server(("", 0)) as server:
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        with pytest.raises(remote.Unreachable, match="has no free port \\(port \\d+ is in use\\)"):
            with preflight.listening("localhost"):
                pass


# --- code on the hosts --------------------------------------------------------------------------------------------


def write(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(path)


def test_the_probe_ignores_run_folders_and_virtual_environments_inside_the_project(tmp_path):
    write(
        tmp_path, "train.py", "out/a/run.json", "venv/pyvenv.cfg", "venv/lib/x.py", "models/fast.so", "models/notes.md"
    )
    assert sorted(probe.code_of(str(tmp_path), [str(tmp_path / "out")])) == ["models/fast.so", "train.py"]


def test_stale_code_on_a_host_is_found():
    here = {"train.py": "1", "presets/a.toml": "2"}
    files = {**here, "models/__init__.py": "3", "torch.so": "4", "presets/b.toml": "5", "notes.txt": "6"}
    assert host_checks.stale_files(files, here) == ["models/__init__.py", "torch.so"]


def test_sync_moves_stale_code_aside_and_leaves_everything_else(tmp_path, monkeypatch, capsys):
    write(
        tmp_path,
        "train.py",
        "models/__init__.py",
        "models/old/deep.py",
        "optim/a.py",
        "optim/stale.py",
        "runs/x/run.json",
    )
    stale = ["models/__init__.py", "models/old/deep.py", "optim/stale.py"]
    sync.move_aside(Host("localhost", 1), str(tmp_path), stale)
    (aside,) = (tmp_path / ".stale-code").iterdir()
    assert sorted(str(path.relative_to(aside)) for path in aside.rglob("*.py")) == stale
    assert not (tmp_path / "models").exists() and (tmp_path / "optim/a.py").exists()
    assert (tmp_path / "runs/x/run.json").exists() and "moving 3 code files" in capsys.readouterr().err


def test_sync_asks_for_the_python_version_of_this_machine(monkeypatch):
    commands = []
    monkeypatch.setattr(sync, "run", lambda host, words, *_: commands.append(words))
    monkeypatch.delenv("DRIVER_CUDA", raising=False)
    sync.create_environment(Host("localhost", 1), "/p", "/p/.venv/bin/python", "3.12.4")
    assert commands == [["env", "PYTHON=/p/.venv/bin/python", "FIRST_PYTHON=python3.12", "/p/environment/setup.sh"]]


@pytest.mark.skipif(not shutil.which("rsync"), reason="needs rsync")
def test_sync_copies_what_links_out_of_the_data_folder_lead_to(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(sync, "run", lambda host, words, *_: commands.append(words))
    (tmp_path / "disk/cat").mkdir(parents=True)
    (tmp_path / "disk/cat/a.png").touch()
    (tmp_path / "data/train/dog").mkdir(parents=True)
    (tmp_path / "data/train/cat").symlink_to(tmp_path / "disk/cat")
    (tmp_path / "data/train/hound").symlink_to("dog")
    sync.copy_data(Host("box", 1), str(tmp_path / "data"), str(tmp_path / "runs"))
    options = commands[-1][: commands[-1].index("-e")]
    subprocess.run([*options, f"{tmp_path}/data/", f"{tmp_path}/there/"], check=True)
    assert not (tmp_path / "there/train/cat").is_symlink() and (tmp_path / "there/train/cat/a.png").is_file()
    assert (tmp_path / "there/train/hound").is_symlink()


@pytest.mark.skipif(not shutil.which("rsync"), reason="needs rsync")
def test_sync_copies_to_a_path_with_a_space_also_by_an_old_rsync(tmp_path, monkeypatch):
    folder = tmp_path / "my project"
    write(folder, "train.py")
    ssh = tmp_path / "ssh"  # it joins its words, and the shell of the host, which has another disk, splits them
    ssh.write_text('#!/bin/sh\nshift\ncd "${0%/*}"/there && exec sh -c "$*"\n')
    ssh.chmod(0o755)
    monkeypatch.setattr(remote, "SSH", [str(ssh)])
    monkeypatch.setattr(remote, "command", lambda name, words: ["true"])
    monkeypatch.setenv("RSYNC_OLD_ARGS", "1")  # the default before 3.2.4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    sync.copy(Host("box", 1), "my project")
    assert (tmp_path / "there/my project/train.py").is_file()


@pytest.mark.parametrize("with_git", [True, False])
def test_sync_copies_code_and_neither_runs_nor_private_files(tmp_path, with_git):
    write(tmp_path, "train.py", "a b/näme.css", "gone.py", ".env", "secret.pem", "runs/a/run.json", "results/r.json")
    write(tmp_path, "trials/x/run.json", "trials/x/weights", "data/d.npy", "kept/y/run.json", "kept/y/log.txt")
    if with_git:
        git(tmp_path, "init")
        git(tmp_path, "add", "train.py", "a b", "gone.py", "kept", "results")
    write(tmp_path, "new_idea.py")
    (tmp_path / "gone.py").unlink()
    code = probe.code_of(str(tmp_path), [str(tmp_path / "trials")])
    found = sync.files_to_copy(str(tmp_path), code, [str(tmp_path / "trials"), str(tmp_path / "data")])
    assert found == sorted(["a b/näme.css", "new_idea.py", "train.py", *([] if with_git else ["secret.pem"])])


def test_one_machine_under_two_names_is_noticed():
    facts = probe.identity()
    assert facts and facts == probe.identity()
    answers = [(Host("node1", 1), {"identity": "a"}), (Host("10.0.0.1", 1), {"identity": "a"}), (Host("b", 1), {})]
    (problem,) = host_checks._machines(answers, {}, False)
    assert problem.host == "10.0.0.1" and problem.what == "is the same machine as node1" and not problem.warning


# --- where the ranks meet -----------------------------------------------------------------------------------------


def meet_and_look(expected: str) -> None:
    import torch.distributed as dist

    process_group.init_process_group()
    values = process_group.all_gather_objects({"rank": dist.get_rank(), "path": Path("/a")})
    assert values == [{"rank": rank, "path": Path("/a")} for rank in range(dist.get_world_size())]
    assert plain_objects.broadcast_value(dist.get_rank(), process_group.control_group()) == 0
    if dist.get_rank() == 0:
        port = int(os.environ["MASTER_PORT"])
        listening = {
            link.laddr.ip
            for link in psutil.Process().net_connections("inet")
            if link.status == psutil.CONN_LISTEN and link.laddr.port == port
        }
        assert listening == {expected}, listening
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("address", ["127.0.0.2", "127.0.0.1"])
def test_the_store_listens_on_the_address_where_the_ranks_meet_and_on_no_other(address):
    variables = {"MASTER_ADDR": address, "RENDEZVOUS_SECRET": "s" * 32, "GLOO_SOCKET_IFNAME": "lo"}
    run_ranks(2, meet_and_look, address, **variables)


def test_a_name_that_means_the_loopback_here_is_not_used_for_several_hosts(monkeypatch):
    monkeypatch.setattr(socket, "gethostbyname", lambda name: {"me": "127.0.1.1", "nat": "192.0.2.1"}.get(name, name))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert rank_store.own_address("me", 2) == "" and rank_store.own_address("me", 1) == "127.0.1.1"
    assert rank_store.own_address("nat", 2) == ""


def test_ranks_without_the_secret_do_not_count(monkeypatch):
    import torch.distributed as dist

    port = free_port()
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RENDEZVOUS_SECRET", "ours")
    store = rank_store.make_store(timedelta(seconds=5))
    stranger = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=5))
    stranger.set("rank0", "an address")
    assert not store.check(["rank0"])


@dataclass
class Fact:
    value: int


def test_messages_hold_values_and_no_code(tmp_path, monkeypatch):
    from records.run_folder import Progress

    monkeypatch.chdir(tmp_path)
    values = [None, 1.5, "a", [1, (2, {"k": {3}})], Path("/x"), torch.float32, torch.Size([1]), Progress()]
    assert plain_objects.unpack(plain_objects.pack(values)) == values
    tensors = [
        torch.arange(6.0).reshape(2, 3),
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 4),
        torch.ones(2).bfloat16(),
    ]
    for one, other in zip(plain_objects.unpack(plain_objects.pack(tensors)), tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    for evil in (Bomb("owned"), [Bomb("owned")], subprocess.run, Fact(1)):
        with pytest.raises(pickle.UnpicklingError, match="no plain value"):
            plain_objects.unpack(plain_objects.pack(evil))
    assert not Path("owned").exists()


# --- more hosts than this supervision is for -----------------------------------------------------------------------


def test_the_torchrun_command_of_the_documentation_trains(shapes, tiny, tmp_path):
    """With two nodes of one process each, both on this machine."""
    page = (PROJECT / "docs/cluster.md").read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("torchrun ")]
    words = shlex.split(line)
    assert "--nnodes=128" in words and "--rdzv-endpoint=node001:29500" in words
    port = free_port()
    changes = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
        "--nnodes=128": ["--nnodes=2"],
        "--nproc-per-node=8": ["--nproc-per-node=1"],
        "--rdzv-endpoint=node001:29500": [f"--rdzv-endpoint=127.0.0.1:{port}"],
        "spt-lsa": [str(tiny)],
    }
    command = [word for given in words for word in changes.get(given, [given])]
    command += ["--data-dir", str(shapes), "--runs-dir", str(tmp_path), "--max-steps", "3"]
    variables = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    nodes = [
        subprocess.Popen(
            command, cwd=PROJECT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    texts = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], texts
    assert any("x 2 process" in text for text in texts) and (tmp_path / "big/weights.safetensors").exists()
