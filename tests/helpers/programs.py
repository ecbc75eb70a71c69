"""The project's scripts as separate programs: on the CPU, with a time limit, and started quickly.

    # A process that is forked with PyTorch, DeepSpeed and DALI already in memory.
    done = run("train.py", "--max-steps", 3)
    done = launch(2, "train.py", "--max-steps", 3)    # two, by DeepSpeed's launcher or torchrun, as a user starts them

`benchmarks/lib/forked_programs.py` says how. Every test sees the same machine: no GPU, one thread per process.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lib.forked_programs import ENVIRONMENT, LAUNCHED, LIMIT_SECONDS, Done, Program, start
from common.machine import free_port
from common.paths import PROJECT


def run(script: str, *arguments: Any, code: int | None = 0, **environment: str) -> Done:
    """Run a script of the project to its end and check its exit code (None: any)."""
    return _check(start(script, *arguments, **environment).end(), code)


def copy_scripts(folder: Path) -> None:
    """Copy the files that the launchers need, except train.py, to another folder."""
    for path in [*PROJECT.glob("*.sh"), *PROJECT.glob("requirements*.txt")]:
        shutil.copy(path, folder)
    for package in ("cluster", "common", "config", "environment"):
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def ranks(
    count: int, target: str | Callable[..., None], *arguments: Any, local: int | None = None, **environment: str
) -> list[Program]:
    """Start a script, or a function of a test module, as the forked processes of one group.

    Args:
        local: ranks that each machine has, except the last one, which has the rest; default: one machine has all.
    """
    meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    started, local = [], local or count
    for rank in range(count):
        own = rank % local
        of_rank = {"RANK": str(rank), "LOCAL_RANK": str(own), "LOCAL_WORLD_SIZE": str(min(local, count - rank + own))}
        if isinstance(target, str):
            started.append(start(target, *arguments, **meeting, **of_rank))
        else:
            started.append(Program(target, arguments, {**meeting, **of_rank}))
    return started


def run_ranks(
    count: int, target: str | Callable[..., None], *arguments: Any, code: int = 0, **options: Any
) -> list[Done]:
    """Run the processes that `ranks` starts to their end and check their exit codes."""
    return [_check(done, code) for done in [rank.end() for rank in ranks(count, target, *arguments, **options)]]


def launcher(processes: int, script: str, *arguments: Any) -> list[str]:
    """Return the command that starts a script as several processes:

    DeepSpeed's launcher for train.py, else torchrun.
    """
    words = [str(PROJECT / script), *map(str, arguments)]
    if script != "train.py":
        return [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={processes}",
            f"--master_port={free_port()}",
            *words,
        ]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    return [
        sys.executable,
        "-u",
        "-m",
        "deepspeed.launcher.launch",
        "--no_local_rank",
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={free_port()}",
        *words,
    ]


def launch(processes: int, script: str, *arguments: Any, code: int | None = 0) -> Done:
    """Run a script as several processes with a launcher."""
    child = subprocess.Popen(
        launcher(processes, script, *arguments),
        cwd=PROJECT,
        env=clean_environment(),
        text=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = child.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        raise AssertionError(f"still running after {LIMIT_SECONDS} s\n{out}\n{err}") from None
    return _check(Done(child.returncode, out, err), code)


def kill_started_by(test: str) -> None:
    """Kill the programs that a test of this session has started, and theirs: they inherit pytest's variable."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            is_of_test = variables.get("PYTEST_CURRENT_TEST") == f"{test} (call)"
            if is_of_test and variables.get("TESTED_BY") == str(os.getpid()):
                process.kill()


def git(folder: Path, *words: str) -> str:
    """Run git in a folder and return what it prints."""
    return subprocess.run(["git", "-C", folder, *words], check=True, capture_output=True, text=True).stdout.strip()


def clean_environment() -> dict[str, str]:
    """Return the environment of a program without a launcher."""
    return {**{key: value for key, value in os.environ.items() if key not in LAUNCHED}, **ENVIRONMENT}


def _check(done: Done, code: int | None) -> Done:
    assert code is None or done.code == code, f"expected exit code {code}\n{done.text}"
    return done


def on_gpu(*arguments: object) -> subprocess.CompletedProcess:
    """Run a script in the project's folder with whatever GPU there is."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
