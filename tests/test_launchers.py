"""The shell scripts: printed command, chosen environment, one-sentence errors, and reaction to signals.

    ./run_tests.sh tests/test_launchers.py

The scripts are copied next to a stub of train.py, and `nvidia-smi` is a fake, so that all machines test the same.
Several machines:
test_cluster.py.
"""

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import AWKWARD, IMPORTING, dry_run, environment, fake, fake_gpus, run, world

from cluster.simulated_hosts import wait_until
from common.paths import PROJECT


@pytest.mark.parametrize(
    "path",
    [*sorted(set(PROJECT.glob("*.sh")) - {PROJECT / "environment/completion.sh"}), PROJECT / ".ci/run"],
    ids=lambda path: path.name,
)
def test_script_is_valid_and_executable(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)


# --- one machine ----------------------------------------------------------------------------------------------------


def test_dry_run_prints_every_argument_unharmed(repo):
    words = dry_run(repo, *AWKWARD)
    assert words[words.index(str(repo / "train.py")) + 1 :] == AWKWARD
    assert not list(repo.parent.rglob("owned"))


def test_arguments_and_folder_reach_train_py_unharmed(repo, tmp_path):
    result = run(repo, "launch_local_train.sh", *AWKWARD, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    _, argv, world_size, cwd = json.loads((tmp_path / "started0").read_text())
    assert (argv, world_size, cwd) == (AWKWARD, "1", str(tmp_path))
    assert not list(tmp_path.rglob("owned"))


@pytest.mark.parametrize(
    ("arguments", "times"),
    [
        (["--preset", "cpu", "-h"], 1),
        (["--help"], 1),
        (["--list-settings", "--preset", "cpu-quick"], 1),
        (["--set", "x=-h", "--name", "list-settings"], 2),  # these train
    ],
)
def test_help_and_settings_are_printed_once(repo, arguments, times):
    (repo / "train.py").write_text("import sys\nprint('heading', *sys.argv[1:], flush=True)\n")
    result = run(repo, "launch_local_train.sh", *arguments, NUM_PROCS="2")
    assert result.returncode == 0 and result.stdout.count("heading") == times, result.stderr
    assert ("NUM_PROCS=2" in result.stdout) == bool({"-h", "--help"} & {*arguments})  # the launcher's own help


@pytest.mark.parametrize("script", ["launch_local_train.sh", "launch_distributed_train.sh"])
def test_the_help_installs_nothing(repo, script):
    fake_python(repo)
    (repo / "train.py").write_text("print('usage: python train.py')\n")
    result = run(repo, script, "--help", PYTHON="")
    assert result.returncode == 0 and "usage: " in result.stdout and result.stderr == ""
    assert not (repo / ".venv").exists() and installs(repo) == []


@pytest.mark.parametrize("python", [sys.executable, ""])
def test_the_number_of_processes_does_not_depend_on_the_current_folder(repo, tmp_path, python):
    """A config.py of the user is not run. It does not depend on the .venv either, which a dry run does not make."""
    fake_python(repo)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("config", "common", "training"):
        (elsewhere / f"{name}.py").write_text("open('owned', 'w')\nraise SystemExit\n")
    (repo / "training").mkdir()
    (repo / "training" / "cpu_processes.py").write_text("import sys\ndef main(): print(3, 'because of', *sys.argv[1:])")
    said = run(repo, "launch_local_train.sh", "--seed", "1", cwd=elsewhere, DRY_RUN="1", PYTHON=python).stderr
    assert "training on the CPU, because of --seed 1 (NUM_PROCS" in said and not (elsewhere / "owned").exists()


def test_cpu_processes_share_the_cores(repo):
    words = dry_run(repo, NUM_PROCS="2")
    assert world(words) == ["0", "1"]
    assert "DS_ACCELERATOR=cpu" in words
    assert f"OMP_NUM_THREADS={max(1, len(os.sched_getaffinity(0)) // 2)}" in words
    assert "OMP_NUM_THREADS=7" in dry_run(repo, NUM_PROCS="2", OMP_NUM_THREADS="7")


@pytest.mark.parametrize(
    "variables, devices",
    [
        ({}, ["0", "1", "2", "3"]),
        ({"NUM_PROCS": "2"}, ["0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,1"}, ["3", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "3,1", "NUM_PROCS": "1"}, ["3"]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-2"}, ["GPU-2"]),
    ],
)
def test_a_process_for_each_gpu(repo, variables, devices):
    fake_gpus(repo, 4)
    words = dry_run(repo, "--epochs", "1", **variables)
    assert world(words) == devices
    assert words[-3:] == [str(repo / "train.py"), "--epochs", "1"]
    assert not any(word.startswith("DS_ACCELERATOR") for word in words)


@pytest.mark.parametrize(
    "variables", [{"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, {"DS_ACCELERATOR": "cpu"}]
)
def test_gpus_that_are_hidden_are_not_used(repo, variables):
    fake_gpus(repo, 4)
    assert "DS_ACCELERATOR=cpu" in dry_run(repo, **variables)


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"NUM_PROCS": "3"}, "NUM_PROCS=3, but only 2"),
        ({"NUM_PROCS": "0"}, "at least 1, not '0'"),
        ({"NUM_PROCS": "two"}, "at least 1, not 'two'"),
        ({"CUDA_VISIBLE_DEVICES": "0,5"}, "names the GPU 5"),
        ({"SAVE_SECONDS": "soon"}, "SAVE_SECONDS must be a whole number of at least 1, not 'soon'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT must be a port number from 1024 to 65535, not 'abc'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT must be a port number from 1024 to 65535, not '70000'"),
        ({"DS_ACCELERATOR": "CPU"}, "DS_ACCELERATOR=CPU is unknown; write DS_ACCELERATOR=cpu, or unset it"),
    ],
)
def test_impossible_requests_are_refused(repo, variables, sentence):
    fake_gpus(repo, 2)
    result = run(repo, "launch_local_train.sh", DRY_RUN="1", **variables)
    assert result.returncode != 0
    assert sentence in result.stderr and result.stderr.startswith("error: ") and result.stdout == ""


