"""Slurm: its variables become a launcher's; in a real Slurm, preempted training saves, is requeued and finishes.

    ./run_tests.sh tests/parallel/test_slurm.py
    ./run_tests.sh tests/parallel/test_slurm.py -m slow      with a real Slurm

The tests start a real Slurm with two nodes on this machine, which needs root and Debian's packages slurm-wlm and munge.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.simulated_hosts import wait_until
from common.launch_facts import print_launch_facts
from common.paths import PROJECT
from parallel.slurm import expand_nodes, rank_environment

LIMIT_SECONDS = 120  # of one step of a job; a hang, not a slow machine
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


def test_slurms_variables_become_those_of_a_launcher():
    environment = dict(STEP)
    assert rank_environment(environment)
    got = {
        name: environment[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    assert got == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "20084",
    }


def test_names_that_resolve_are_used_and_a_single_node_uses_the_loopback(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    environment = dict(STEP)
    rank_environment(environment)
    assert environment["MASTER_ADDR"] == "gpu07"
    environment = {**STEP, "SLURM_STEP_NUM_NODES": "1"}
    rank_environment(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


def test_a_task_with_one_visible_gpu_uses_device_0():
    for visible, local in (("3", "0"), ("0,1,2,3", "1")):
        environment = {**STEP, "CUDA_VISIBLE_DEVICES": visible}
        rank_environment(environment)
        assert environment["LOCAL_RANK"] == local


@pytest.mark.parametrize(
    "environment", [{}, {**STEP, "RANK": "3"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "12"}]
)
def test_a_launchers_variables_have_priority_and_a_batch_script_is_one_process(environment):
    before = dict(environment)
    assert not rank_environment(environment) and environment == before


@pytest.mark.parametrize(
    "text, names",
    [
        ("n1", ["n1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("a[1-2]b[3-4]", ["a1b3", "a1b4", "a2b3", "a2b4"]),
        ("rack1-[09-11].lan", ["rack1-09.lan", "rack1-10.lan", "rack1-11.lan"]),
    ],
)
def test_slurms_short_node_names_are_expanded(text, names):
    assert expand_nodes(text) == names


@pytest.mark.parametrize("path", sorted((PROJECT / "cluster/slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_batch_scripts_save_before_the_time_limit_and_are_requeued(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert "#SBATCH --signal=TERM@180" in text and "#SBATCH --requeue" in text and ". cluster/slurm/ranks.sh" in text
    assert "scontrol requeue" in (path.parent / "ranks.sh").read_text()


RANKS = """
say() { echo "say $*"; }
nvidia-smi() { :; }
scontrol() { echo "scontrol $*"; }
srun() { printf "[%s]" "$@"; echo "threads ${OMP_NUM_THREADS-} ${OMP_WAIT_POLICY-}."; return "$CODE"; }
sleep() { :; }
. cluster/slurm/ranks.sh
echo "sourced ${OMP_NUM_THREADS-}."
train 7 --fresh --name 'a b' $MORE
"""


def ranks(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Source ranks.sh in a folder whose setup does nothing, with programs of Slurm that print their arguments."""
    (folder / "cluster").symlink_to(PROJECT / "cluster")
    (folder / "environment").mkdir()
    (folder / "environment/setup.sh").touch()
    variables = {"PATH": os.environ["PATH"], "PYTHON": "python", "CODE": "0", "MORE": "", **environment}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", RANKS], cwd=folder, env=variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("restarts", "has_begun", "is_fresh"), [("", True, True), ("1", True, False), ("1", False, True)]
)
def test_a_requeued_job_does_not_start_over_once_it_has_begun_its_run(tmp_path, restarts, has_begun, is_fresh):
    begun = tmp_path / "runs/slurm-7-begun"
    if has_begun:  # by this job, or before its first start by another of its number
        begun.parent.mkdir()
        begun.touch()
    done = ranks(tmp_path, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    assert done.returncode == 0 and "[--name][a b]" in done.stdout, done.stderr
    assert ("[--fresh]" in done.stdout) == is_fresh and begun.exists() == (not is_fresh)


def test_only_a_job_of_train_py_is_told_about_gpus_without_a_task(tmp_path):
    """compare.py uses all GPUs of its node in one task."""
    said = ranks(tmp_path, SLURM_GPUS_ON_NODE="4").stdout
    assert "add --ntasks-per-node=4" in said.partition("sourced")[2] and "say" not in said.partition("sourced")[0]


def test_train_py_makes_the_file_that_says_that_the_run_has_begun(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_BEGUN", str(tmp_path / "begun"))
    print_launch_facts(tmp_path, (128, 1, 1))
    assert (tmp_path / "begun").exists()


@pytest.mark.parametrize(
    ("code", "more", "is_requeued"),
    [
        (0, "", False),
        (1, "", False),
        (75, "", True),
        (143, "", True),
        (75, "--stop-at 9", False),
        (75, "--stop-at=9", False),
        (143, "--stop-at 9", True),
    ],
)
def test_a_job_that_was_stopped_is_requeued_unless_its_last_step_was_given(tmp_path, code, more, is_requeued):
    """Also a job that had not begun to train (143)."""
    done = ranks(tmp_path, CODE=str(code), MORE=more)
    assert done.returncode == code and ("scontrol requeue 7" in done.stdout) == is_requeued, done.stderr


@pytest.mark.parametrize(
    ("given", "threads"),
    [
        ({}, "1 passive"),
        ({"SLURM_CPUS_PER_TASK": "16"}, "16 passive"),
        ({"SLURM_CPUS_PER_TASK": "16", "OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "active"}, "4 active"),
    ],
)
def test_a_task_on_cpus_has_a_thread_for_each_of_its_cores(tmp_path, given, threads):
    done = ranks(tmp_path, **given)
    assert f"threads {threads}." in done.stdout, done.stderr
    assert ("[--cpus-per-task=16]" in done.stdout) == ("SLURM_CPUS_PER_TASK" in given)
    assert f"sourced {given.get('OMP_NUM_THREADS', '')}." in done.stdout  # compare.py divides the cores itself


# --- a real Slurm -------------------------------------------------------------------------------------------------

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=17110
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool-%n
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[17111-17112] CPUs=1 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def missing():
    """The reason why Slurm cannot run here; empty if it can."""
    absent = [
        name
        for name in ("slurmctld", "slurmd", "sbatch", "munged")
        if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if os.geteuid() != 0:
        return "needs root"
    return f"needs {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge" if absent else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A function that runs a Slurm command and returns its output."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(dir=folder))
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
        "PYTHON": sys.executable,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }

    def command(*words, cwd=None):
        done = subprocess.run(
            [str(word) for word in words], env=environment, cwd=cwd, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    key = Path("/etc/munge/munge.key")
    Path("/run/munge").mkdir(exist_ok=True)
    if not key.exists():
        key.write_bytes(os.urandom(1024))
    for path in (key, key.parent, Path("/run/munge")):
        shutil.chown(path, "munge", "munge")
    key.chmod(0o400)
    munged = None
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        munged = subprocess.Popen(
            [
                "runuser",
                "-u",
                "munge",
                "--",
                "/usr/sbin/munged",
                "--foreground",
                f"--pid-file=/run/munge/{os.getpid()}.pid",
            ]
        )
        wait_until(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, 30)
    quiet = dict(env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    programs = [
        subprocess.Popen([name, "-D", *words], **quiet)
        for name, *words in (["slurmctld"], ["slurmd", "-N", "n1"], ["slurmd", "-N", "n2"])
    ]
    try:
        wait_until(
            lambda: (
                "idle"
                in subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout
            ),
            60,
        )
        yield command
        command("scancel", "-u", "root")
        wait_until(lambda: not command("squeue", "-h"), 60)
    finally:
        for program in [*reversed(programs), *([munged] if munged else [])]:
            program.terminate()
            program.wait(20)


@pytest.fixture
def project(tmp_path):
    """The project in a folder of its own, because Slurm writes into the current folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    for path in PROJECT.iterdir():
        if path.name not in ("data", "runs", "results") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


def preempt(slurm, jobs, folder, out):
    """Let a job of higher priority take both nodes; then the preempted jobs are requeued and start again."""
    slurm("sbatch", "--partition=high", "--nodes=2", "--wrap", "sleep 1", cwd=folder)
    for job in jobs:
        wait_until(lambda job=job: "Restarts=1" in slurm("scontrol", "show", "job", job), LIMIT_SECONDS, out)
        wait_until(lambda job=job: "JobState=PENDING" in slurm("scontrol", "show", "job", job), LIMIT_SECONDS, out)
        slurm("scontrol", "update", f"jobid={job}", "starttime=now")  # Slurm would wait two minutes
    for job in jobs:
        wait_until(lambda job=job: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), LIMIT_SECONDS, out)


@pytest.mark.slow
@pytest.mark.cluster
def test_preempted_training_saves_is_requeued_and_finishes(slurm, project, tmp_path, shapes, tiny):
    def out():
        return next((path.read_text() for path in project.glob("slurm-*.out")), "")

    job = slurm(
        "sbatch",
        "--parsable",
        "--partition=low",
        "--nodes=2",
        "--ntasks-per-node=1",
        "cluster/slurm/several_nodes.sbatch",
        "--preset",
        tiny,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path / "runs",
        "--name",
        "job",
        "--epochs",
        "60",
        cwd=project,
    )
    wait_until(lambda: list(tmp_path.glob("runs/job/state/step-*")), LIMIT_SECONDS, out)
    preempt(slurm, [job], tmp_path, out)
    assert "and saved; the same command resumes the run" in out() and "resuming  after step" in out()
    assert (tmp_path / "runs/job/state/step-00000240").is_dir()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_preempted_array_makes_every_run_of_a_comparison_once_and_reports(slurm, project, tmp_path, shapes, tiny):
    def out():
        return "\n".join(path.read_text() for path in sorted(project.glob("slurm-*.out")))

    (tmp_path / "gate.toml").write_text(f"""
question = "Is a gate better?"
preset = "{tiny}"
steps = 60
seeds = 2
arms = [{{name = "plain", idea = "As ever."}}, {{name = "gated", idea = "A gate.", model.feed_forward = "geglu"}}]
""")
    array = slurm(
        "sbatch",
        "--parsable",
        "--partition=low",
        "--array=1-2",
        "cluster/slurm/compare.sbatch",
        tmp_path / "gate.toml",
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path / "runs",
        "--results-dir",
        tmp_path / "results",
        cwd=project,
    )
    wait_until(lambda: len(list(tmp_path.glob("runs/gate/*/state/step-*"))) > 1, LIMIT_SECONDS, out)
    preempt(slurm, [f"{array}_{i}" for i in (1, 2)], tmp_path, out)
    report = json.loads((tmp_path / "results/gate/report.json").read_text())
    assert report["missing"] == {} and "stopped; start the same command again to resume" in out()
    started = [re.findall(r"\] (\S+) started", path.read_text()) for path in sorted(project.glob("slurm-*.out"))]
    assert len(started) == 2 and not set(started[0]) & set(started[1])  # no run is made by two elements
    assert {*started[0], *started[1]} == {f"{arm}-seed{seed}" for arm in ("plain", "gated") for seed in (0, 1)}
