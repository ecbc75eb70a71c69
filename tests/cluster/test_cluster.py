"""Launching on several machines, without any: hostfile, script, arguments, variables, and which rank failed first.

    ./run_tests.sh tests/cluster/test_cluster.py

test_preflight.py tests the check of hosts, test_several_hosts.py real launches on simulated hosts.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pwd
import re
import shlex
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import AWKWARD, fake, run
from programs import run_ranks

from cluster import agent, failure_cause, run_hosts
from cluster.host_checks import Problem
from cluster.hostfile import HostfileError, parse
from cluster.job import Job, Limits, Outcome, Plan
from cluster.preflight import Rendezvous, Report
from cluster.remote import Host
from common.paths import PROJECT
from parallel.process_group import limit_waits

LAUNCH = "launch_distributed_train.sh"
HOSTS = [Host("node1", 2), Host("node2", 2)]


# --- the hostfile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("node1 slots=2\nnode2 slots=8 # rack 3\n", [("node1", 2), ("node2", 8)]),
        ("# all\n\n  me@10.0.0.1\tslots=1\n", [("me@10.0.0.1", 1)]),
        ("localhost slots=1", [("localhost", 1)]),
    ],
)
def test_hostfile_is_read(text, hosts):
    assert parse(text) == hosts


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "names no host"),
        ("# node1 slots=2\n", "names no host"),
        ("node1", "how many GPUs"),
        ("node1, slots=2", "comma"),
        ("node1 slots=2, max_slots=2", "comma"),
        ("node1 slots=2.5", "whole number"),
        ("node1 slots=-1", "whole number"),
        ("node1 slots = 2", "whole number"),
        ("node1 slots=2 max_slots=4", "whole number"),
        ("node1 slots=0", "at least 1"),
        ("node1:2222 slots=2", "colon"),
        ("node[1-3] slots=2", "one host per line"),
        ("-oProxyCommand=x slots=1", "begins with a dash"),
        ("-v@node1 slots=1", "begins with a dash"),
        ("a;b slots=1", "not a host name"),
        ("node1 slots=1\nme@node1 slots=2", "line 2: 'node1' is already on line 1"),
        ("localhost slots=1\nnode2 slots=1", "cannot reach it as 'localhost'"),
    ],
)
def test_hostfile_lines_that_deepspeed_would_misread_are_rejected(text, sentence):
    with pytest.raises(HostfileError, match=re.escape(sentence)):
        parse(text)


# --- the script ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(repo):  # noqa: F811
    """A copy of the scripts with a hostfile of two hosts and an ssh that reaches neither."""
    (repo / "hostfile").write_text("me@node1 slots=2\nnode2 slots=2\n")
    fake(
        repo,
        "ssh",
        'if [ "$1" = -G ]; then echo "user me"; echo "hostname ${3#*@}.lan"; exit; fi\n'
        'case "$*" in *node1*) echo "me@node1: Permission denied (publickey)." >&2 ;;\n'
        '*) echo "ssh: connect: Connection timed out" >&2 ;; esac\nexit 255',
    )
    return repo


def commands(text):
    """The printed lines -> {host: words}."""
    found = {}
    for line in text.splitlines():
        host, command = line.split(": ", 1)
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
        ).stdout
        found[host] = words.split("\0")[:-1]
    return found


def test_unedited_and_missing_hostfiles_fail_clearly(repo):  # noqa: F811
    result = run(repo, LAUNCH)
    assert result.returncode == 2 and "names no host" in result.stderr and "node1 slots=8" in result.stderr
    result = run(repo, LAUNCH, HOSTFILE="nowhere")
    assert result.returncode == 2 and "nowhere does not exist" in result.stderr
    result = run(repo, LAUNCH, "--hostfile", "lab")
    assert result.returncode == 1 and result.stderr == "error: name another hostfile with HOSTFILE=path\n"


def test_the_help_needs_no_hostfile(repo):  # noqa: F811
    for words in (["--help"], ["--check", "-h"]):
        result = run(repo, LAUNCH, *words)
        assert result.returncode == 0 and "usage: ./launch_distributed_train.sh" in result.stdout


def test_the_hostfile_is_read_by_the_python_that_the_user_names(repo):  # noqa: F811
    fake(repo, "python3", "exit 1")  # such as one that is too old
    assert "names no host" in run(repo, LAUNCH).stderr


def test_the_hostfile_is_read_by_an_old_python():
    """Python 3.6 evaluates annotations of functions, and cannot index `list`."""
    tree = ast.parse((PROJECT / "cluster/hostfile.py").read_text(), feature_version=(3, 6))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for annotation in [function.returns, *(argument.annotation for argument in function.args.args)]:
            assert not isinstance(annotation, ast.Subscript), f"{function.name}: write the annotation as a text"
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))  # of annotations: Python 3.7


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--restarts", "-1"], "--restarts: must be at least 0, not -1"),
        (["--restarts", "1.5"], "--restarts: must be a whole number of at least 0, not 1.5"),
        (["--hang-seconds", "-5"], "--hang-seconds: must be a number above 0, not -5"),
        (["--hang-seconds", "nan"], "--hang-seconds: must be a number above 0, not nan"),
    ],
)
def test_impossible_numbers_are_rejected(cluster, words, sentence):
    result = run(cluster, LAUNCH, *words)
    assert result.returncode == 2 and sentence in result.stderr


def test_folders_in_the_home_folder_are_those_that_training_uses(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = run_hosts.paths_of(["--data-dir=~/data/pets", "--runs-dir=~/runs"])
    assert (found.data_dir, found.runs_dir) == (Path("/home/me/data/pets"), Path("/home/me/runs"))


def test_dry_run_prints_the_command_of_each_host_with_every_argument_unchanged(cluster):
    result = run(cluster, LAUNCH, "--restarts", "2", *AWKWARD, DRY_RUN="1", MASTER_PORT="21000")
    found = commands(result.stdout)
    assert list(found) == ["me@node1", "node2"]
    for rank, words in enumerate(found.values()):
        assert words[1:4] == ["-u", "-m", "deepspeed.launcher.launch"] and f"--node_rank={rank}" in words
        assert "--master_addr=node1" in words and "--master_port=21000" in words
        assert words[words.index(str(cluster / "train.py")) + 1 :] == AWKWARD
        (world,) = [word.split("=", 1)[1] for word in words if word.startswith("--world_info=")]
        assert json.loads(base64.urlsafe_b64decode(world)) == {"node1": [0, 1], "node2": [0, 1]}


def test_dry_run_before_the_environment_exists_prints_its_interpreter(cluster):
    fake(cluster, "python3", f'[ "$1" != - ] || exit 1\nexec {shlex.quote(sys.executable)} -S "$@"')  # no packages
    result = run(cluster, LAUNCH, DRY_RUN="1", PYTHON="")
    assert result.returncode == 0, result.stderr
    assert [words[0] for words in commands(result.stdout).values()] == [str(cluster / ".venv/bin/python")] * 2
    assert not (cluster / ".venv").exists()


def test_hosts_that_do_not_answer_are_named_with_the_fix(cluster):
    result = run(cluster, LAUNCH)
    assert result.returncode == 3
    assert "error: me@node1 refuses the key.\n    Fix: copy your key to it: ssh-copy-id me@node1" in result.stderr
    assert "error: node2 does not answer.\n    Fix: check that it is on" in result.stderr


# --- orders for the ranks, and the cause of a failure -------------------------------------------------------------


def make_plan(hosts, **environment):
    return Plan(
        hosts,
        Rendezvous("10.0.0.1", 21000, {"node1": "eth0", "node2": "ens3"}),
        "/venv/bin/python",
        "/p/train.py",
        ["--x", "a b"],
        environment,
        False,
        Path("/p/runs"),
    )


def test_each_host_gets_its_own_interface_unless_one_was_named():
    orders = [make_plan(HOSTS).order(i, "job") for i in range(2)]
    assert [order["environment"]["NCCL_SOCKET_IFNAME"] for order in orders] == ["=eth0", "=ens3"]
    assert orders[1]["logs"] == "/p/runs/.logs/job/node2" and orders[1]["command"][-2:] == ["--x", "a b"]
    assert make_plan(HOSTS, NCCL_SOCKET_IFNAME="ib0").order(0, "job")["environment"]["NCCL_SOCKET_IFNAME"] == "ib0"


def test_threads_of_ranks_on_a_cpu_do_not_spin_unless_asked_to(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    def policy(on_cpu: bool, **environment: str) -> str | None:
        ranks = agent.Ranks.__new__(agent.Ranks)  # without its processes
        ranks.mark, ranks.slots = "CLUSTER_JOB=job:0", 2
        order = {"environment": environment, "command": ["/venv/bin/python"], "on_cpu": on_cpu}
        return ranks.environment(order).get("OMP_WAIT_POLICY")

    assert policy(True) == "passive" and policy(False) is None
    assert policy(True, OMP_WAIT_POLICY="active") == "active"


def test_time_limits_come_from_variables():
    assert Limits.of({}) == Limits(20, 20, 30) and Limits.of({"GRACE_SECONDS": "2.5", "REJOIN_SECONDS": ""}) == Limits(
        20, 2.5, 30
    )
    assert Limits.of({"SAVE_SECONDS": "90"}).save == 90
    for wrong in ("soon", "0", "-1", "inf"):
        with pytest.raises(ValueError, match=f"SILENCE_SECONDS must be a number of seconds above 0, not '{wrong}'"):
            Limits.of({"SILENCE_SECONDS": wrong})


def test_only_variables_that_matter_to_training_are_sent(tmp_path, monkeypatch):
    kept = {
        "NCCL_DEBUG": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": "/x",
        "LD_LIBRARY_PATH": "/y",
        "DS_ACCELERATOR": "cpu",
    }
    assert (
        run_hosts.sent(
            {**kept, "HOME": "/me", "PATH": "/bin", "PYTHON": "/p", "CUDA_VISIBLE_DEVICES": "0", "SSH_AUTH_SOCK": "/s"}
        )
        == kept
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=INFO\nA=b c=d\nword\n")
    assert run_hosts.deepspeed_env() == {"NCCL_DEBUG": "INFO", "A": "b c=d"}
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user of a container that has no name
    assert run_hosts.deepspeed_env() == {"NCCL_DEBUG": "INFO", "A": "b c=d"}


@pytest.mark.parametrize(
    "slots, batch, after",
    [
        ([8, 8, 8], (1024, 1, 1), [8, 8]),  # 24 ranks cannot divide 1024 images
        ([8, 8, 8], (96, 2, 1), [8, 8, 8]),
        ([8, 8], (96, 1, 1), [8, 8]),
        ([2, 1], (64, 1, 1), [2]),
        ([4], (64, 1, 2), [4]),  # two pipeline stages a replica: an even number of ranks
        ([3], (64, 1, 2), [2]),
        ([1], (64, 1, 2), []),
    ],
)
def test_the_remaining_ranks_divide_the_same_global_batch(slots, batch, after):
    hosts = [Host(f"node{i}", count) for i, count in enumerate(slots)]
    assert [host.slots for host in run_hosts.fit(hosts, *batch)] == after


TRACE = 'starting\nTraceback (most recent call last):\n  File "x", line 1\n    y\nValueError: mine\nmore\n'


@pytest.mark.parametrize(
    "text, last",
    [
        (TRACE, "ValueError: mine"),
        ("a\nerror: no such preset\nb", "b"),
        ("all well\n", None),
        ("torch.cuda.OutOfMemoryError: CUDA\n", "torch.cuda.OutOfMemoryError: CUDA"),
        ("usage: train.py\ntrain.py: error: no such flag\n", "train.py: error: no such flag"),
    ],
)
def test_the_first_error_of_a_log_is_found(text, last):
    found = agent.first_error(text)
    assert (found[-1] if found else None) == last


class Ended:
    def __init__(self, host, code, ranks, lost="", reason=""):
        self.host, self.lost = host, lost
        self.end = (
            None
            if lost
            else {
                "code": code,
                "reason": reason,
                "launcher": ["?"],
                "ranks": {str(rank): {"error": error, "tail": ["tail"]} for rank, error in ranks.items()},
            }
        )
        self.process = subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True)


ECHO = ["RuntimeError: [gloo] Connection closed by peer [10.0.0.1]:1"]
SHM = ["error in process 1: /dev/shm is full or too small for NCCL; in a container start it with --shm-size=8g"]
NOT_JOINED = ["error: process 0 of 2 could not join the others at 10.0.0.1:2: wrong"]


@pytest.mark.parametrize(
    "agents, gone, code, words",
    [
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], 1, {1: ["ValueError: mine"]})],
            [(0, 0), (1, 1)],
            1,
            "rank 1 on node2 failed first",
        ),
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], 247, {1: []})],
            [(0, 0), (1, 1)],
            137,
            "rank 1 on node2 failed first without an error message",
        ),
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], 0, {}, lost="sent no heartbeat for 20 s")],
            [(0, 0)],
            69,
            "node2 was lost: it sent no heartbeat",
        ),
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], 1, {1: ECHO})],
            [(1, 1), (0, 0)],
            1,
            "rank 1 on node2 failed first",
        ),
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], -9, {1: []}, reason="rank 1 was suspended")],
            [(0, 0)],
            1,
            "node2: rank 1 was suspended",
        ),
        # A sentence of train.py is an error of its own, even if it names NCCL, unless the rank could not join others.
        (
            [Ended(HOSTS[0], 247, {0: []}), Ended(HOSTS[1], 1, {1: SHM})],
            [(0, 0), (1, 1)],
            1,
            "rank 1 on node2 failed first",
        ),
        (
            [Ended(HOSTS[0], 1, {0: NOT_JOINED}), Ended(HOSTS[1], 1, {1: SHM})],
            [(0, 0), (1, 1)],
            1,
            "rank 1 on node2 failed first",
        ),
        # Ranks that died before they were seen: those that were ordered to end are not the cause.
        (
            [Ended(HOSTS[0], -9, {0: []}, reason="told to"), Ended(HOSTS[1], 247, {1: []})],
            [],
            137,
            "rank 1 on node2 failed first without an error message (k",
        ),
        (
            [Ended(HOSTS[0], 1, {0: ECHO}), Ended(HOSTS[1], 3, {1: []})],
            [(0, 0)],
            3,
            "rank 1 on node2 failed first without an error message; its",
        ),
    ],
)
def test_the_rank_that_failed_first_is_named_and_not_those_that_lost_it(agents, gone, code, words):
    found, cause, _ = failure_cause.cause(agents, gone)
    assert found == code and words in cause


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 75], 75), ([75, 0], 75), ([75, 75], 75), ([0, 1], 1), ([75, 1], 1), ([247, 75], 137)],
)
def test_hosts_of_which_one_stopped_and_saved_give_75_and_a_failure_beats_it(codes, expected, tmp_path):
    job = Job.__new__(Job)  # without its agents, which would be started over SSH
    job.plan = SimpleNamespace(hosts=HOSTS, runs=tmp_path)
    job.agents = [Ended(host, code, {i: []}) for i, (host, code) in enumerate(zip(HOSTS, codes, strict=True))]
    job.gone, job.name, job.folder, job.batch = [(0, 0), (1, 1)], "job", "", None
    job._sweep = lambda: None
    outcome = job._outcome()
    assert outcome.code == expected and bool(outcome.cause) == (expected not in (0, 75))


@pytest.mark.parametrize(
    ("line", "folder", "refused"),
    [
        ("error: unknown strategy 'zeor'", "", True),
        ("train.py: error: no such flag", "", True),
        ("error: out of memory; choose a smaller --micro-batch or a smaller network", "/runs/big", False),
        (NOT_JOINED[0], "", False),
        ("error: cannot listen on MASTER_ADDR=node1, MASTER_PORT=29500: Address already in use", "", False),
        ("error: no other peer of the run at 10.0.0.1:2 can be reached any more. Start this one", "", False),
        ("ValueError: mine", "", False),
    ],
)
def test_only_errors_in_the_command_line_are_not_retried(line, folder, refused, tmp_path):
    job = Job.__new__(Job)  # without its agents, which would be started over SSH
    job.plan = SimpleNamespace(hosts=HOSTS[:1], runs=tmp_path)
    job.agents, job.gone, job.name = [Ended(HOSTS[0], 1, {0: [line]})], [(0, 0)], "job"
    job.folder, job.batch, job._sweep = folder, None, lambda: None
    assert job._outcome().refused == refused


@pytest.mark.parametrize("how", ["time", "second signal"])
def test_ranks_that_do_not_save_in_time_are_ended(how, capsys):
    job, sent = Job.__new__(Job), []  # without its agents, which would be started over SSH
    job.plan, job.stop = SimpleNamespace(limits=Limits(save=5)), SimpleNamespace(requested=True, now=False)
    job.agents = [SimpleNamespace(is_running=True, send=sent.append)]
    job.failed_at = job.killed_at = job.stopped_at = job.done_at = 0.0
    for now in (100.0, 104.0):
        job._drive(now)
    assert sent == ["stop"]
    job.stop.now = how == "second signal"
    job._drive(104.5 if job.stop.now else 106.0)
    assert sent == ["stop", "kill"]
    last = "Ending the ranks at once.\n" if job.stop.now else "The ranks have not saved within 5 s: ending them.\n"
    assert capsys.readouterr().err.endswith(last)


DISK = ["OSError: [Errno 28] No space left on device"]


@pytest.mark.parametrize(
    ("code", "folder", "said"),
    [
        (143, "", "Stopped before training began; there was nothing to save.\n"),
        (137, "/runs/a", "Ended before the ranks had saved.\n"),
        (1, "/runs/a", f"\nerror: training failed: rank 0 on node1 failed first:\n    {DISK[0]}\n"),
    ],
)
def test_after_a_stop_only_a_rank_with_an_error_of_its_own_is_blamed(code, folder, said, capsys):
    outcome = Outcome(code, HOSTS, [], "rank 0 on node1 failed first", DISK, refused=True, folder=folder)
    run_hosts.show_failure(outcome, is_stopped=True)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("words", "exported", "seconds"), [([], "", "50"), ([], "120", "120"), (["--hang-seconds", "7"], "120", "7.0")]
)
def test_the_limit_for_a_rank_that_hangs_is_the_option_then_the_variable(monkeypatch, words, exported, seconds):
    seen = []
    monkeypatch.setenv("DRY_RUN", "1")
    monkeypatch.setenv("HANG_SECONDS", exported)
    monkeypatch.setattr(sys, "argv", ["run_hosts.py", *words])
    monkeypatch.setattr(run_hosts, "hosts_of", lambda path: HOSTS)
    monkeypatch.setattr(run_hosts, "show_commands", lambda *given: seen.append(given[2]["HANG_SECONDS"]))
    assert run_hosts.main() == 0 and seen == [seconds]


# --- a restart ----------------------------------------------------------------------------------------------------


@pytest.fixture
def regroup(monkeypatch):
    """Call `run_hosts.regroup` after a start on HOSTS.

    `lost` names the host that the preflight misses from now on; `closed` is how often it finds node1 alone unfit.
    """

    def call(
        outcome: Outcome, lost: str = "", closed: int = 0, hosts: list[Host] = HOSTS, micro_batch: str | None = None
    ) -> Report | None:
        def inspect(hosts, what):
            nonlocal closed
            if hosts == HOSTS[:1] and closed:
                closed -= 1
                return Report(hosts, [], [Problem("node1", "has no free port", "choose another")], "", True, None)
            problems = [Problem(host.name, "does not answer", "check it") for host in hosts if host.name == lost]
            return Report(hosts, [], problems, "", True, None)

        monkeypatch.setattr(run_hosts.preflight, "inspect", inspect)
        monkeypatch.setattr(run_hosts.time, "sleep", lambda seconds: None)
        return run_hosts.regroup(outcome, {}, hosts, SimpleNamespace(requested=False), 0.1, micro_batch)

    return call


def test_without_the_first_host_nothing_is_started_while_the_run_folder_is_unknown(regroup, monkeypatch, capsys):
    assert regroup(Outcome(1, HOSTS), lost="node1") is None
    assert "error: the run folder may be on node1 alone, because the start failed" in capsys.readouterr().err
    assert regroup(Outcome(1, HOSTS), lost="node2").hosts == HOSTS[:1]
    monkeypatch.setattr(run_hosts, "exists", lambda host, path: path == "/shared/big/run.json")
    assert regroup(Outcome(1, HOSTS, folder="/shared/big"), lost="node1").hosts == HOSTS[1:]


@pytest.mark.parametrize(("micro_batch", "ranks"), [(None, 2), ("8", 3), ("12", 2), ("auto", 3)])
def test_a_restart_keeps_the_ranks_with_which_the_micro_batch_divides_the_global_batch(micro_batch, ranks, regroup):
    hosts = [Host("node1", 2), Host("node2", 1)]
    outcome = Outcome(1, [Host("node1", 4)], folder="/runs/a", batch=(96, 3, 1))
    report = regroup(outcome, hosts=hosts, micro_batch=micro_batch)
    assert run_hosts.ranks_of(report.hosts) == ranks


def test_a_restart_knows_folder_and_batch_although_the_last_start_failed_early(monkeypatch):
    outcomes = [
        Outcome(1, HOSTS, folder="/runs/a", batch=(64, 1, 1), logs="/runs/a/logs"),
        Outcome(1, HOSTS[:1], logs="/runs/.logs"),
        Outcome(0, HOSTS),
    ]
    seen = []
    report = Report(HOSTS, [], [], "", True, Rendezvous("10.0.0.1", 21000, {}))
    monkeypatch.delenv("DRY_RUN", raising=False)
    monkeypatch.setattr(sys, "argv", ["run_hosts.py", "--restarts", "2", "--micro-batch", "8"])
    monkeypatch.setattr(run_hosts, "hosts_of", lambda path: HOSTS)
    monkeypatch.setattr(run_hosts.preflight, "look", lambda *_: report)
    monkeypatch.setattr(run_hosts, "Stop", lambda: SimpleNamespace(requested=False))
    monkeypatch.setattr(run_hosts, "Job", lambda *_: SimpleNamespace(run=lambda: outcomes.pop(0)))
    monkeypatch.setattr(
        run_hosts, "regroup", lambda outcome, *rest: seen.append((outcome.folder, outcome.batch, rest[-1])) or report
    )
    assert run_hosts.main() == 0
    assert seen == [("/runs/a", (64, 1, 1), "8")] * 2


def test_the_remaining_hosts_get_time_to_pass_the_preflight_and_their_problems_are_shown(regroup, capsys):
    assert regroup(Outcome(1, HOSTS), lost="node2", closed=1).hosts == HOSTS[:1]
    assert "error" not in capsys.readouterr().err
    assert regroup(Outcome(1, HOSTS), lost="node2", closed=10**9) is None
    assert "error: node1 has no free port.\n    Fix: choose another\n" in capsys.readouterr().err


# --- ranks that hang ----------------------------------------------------------------------------------------------


def wait_for_a_rank_that_does_not_come():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=5))  # longer than the test may take
    group = dist.new_group(backend="gloo")
    dist.barrier(group)
    os.environ["HANG_SECONDS"] = "2"
    limit_waits()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 1:
        store.wait(["given up"])  # it stays alive, because a closed connection would be noticed at once
        store.set("seen", "")
        os._exit(0)
    with pytest.raises(RuntimeError, match="(?i)timed? ?out"):
        dist.all_reduce(torch.zeros(1), group=group)
    store.set("given up", "")
    store.wait(["seen"])  # the store lives in this process
    os._exit(0)


def test_a_rank_that_waits_too_long_for_another_gives_up():
    run_ranks(2, wait_for_a_rank_that_does_not_come)