def test_a_failing_rank_fails_the_script(repo):
    result = run(repo, "launch_local_train.sh", STUB_CODE="3")
    assert result.returncode == 3
    assert "Training failed (exit code 3)" in result.stderr


def test_a_run_with_nothing_left_to_train_is_no_failure(repo):
    result = run(repo, "launch_local_train.sh", STUB_CODE="2")  # train.py's exit code for a finished run
    assert result.returncode == 2 and "failed" not in result.stderr


def test_a_killed_rank_is_explained(repo):
    (repo / "train.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    result = run(repo, "launch_local_train.sh")
    assert result.returncode == 247
    assert result.stderr.endswith("Training failed: a process was ended by signal 9 (KILL); was the memory full?\n")


def test_a_helper_that_ends_after_its_rank_is_no_killed_launcher(repo):
    (repo / "train.py").write_text("import subprocess\nsubprocess.Popen(['sleep', '3'])\n")
    result = run(repo, "launch_local_train.sh")
    assert result.returncode == 0 and "killed" not in result.stderr


def test_a_stop_while_ranks_import_says_that_nothing_was_saved_and_leaves_none(repo, tmp_path):
    (repo / "train.py").write_text(IMPORTING)
    script = subprocess.Popen(
        [str(repo / "launch_local_train.sh")], env=environment(repo, NUM_PROCS="2"), stderr=subprocess.PIPE, text=True
    )
    ranks = rank_pids(tmp_path)
    script.terminate()
    said = script.communicate(timeout=60)[1]
    assert script.returncode == 128 + signal.SIGTERM
    assert said.endswith("Stopped before training began; there was nothing to save.\n") and "failed" not in said
    assert not any(psutil.pid_exists(rank) for rank in ranks)


def rank_pids(folder):
    files = [folder / f"started{rank}" for rank in (0, 1)]
    wait_until(lambda: all(file.exists() and file.stat().st_size for file in files), 60)
    return [json.loads(file.read_text())[0] for file in files]


@pytest.mark.parametrize("how", ["terminate", "ctrl-c"])
def test_stopping_lets_every_rank_save_once_and_leaves_none(repo, tmp_path, how):
    variables = environment(repo, NUM_PROCS="2", STUB_SECONDS="60")
    script, terminal = str(repo / "launch_local_train.sh"), None
    if how == "ctrl-c":  # typed in a terminal, where the whole foreground group gets the signal
        pid, terminal = pty.fork()
        if pid == 0:
            os.execve(script, [script], variables)
    else:
        pid = subprocess.Popen([script], env=variables, stderr=subprocess.DEVNULL).pid
    ranks = rank_pids(tmp_path)
    if terminal is None:
        os.kill(pid, signal.SIGTERM)
    else:
        os.write(terminal, b"\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75
    assert [(tmp_path / f"ended{rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    assert not any(psutil.pid_exists(rank) for rank in ranks)
    if terminal is not None:
        os.close(terminal)


SAVING_FOREVER = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, lambda *_: None)
pathlib.Path(os.environ["STUB_OUT"], "started" + os.environ["RANK"]).write_text(f"[{os.getpid()}]")
while True:
    time.sleep(0.05)
"""


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("how", ["time", "second signal"])
def test_processes_that_do_not_save_in_time_are_ended(repo, tmp_path, how):
    """Also where they are deaf to SIGTERM, as a rank is that waits in NCCL or for a disk."""
    (repo / "train.py").write_text(SAVING_FOREVER)
    script = subprocess.Popen(
        [str(repo / "launch_local_train.sh")],
        env=environment(repo, NUM_PROCS="2", SAVE_SECONDS="1" if how == "time" else "600"),
        stderr=subprocess.PIPE,
        text=True,
    )
    ranks = rank_pids(tmp_path)
    script.terminate()
    if how == "second signal":
        while not script.stderr.readline().startswith("Stopping:"):
            pass
        time.sleep(3)  # it ignores a signal that follows the first within two seconds
        script.send_signal(signal.SIGINT)
    said = script.communicate(timeout=60)[1]
    assert script.returncode == 128 + signal.SIGKILL
    assert ("have not saved within 1 s" if how == "time" else "Ending the processes at once") in said
    wait_until(lambda: not any(map(is_running, ranks)), 60)


def test_a_stop_lets_the_ranks_save_after_the_reader_of_the_output_is_gone(repo, tmp_path):
    script = subprocess.Popen(
        [str(repo / "launch_local_train.sh")],
        env=environment(repo, NUM_PROCS="2", STUB_SECONDS="60"),
        stderr=subprocess.PIPE,
    )
    rank_pids(tmp_path)
    script.stderr.close()
    script.terminate()
    assert script.wait(60) == 75
    assert [(tmp_path / f"ended{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


@pytest.mark.parametrize("victim", ["script", "launcher"])
def test_no_rank_survives_a_killed_parent(repo, tmp_path, victim):
    script = subprocess.Popen(
        [str(repo / "launch_local_train.sh")],
        env=environment(repo, NUM_PROCS="2", STUB_SECONDS="60"),
        stderr=subprocess.DEVNULL,
    )
    ranks = rank_pids(tmp_path)
    os.kill(script.pid if victim == "script" else psutil.Process(ranks[0]).ppid(), signal.SIGKILL)
    assert script.wait(60) != 0
    wait_until(lambda: not any(psutil.pid_exists(rank) for rank in ranks), 20)


# --- the environment ------------------------------------------------------------------------------------------------


def pins(name):
    return re.findall(r"^([\w-]+)==(\S+?)(;.*)?$", (PROJECT / name).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    "name, differ",
    [
        ("environment/requirements-cuda12.txt", {"torch", "torchvision", "nvidia-dali"}),
        (
            "environment/requirements-cuda11.txt",
            {
                "torch",
                "torchvision",
                "nvidia-dali",
                "deepspeed",
                "numpy",
                "torchft",
                "onnx",
                "onnxscript",
                "onnxruntime",
            },
        ),
    ],
)
def test_sets_for_older_drivers_differ_only_where_they_must(name, differ):
    def rest(file):
        return {pin for pin in pins(file) if re.sub("-cuda.*", "", pin[0]) not in differ}

    assert rest(name) == rest("requirements.txt")


@pytest.mark.parametrize(
    "cuda, driver, chosen",
    [
        ("13.1", "590.1", "requirements.txt"),
        ("12.2", "535.1", "environment/requirements-cuda12.txt"),
        ("11.4", "470.1", "environment/requirements-cuda11.txt"),
        ("N/A", "580.65", "requirements.txt"),
        ("N/A", "550.1", "environment/requirements-cuda12.txt"),
        ("N/A", "470.1", "environment/requirements-cuda11.txt"),
    ],
)
def test_the_driver_chooses_the_set(repo, cuda, driver, chosen):
    fake(repo, "nvidia-smi", f"echo '| NVIDIA-SMI {driver}   Driver Version: {driver}   CUDA Version: {cuda} |'")
    fake_python(repo)
    result = run(repo, "environment/setup.sh", PYTHON="python3", DRY_RUN="1")
    assert f"with {chosen} " in result.stderr
    assert not (repo / ".venv").exists()


def test_the_set_can_be_chosen_by_hand_and_an_old_driver_is_refused(repo):
    fake_python(repo)
    assert (
        "with environment/requirements-cuda12.txt "
        in run(repo, "environment/setup.sh", PYTHON="python3", DRY_RUN="1", DRIVER_CUDA="12").stderr
    )
    for cuda, sentence in (
        ("10.2", "error: .* is too old .* DRIVER_CUDA=none DS_ACCELERATOR=cpu"),
        ("twelve", "error: DRIVER_CUDA must be a CUDA version, such as 12, or none, not 'twelve'"),
    ):
        result = run(repo, "environment/setup.sh", PYTHON="python3", DRY_RUN="1", DRIVER_CUDA=cuda)
        assert result.returncode == 1 and re.match(sentence, result.stderr)


def fake_python(repo):
    """A python3 without the requirements; its .venv has them after `pip install`, which `pip.log` records."""
    fake(
        repo,
        "python3",
        f"""
case "$1 $2" in
    "-m venv") target="${{@: -1}}"; [ "$3" != --clear ] || rm -rf "$target"
        mkdir -p "$target/bin"; cp "$0" "$target/bin/python"; exit ;;
    "-m pip") [ "$3" != config ] || {{ printf %s "${{PIP_LISTS:-}}"; exit; }}
        echo "${{@: -1}}" >>{shlex.quote(str(repo.parent / "pip.log"))}; sleep "${{PIP_SECONDS:-0}}"
        echo "Requirement already satisfied: torch"; echo "Collecting new-one"
        [ -z "$PIP_FAILS" ] && touch "${{0%/*}}/installed"; exit ;;
    "- "*) [ -e "${{0%/*}}/installed" ] && echo "${{0%/*}}" && exit; echo missing everything; exit 1 ;;
    *) exec {shlex.quote(sys.executable)} "$@" ;;
