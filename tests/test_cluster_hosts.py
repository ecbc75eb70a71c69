"""Several hosts for real: the preflight finds what is wrong, training over two hosts is training on one, and failures end in time.

    ./run_tests.sh -m cluster

The hosts are network namespaces of this machine (hosts.py); where they cannot be made, the tests are skipped with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import hosts as namespaces
import programs
import psutil
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(bool(namespaces.missing()), reason=namespaces.missing() or "-")]

# A train.py that only waits: failures are the launcher's business, whatever the ranks compute. Each rank has a child that
# leaves its session, as a careless worker process might.
STUB = '''
import json, os, pathlib, signal, subprocess, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
out, rank = pathlib.Path({out!r}), os.environ["RANK"]
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("the last words of rank", rank, flush=True)
if rank == "0":
    print("run       " + os.path.relpath(out / "runs/stub"), flush=True)
(out / f"started{{rank}}.unfinished").write_text(json.dumps([os.getpid(), child.pid, sys.argv[1:], dict(os.environ)]))
(out / f"started{{rank}}.unfinished").rename(out / f"started{{rank}}")
while not stop:
    time.sleep(0.05)
time.sleep(1)
(out / f"saved{{rank}}").touch()
child.kill()
sys.exit(75)
'''


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, shapes):
    """Three hosts; box3 has a copy of the project and of the data of its own, in which something differs."""
    folder = tmp_path_factory.mktemp("cluster")
    project, other = folder / "project", folder / "box3"
    project.mkdir()
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("requirements*.txt")]:
        shutil.copy(path, project)
    shutil.copytree(ROOT / "cluster", project / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(shapes, project / "data/shapes")
    (project / "train.py").write_text(STUB.format(out=str(folder)))
    (project / ".git").mkdir()
    (project / ".git/HEAD").write_text("a" * 40)
    shutil.copytree(project, other)
    (other / ".git/HEAD").write_text("b" * 40)
    (other / "train.py").write_text("print('an older one')\n")
    facts = json.loads((other / "data/shapes/dataset.json").read_text())
    (other / "data/shapes/dataset.json").write_text(json.dumps({**facts, "fingerprint": "sha256:" + "c" * 64}))
    with namespaces.Hosts(folder / "hosts", 3, own={"box3": {project: other}}) as hosts:
        hosts.project, hosts.out = project, folder
        yield hosts


def launch(cluster, slots, *arguments, project=None, **variables):
    """Start training from box1 on the hosts of `slots`."""
    hostfile = cluster.out / "hostfile"
    hostfile.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
    for path in [*cluster.out.glob("started*"), *cluster.out.glob("saved*")]:
        path.unlink()
    return cluster.start("box1", [(project or cluster.project) / "launch_distributed_train.sh", *arguments], HOSTFILE=str(hostfile),
                         PYTHON=sys.executable, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", **variables)


def started(cluster, ranks):
    """The processes of each rank, once all ranks are there: [(rank's own, its child)], and what they were started with."""
    namespaces.wait_until(lambda: all((cluster.out / f"started{rank}").exists() for rank in range(ranks)), 60, "the ranks did not start")
    facts = [json.loads((cluster.out / f"started{rank}").read_text()) for rank in range(ranks)]
    return [pid for fact in facts for pid in fact[:2]], facts


def end(process, seconds=60):
    """Wait for its end: (exit code, what it said, seconds)."""
    began = time.monotonic()
    try:
        out = process.communicate(timeout=seconds)[0]
    except Exception:
        process.kill()
        raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
    return process.returncode, out, time.monotonic() - began


def gone(pids, seconds=5):
    def none_left():
        return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)
    namespaces.wait_until(none_left, seconds, f"orphans: {pids}")


def test_preflight_names_what_is_wrong_on_each_host_and_sync_mends_it(cluster):
    arguments = ["--check", "--data-dir", str(cluster.project / "data/shapes")]
    code, out, seconds = end(launch(cluster, {"box1": 1, "10.177.0.9": 1, "box2": 1, "box3": 1}, *arguments))
    assert code == 3 and seconds < 30
    assert "10.177.0.9 does not answer" in out
    assert "box3 has another commit (bbbbbbbb, here aaaaaaaa): train.py" in out
    assert "box3 has another dataset (cccccccc, elsewhere" in out
    assert "box2 has" not in out and "box2 does" not in out
    if shutil.which("rsync"):
        code, out, _ = end(launch(cluster, {"box1": 1, "box2": 1, "box3": 1}, *arguments, "--sync", "--measure"))
        assert code == 0, out
        assert "box3: copying the project" in out and "box3 has" not in out
        assert out.count("Gbit/s") == 3


def test_ranks_get_arguments_variables_and_their_logs_and_a_signal_lets_all_of_them_save(cluster):
    awkward = ["a b", "it's", 'say "x"', "a;echo b", "$HOME", "*", "", '--set=x={"k": 1}', "100%n"]
    process = launch(cluster, {"box1": 1, "box2": 2}, *awkward, NCCL_DEBUG="WARN")
    pids, facts = started(cluster, 3)
    assert all(arguments == awkward for _, _, arguments, _ in facts)
    for rank, environment in enumerate(fact[3] for fact in facts):
        assert environment["WORLD_SIZE"] == "3" and environment["MASTER_ADDR"] == "10.177.0.1"
        # DeepSpeed's launcher turns the local ranks of a host when slots differ; each is there once.
        assert environment["LOCAL_RANK"] == ("0", "1", "0")[rank]
        assert environment["GLOO_SOCKET_IFNAME"] == "eth0" and environment["NCCL_SOCKET_IFNAME"] == "=eth0" and environment["NCCL_DEBUG"] == "WARN"
        assert environment["OMP_NUM_THREADS"] == "1" and environment["PATH"].startswith(str(Path(sys.executable).parent))
    process.send_signal(signal.SIGTERM)
    code, out, _ = end(process)
    assert code == 75, out
    assert all((cluster.out / f"saved{rank}").exists() for rank in range(3))
    gone(pids)
    assert "the last words of rank 0" in out and "the last words of rank 1" not in out
    (logs,) = (cluster.out / "runs/stub/logs").iterdir()
    assert (logs / "box2/rank2.log").read_text() == "the last words of rank 2\n"
    assert not (cluster.project / "runs/.logs").exists()


def test_a_killed_rank_ends_the_job_everywhere(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    pids, facts = started(cluster, 2)
    os.kill(facts[1][0], signal.SIGKILL)
    code, out, seconds = end(process)
    assert code == 137 and seconds < 30, out
    assert "rank 1 on box2 failed first" in out and "the last words of rank 1" in out.split("failed first")[1]
    gone(pids)


def test_a_killed_agent_leaves_nothing(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    pids, facts = started(cluster, 2)
    agent = psutil.Process(facts[1][0]).parent().parent()
    assert "agent.py" in " ".join(agent.cmdline())
    agent.kill()
    code, out, seconds = end(process)
    assert code == 69 and seconds < 60 and "box2 was lost" in out
    gone(pids)


def test_a_cut_cable_ends_the_job_on_both_sides_of_it(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    pids, _ = started(cluster, 2)
    began = time.monotonic()
    cluster.cut("box2")
    try:
        code, out, _ = end(process)
        assert code == 69 and "box2 was lost" in out
        gone(pids, 60 - (time.monotonic() - began))
    finally:
        cluster.mend("box2")


def test_a_killed_launcher_and_a_halted_rank(cluster):
    process = launch(cluster, {"box1": 1, "box2": 1})
    pids, _ = started(cluster, 2)
    process.kill()
    gone(pids, 60)
    assert all((cluster.out / f"saved{rank}").exists() for rank in range(2))
    process.communicate()
    process = launch(cluster, {"box1": 1, "box2": 1})
    pids, facts = started(cluster, 2)
    os.kill(facts[1][0], signal.SIGSTOP)
    code, out, _ = end(process)
    assert code != 0 and "rank 1 was halted" in out
    gone(pids)


# --- the real train.py --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def steady(shapes, tiny, tmp_path_factory):
    """Arguments of a run whose weights do not depend on the number of ranks, and those weights, trained by one process."""
    runs = tmp_path_factory.mktemp("steady")
    arguments = ["--preset", str(tiny), "--data-dir", str(shapes), "--runs-dir", str(runs), "--set", "model.dropout=0.0", "--epochs", "10"]
    programs.run("train.py", *arguments, "--name", "one")
    return arguments, runs, load_file(runs / "one/weights.safetensors")


def assert_same(weights, reference):
    for name, tensor in reference.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def rank_of(mark, rank):
    """The process of a rank, found by its arguments and its variables."""
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if mark in words and "-m" not in words and process.environ().get("RANK") == str(rank):
                return process
        except psutil.Error:
            continue
    return None


def test_two_hosts_train_the_weights_of_one_and_a_restart_after_a_killed_rank_finishes_them(cluster, steady):
    arguments, runs, reference = steady
    process = launch(cluster, {"box1": 1, "box2": 1}, *arguments, "--name", "two", "--restarts", "1", project=ROOT)
    namespaces.wait_until(lambda: (runs / "two/state").exists() and list((runs / "two/state").glob("step-*")), 60, "no checkpoint came")
    rank_of("two", 1).kill()
    code, out, _ = end(process, 120)
    assert code == 0, out
    assert "rank 1 on box2 failed first" in out and "resuming  after step" in out
    assert_same(load_file(runs / "two/weights.safetensors"), reference)
    assert len(list((runs / "two/logs").iterdir())) == 2


def test_a_restart_goes_on_without_a_host_that_stays_away(cluster, steady):
    arguments, runs, reference = steady
    process = launch(cluster, {"box1": 1, "box2": 1}, *arguments, "--name", "cut", "--restarts", "1", project=ROOT, REJOIN_SECONDS="1")
    try:
        namespaces.wait_until(lambda: (runs / "cut/state").exists() and list((runs / "cut/state").glob("step-*")), 60, "no checkpoint came")
        cluster.cut("box2")
        code, out, _ = end(process, 150)
    finally:
        cluster.mend("box2")
    assert code == 0, out
    assert "box2 was lost" in out and "Going on with 1 ranks on box1; the global batch stays 64" in out
    assert_same(load_file(runs / "cut/weights.safetensors"), reference)
