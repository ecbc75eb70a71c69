"""Launches on simulated hosts: the preflight finds problems, two hosts train like one, and failures end in time.

    ./run_tests.sh tests/cluster/test_several_hosts.py

The hosts are network namespaces of this machine (cluster/simulated_hosts.py); if they cannot be created, the tests are
skipped with the reason. Time limits are shorter here than by default; `python cluster/failure_trial.py` measures with
the defaults.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import programs
import psutil
import pytest
import torch
from safetensors.torch import load_file

from cluster import simulated_hosts
from cluster.simulated_hosts import Hosts, wait_until
from common.paths import PROJECT

pytestmark = pytest.mark.cluster
LIMITS = {"SILENCE_SECONDS": "10", "GRACE_SECONDS": "3", "REJOIN_SECONDS": "1"}
LIMIT_SECONDS = 100  # of one launch; a hang, not a slow machine
AWKWARD = ["a b", "it's", 'say "x"', "a;echo b", "$HOME", "*", "", '--set=x={"k": 1}', "100%n"]

# A train.py that only waits, because the launcher handles failures whatever the ranks compute. Each rank has a child
# process in a session of its own, like a badly written worker process.
STUB = """
import json, os, pathlib, signal, subprocess, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
out, rank = pathlib.Path({out!r}), os.environ["RANK"]
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("the last words of rank", rank, flush=True)
if rank == "0":
    print("facts for the launcher: " + json.dumps([str(out / "runs/stub"), [64, 1, 2]]), flush=True)
(out / f"started{{rank}}.unfinished").write_text(json.dumps([os.getpid(), sys.argv[1:], dict(os.environ)]))
(out / f"started{{rank}}.unfinished").rename(out / f"started{{rank}}")
while not stop and "leave" not in sys.argv:
    time.sleep(0.05)
if stop:
    time.sleep(1)
    (out / f"saved{{rank}}").touch()
child.kill()
sys.exit(75 if stop else 0)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, shapes):
    """Three hosts. box3 has another SSH port and other copies of project and data. At `bare`, the second and third host
    have an empty folder where the first has a project."""
    if reason := simulated_hosts.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    project, other, bare, wheels = folder / "project", folder / "box3", folder / "bare", folder / "wheels"
    for path in (project, bare, wheels, folder / "empty2", folder / "empty3", folder / "no wheels"):
        path.mkdir()
    programs.copy_scripts(project)
    shutil.copytree(shapes, project / "data/shapes")
    (project / "train.py").write_text(STUB.format(out=str(folder)))
    (project / ".git").mkdir()
    (project / ".git/HEAD").write_text("a" * 40)
    shutil.copytree(project, other)
    (other / ".git/HEAD").write_text("b" * 40)
    (other / "train.py").write_text("print('an older one')\n")
    facts = json.loads((other / "data/shapes/dataset.json").read_text())
    (other / "data/shapes/dataset.json").write_text(json.dumps({**facts, "fingerprint": "sha256:" + "c" * 64}))
    own = {
        "box2": {bare: folder / "empty2"},
        "box3": {project: other, bare: folder / "empty3", wheels: folder / "no wheels"},
    }
    with Hosts(folder / "hosts", 3, own, ports={"box3": 2222}) as hosts:
        hosts.project, hosts.out, hosts.bare, hosts.wheels = project, folder, bare, wheels
        yield hosts


@pytest.fixture(autouse=True)
def nothing_stays_behind(cluster):
    yield
    wait_until(lambda: not cluster.at_work(), 30, lambda: f"orphans: {cluster.at_work()}")


def launch(cluster, slots, *arguments, project=None, **variables):
    """Start training from box1 on the hosts of `slots`."""
    hostfile = cluster.out / "hostfile"
    hostfile.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    for path in [*cluster.out.glob("started*"), *cluster.out.glob("saved*")]:
        path.unlink()
    variables = {
        "HOSTFILE": str(hostfile),
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        **LIMITS,
        **variables,
    }
    return cluster.start(
        "box1", [(project or cluster.project) / "launch_distributed_train.sh", *arguments], **variables
    )