esac""",
    )


def link_tools(repo, *more):
    """Link what environment/setup.sh needs of the system into the folder of the fakes, to be the only one on PATH."""
    for tool in ["bash", "dirname", "readlink", "cat", "sha256sum", "flock", "grep", "env", *more]:
        (repo.parent / "bin" / tool).symlink_to(shutil.which(tool))


def installs(repo):
    log = repo.parent / "pip.log"
    return log.read_text().split() if log.exists() else []


def test_environment_is_made_once_and_again_when_its_requirements_change(repo):
    fake_python(repo)
    for _ in range(2):
        assert run(repo, "environment/setup.sh", PYTHON="python3").returncode == 0
    assert installs(repo) == ["requirements.txt"]
    with (repo / "requirements.txt").open("a") as file:
        file.write("# changed\n")
    assert run(repo, "environment/setup.sh", PYTHON="python3").returncode == 0
    assert installs(repo) == ["requirements.txt"] * 2


def test_the_environment_has_the_version_of_the_other_hosts_where_it_is_installed(repo):
    fake_python(repo)
    path = repo.parent / "bin/python3.12"
    path.write_text((repo.parent / "bin/python3").read_text() + "# 3.12")
    path.chmod(0o755)
    own = str(repo / ".venv/bin/python")
    for first, expected in (("python3.12", True), ("python3.99", False)):
        shutil.rmtree(repo / ".venv", ignore_errors=True)
        result = run(repo, "environment/setup.sh", PYTHON=own, FIRST_PYTHON=first)
        assert result.returncode == 0, result.stderr
        assert Path(own).read_text().endswith("# 3.12") == expected


def test_python_may_be_a_relative_path_with_a_space(repo):
    fake_python(repo)
    (repo.parent / "my pythons").mkdir()
    (repo.parent / "bin/python3").rename(repo.parent / "my pythons/python")
    result = run(repo, "environment/setup.sh", PYTHON="my pythons/python", cwd=repo.parent)
    assert result.returncode == 0, result.stderr
    assert installs(repo) == ["requirements.txt"]


def test_completing_an_environment_prints_what_is_installed_alone_and_fails_with_pip(repo):
    fake_python(repo)
    first = run(repo, "environment/setup.sh", PYTHON="python3").stderr
    assert ": some gigabytes, some minutes, once." in first and "already satisfied" in first
    for fails in ("1", ""):
        with (repo / "requirements.txt").open("a") as file:
            file.write("# changed\n")
        (repo / ".venv/bin/installed").unlink(missing_ok=True)
        result = run(repo, "environment/setup.sh", PYTHON="python3", PIP_FAILS=fails)
        assert result.returncode == bool(fails) and "Collecting new-one" in result.stderr
        assert ("already satisfied" in result.stderr) == (not fails)  # after a failure it starts from an empty folder
        assert ("requirements.txt has changed, or a package is missing" in result.stderr) == bool(fails)


def test_an_interrupted_install_starts_over(repo):
    fake_python(repo)
    result = run(repo, "environment/setup.sh", PYTHON="python3", PIP_FAILS="1")
    assert result.returncode == 1 and "error: installing requirements.txt failed" in result.stderr
    (repo / ".venv/half").touch()
    assert run(repo, "environment/setup.sh", PYTHON="python3").returncode == 0
    assert not (repo / ".venv/half").exists() and len(installs(repo)) == 2


@pytest.mark.parametrize("fails", ["nothing", "pip", "venv pip"])
def test_uv_installs_where_it_is_and_pip_where_uv_fails(repo, fails):
    """The same file of pins, into the same .venv, which is ready either way."""
    fake_python(repo)
    fake(
        repo,
        "uv",
        f"""
echo "uv $1 ${{@: -1}}" >>{shlex.quote(str(repo.parent / "uv.log"))}
case " {fails} " in *" $1 "*) echo "uv: no such index" >&2; exit 2 ;; esac
case $1 in
    venv) mkdir -p .venv/bin; cp {shlex.quote(str(repo.parent / "bin/python3"))} .venv/bin/python ;;
    pip) touch .venv/bin/installed ;;
esac""",
    )
    for _ in range(2):
        result = run(repo, "environment/setup.sh", PYTHON="python3", INSTALLER="uv")
        assert result.returncode == 0, result.stderr
    log = (repo.parent / "uv.log").read_text().splitlines()
    assert log == ["uv venv .venv", "uv pip requirements.txt"]
    assert installs(repo) == (["requirements.txt"] if "pip" in fails else [])
    assert (repo / ".venv/requirements.sha256").is_file() and not (repo / ".venv/installing").exists()


@pytest.mark.parametrize("fails", ["nothing", "pip"])
def test_pip_fetches_uv_where_there_is_none_and_uv_gets_the_indexes_of_pip(repo, fails):
    log = repo.parent / "uv.log"
    variables = "UV_DEFAULT_INDEX UV_INDEX UV_FIND_LINKS SSL_CERT_FILE UV_INSECURE_HOST"
    fake(
        repo,
        "a-uv",
        f"""for name in {variables}; do echo "$name=${{!name}}"; done >>{shlex.quote(str(log))}