def started(cluster, process, ranks):
    """Wait until all ranks have started; return the process ID, arguments and variables of each."""
    paths = [cluster.out / f"started{rank}" for rank in range(ranks)]
    wait_until(
        lambda: process.poll() is not None or all(path.exists() for path in paths),
        LIMIT_SECONDS,
        lambda: end(process, 0),
    )
    assert process.poll() is None, end(process)
    return [json.loads(path.read_text()) for path in paths]


def end(process, seconds=LIMIT_SECONDS):
    """Wait for the end of a process: (exit code, output)."""
    try:
        out = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
    return process.returncode, out


# --- before the start ---------------------------------------------------------------------------------------------


def test_the_preflight_names_the_problems_of_each_host_and_sync_fixes_them(cluster):
    arguments = ["--check", "--data-dir", str(cluster.project / "data/shapes")]
    code, out = end(launch(cluster, {"box1": 1, "10.177.0.9": 1, "box2": 1, "root@box3": 1}, *arguments))
    assert code == 3
    assert "10.177.0.9 does not answer" in out
    assert "box3 has another commit (bbbbbbbb, here aaaaaaaa): train.py" in out
    assert "box3 has another dataset (cccccccc, elsewhere" in out
    assert "box2 has" not in out and "box2 does" not in out
    if not shutil.which("rsync"):
        pytest.skip("needs rsync for the rest")
    code, out = end(launch(cluster, {"box1": 1, "box2": 1, "root@box3": 1}, *arguments, "--sync", "--measure"))
    assert code == 0, out
    assert "box3: copying the project" in out and "box3 has" not in out
    assert out.count("Gbit/s") == 3


@pytest.mark.skipif(not shutil.which("rsync"), reason="needs rsync")
def test_sync_creates_the_environment_on_bare_hosts_and_names_a_host_where_it_cannot(cluster):
    """The environment consists of one fake package, which box3 does not find."""
    programs.copy_scripts(cluster.bare)
    (cluster.bare / "train.py").write_text("")
    (cluster.bare / "requirements.txt").write_text(f"--no-index\n--find-links {cluster.wheels}\nstandin==1.0\n")
    files = {
        "METADATA": "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n",
        "RECORD": "",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(cluster.wheels / "standin-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(f"standin-1.0.dist-info/{name}", text)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", cluster.bare / ".venv"], check=True)
    (packages,) = cluster.bare.glob(".venv/lib/python*/site-packages")
    zipfile.ZipFile(cluster.wheels / "standin-1.0-py3-none-any.whl").extractall(packages)
    python = str(cluster.bare / ".venv/bin/python")
    code, out = end(
        launch(
            cluster,
            {"box1": 1, "box2": 1, "box3": 1},
            "--check",
            "--sync",
            project=cluster.bare,
            PYTHON=python,
            DRIVER_CUDA="none",
        )
    )
    assert code == 3, out
    assert "box2: creating the Python environment" in out and "box3: creating the Python environment" in out
    assert "box3 could not create the environment: " in out and "No matching distribution found for standin" in out
    assert "error: box3 has no usable Python environment" in out and "box2 has" not in out
    assert (cluster.out / "empty2/.venv/bin/python").exists()


# --- with a fake train.py -----------------------------------------------------------------------------------------


def test_ranks_get_arguments_variables_and_logs_and_a_signal_lets_all_save(cluster):
    process = launch(cluster, {"box1": 1, "box2": 2}, *AWKWARD, NCCL_DEBUG="WARN")
    facts = started(cluster, process, 3)
    assert all(arguments == AWKWARD for _, arguments, _ in facts)
    for rank, environment in enumerate(fact[2] for fact in facts):
        # The interface that leads to the others, although the first host resolves its own name to the other interface.
        assert environment["WORLD_SIZE"] == "3" and environment["MASTER_ADDR"] == "10.177.0.1"
        assert (
            environment["GLOO_SOCKET_IFNAME"] == "eth0"
            and environment["NCCL_SOCKET_IFNAME"] == "=eth0"
            and environment["NCCL_DEBUG"] == "WARN"
        )
        # DeepSpeed's launcher permutes the local ranks of a host if slots differ; each occurs once.
        assert environment["LOCAL_RANK"] == ("0", "1", "0")[rank]
        assert environment["OMP_NUM_THREADS"] == "1" and environment["PATH"].startswith(
            str(Path(sys.executable).parent)
        )
    process.send_signal(signal.SIGTERM)
    code, out = end(process)
    assert code == 75, out
    assert all((cluster.out / f"saved{rank}").exists() for rank in range(3))
    assert "the last words of rank 0" in out and "the last words of rank 1" not in out
    (logs,) = (cluster.out / "runs/stub/logs").iterdir()
    assert (logs / "box2/rank2.log").read_text() == "the last words of rank 2\n"
    assert not (cluster.project / "runs/.logs").exists()