[ {fails} = nothing ] || exit 2
touch .venv/bin/installed""",
    )
    fetch = f'cp {shlex.quote(str(repo.parent / "bin/a-uv"))} "${{0%/*}}/uv"'
    listing = (
        "global.index-url='https://one.example/simple'\nglobal.extra-index-url='\\nhttps://two.example\\nhttps://three.example'"
        "\n:env:.index-url='https://mine.example/simple'\n:env:.find-links='/a /b'\nglobal.cert='/ca.pem'"
    )
    fake_python(repo)
    path = repo.parent / "bin/python3"
    path.write_text(
        path.read_text().replace(
            '    "-m pip")', f'    "-m pip") case "${{@: -1}}" in "uv>="*) {fetch}; exit ;; esac\n'
        )
    )
    fake(repo, "c++", "exit 0")
    link_tools(repo, "cp", "mkdir", "rm", "touch", "sleep", "realpath")  # a PATH without uv, wherever it is
    variables = {"PATH": str(repo.parent / "bin"), "PIP_LISTS": listing, "UV_INSECURE_HOST": "kept"}
    result = run(repo, "environment/setup.sh", PYTHON="python3", INSTALLER="uv", **variables)
    assert result.returncode == 0, result.stderr
    assert log.read_text().splitlines() == [
        "UV_DEFAULT_INDEX=https://mine.example/simple",
        "UV_INDEX=https://two.example https://three.example",
        "UV_FIND_LINKS=/a,/b",
        "SSL_CERT_FILE=/ca.pem",
        "UV_INSECURE_HOST=kept",
    ]
    assert installs(repo) == ([] if fails == "nothing" else ["requirements.txt"])


def test_another_cuda_version_starts_over_and_a_machine_without_a_driver_or_a_venv_made_by_hand_does_not(repo):
    fake_python(repo)
    (repo / ".venv/bin").mkdir(parents=True)
    shutil.copy(repo.parent / "bin/python3", repo / ".venv/bin/python")
    (repo / ".venv/mine").touch()
    assert run(repo, "environment/setup.sh", PYTHON="python3").returncode == 0
    assert (repo / ".venv/mine").exists()
    for cuda in ("12", ""):
        assert run(repo, "environment/setup.sh", PYTHON="python3", DRIVER_CUDA=cuda).returncode == 0
    assert not (repo / ".venv/mine").exists() and installs(repo) == [
        "requirements.txt",
        "environment/requirements-cuda12.txt",
    ]


def test_two_starts_at_once_install_once(repo):
    fake_python(repo)
    variables = environment(repo, PYTHON="python3", PIP_SECONDS="1")
    starts = [
        subprocess.Popen([str(repo / "environment/setup.sh")], env=variables, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [start.wait(60) for start in starts] == [0, 0]
    assert installs(repo) == ["requirements.txt"]


def test_missing_compiler_and_missing_venv_module_name_the_package(repo):
    fake_python(repo)
    (repo.parent / "bin/python3").write_text(
        (repo.parent / "bin/python3")
        .read_text()
        .replace('case "$1 $2" in', 'case "$1 $2" in "-c import venv"*) exit 1 ;;')
    )
    result = run(repo, "environment/setup.sh", PYTHON="python3")
    assert result.returncode == 1 and "apt-get install python3-venv" in result.stderr
    fake_python(repo)
    link_tools(repo)
    result = run(repo, "environment/setup.sh", PYTHON="python3", PATH=str(repo.parent / "bin"))
    assert result.returncode == 1 and "apt-get install g++" in result.stderr