def test_a_killed_rank_ends_the_job_everywhere(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    facts = started(cluster, process, 2)
    os.kill(facts[1][0], signal.SIGKILL)
    code, out = end(process)
    assert code == 137, out
    assert "rank 1 on box2 failed first" in out and "the last words of rank 1" in out.split("failed first")[1]


def test_a_killed_agent_leaves_no_process(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    agent = psutil.Process(started(cluster, process, 2)[1][0]).parent().parent()
    assert "agent.py" in " ".join(agent.cmdline())
    agent.kill()
    code, out = end(process)
    assert code == 69 and "box2 was lost" in out, out


def test_a_suspended_rank_counts_as_dead(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    os.kill(started(cluster, process, 2)[1][0], signal.SIGSTOP)
    code, out = end(process)
    assert code == 1 and "box2: rank 1 was suspended" in out, out


def test_ranks_of_a_killed_launcher_save_and_end(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    started(cluster, process, 2)
    process.kill()
    wait_until(lambda: not cluster.at_work(), LIMIT_SECONDS, lambda: f"orphans: {cluster.at_work()}")
    assert all((cluster.out / f"saved{rank}").exists() for rank in range(2))
    process.communicate()


# --- the real train.py --------------------------------------------------------------------------------------------


def rank_of(mark, rank):
    """The process of a rank, found by its arguments and variables."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if mark in words and "-m" not in words and process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    raise AssertionError(f"no rank {rank}")


def test_training_survives_a_killed_rank_and_a_cut_cable_and_gives_the_weights_of_one_host(
    cluster, shapes, tiny, tmp_path
):
    """The first start is killed, the second cut off; in the third the first host finishes alone."""
    arguments = [
        "--preset",
        str(tiny),
        "--data-dir",
        str(shapes),
        "--runs-dir",
        str(tmp_path),
        "--set",
        "model.dropout=0.0",
        "--epochs",
        "14",
    ]
    alone = programs.start("train.py", *arguments, "--name", "one")
    run = tmp_path / "two"

    def newest():
        return max((int(path.name.removeprefix("step-")) for path in run.glob("state/step-*")), default=0)

    def wait_for_checkpoint(after):
        wait_until(lambda: process.poll() is not None or newest() > after, LIMIT_SECONDS, lambda: end(process, 0))
        assert process.poll() is None, end(process)

    process = launch(cluster, {"box1": 1, "box2": 1}, *arguments, "--name", "two", "--restarts", "2", project=PROJECT)
    wait_for_checkpoint(0)
    rank_of("two", 1).kill()
    wait_until(lambda: len(list(run.glob("logs/*"))) == 2, LIMIT_SECONDS, lambda: end(process, 0))
    wait_for_checkpoint(newest())
    cluster.cut("box2")
    try:
        code, out = end(process)
        wait_until(lambda: not cluster.at_work(), LIMIT_SECONDS, lambda: f"orphans: {cluster.at_work()}")
    finally:
        cluster.reconnect("box2")
    assert code == 0, out
    assert alone.end().code == 0
    assert "rank 1 on box2 failed first" in out and "box2 was lost" in out and out.count("resuming  after step") == 2
    assert "Resuming with 1 rank on box1; the global batch stays 64" in out
    assert out.count("(BatchNorm) differ from before: adding --allow-inexact-resume") == 1
    weights, reference = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    for name, tensor in reference.items():
        torch.testing.assert_close(
            weights[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
