"""Programs of one or several processes that answer a request in JSON, each with a time limit.

    answers = run_group("benchmarks/lib/strategy_worker.py", request, processes=2, limit_seconds=300)

The processes are new and get the environment that a launcher would set (RANK, WORLD_SIZE, MASTER_ADDR ...). Their
arguments are two paths: the request file, and the folder where process i writes its answer as i.json. A crash, an error
or a hang of a group becomes an exception with one sentence; the caller's process is not affected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from common.errors import DatasetError, SettingsError
from common.machine import free_port
from common.paths import PROJECT
from common.text import last_error

GRACE_SECONDS = 5.0  # that the other processes get to end by themselves after one has failed


class Failed(Exception):
    """A group did not answer; the message says why in one sentence."""


class Running(Protocol):
    """A running process."""

    def poll(self) -> int | None:
        """Return its exit code, None while it runs."""

    def kill(self) -> None: ...

    def said(self) -> str:
        """Return its standard error so far."""


class Fresh:
    """A new Python process that runs one of the project's programs."""

    def __init__(self, program: str, words: list[str], environment: dict[str, str]):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the child)
        self._child = subprocess.Popen(
            [sys.executable, str(PROJECT / program), *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, **environment},
            cwd=PROJECT,
        )
        self.poll = self._child.poll

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()


Start = Callable[[str, list[str], dict[str, str]], Running]


def run_group(
    program: str,
    request: dict[str, Any],
    processes: int,
    limit_seconds: float,
    environment: dict[str, str] | None = None,
    start: Start = Fresh,
) -> list[dict[str, Any]]:
    """Run a program in several processes and return their answers by rank.

    Raises:
        Failed: a process ended without an answer, answered with an error, or exceeded the time limit.
    """
    launched = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with tempfile.TemporaryDirectory(prefix="group-") as folder:
        question = Path(folder, "request.json")
        question.write_text(json.dumps(request))
        children = [
            start(
                program,
                [str(question), folder],
                {**launched, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]
        try:
            late = not wait(children, limit_seconds)
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
        return collect(Path(folder), children, f"still running after {limit_seconds:g} s" if late else None)


def wait(children: list[Running], limit_seconds: float) -> bool:
    """Wait until all have ended, or shortly after one has failed. Returns False if the limit passes first."""
    deadline, failed = time.monotonic() + limit_seconds, False
    while any(child.poll() is None for child in children):
        if time.monotonic() > deadline:
            return failed
        if not failed and any(child.poll() for child in children):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        time.sleep(0.02)
    return True


def collect(folder: Path, children: list[Running], problem: str | None) -> list[dict[str, Any]]:
    """Return what the processes wrote. Raises Failed with the most informative reason."""
    files = [folder / f"{rank}.json" for rank in range(len(children))]
    answers = [json.loads(file.read_text()) if file.exists() else None for file in files]
    for answer in answers:
        if answer and "error" in answer:
            raise Failed(answer["error"])
    # Report the process that failed by itself before those that were killed because of it.
    codes = [(child.poll() or 0) for child in children]
    for rank in sorted(range(len(children)), key=lambda rank: (codes[rank] < 0, rank)):
        if answers[rank] is None or codes[rank]:
            raise Failed(
                problem
                or last_error(children[rank].said())
                or f"process {rank} ended with exit code {codes[rank]} and printed nothing"
            )
    return answers


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Run `work` on the request in a group's process, write its answer or its error, and return the exit code."""
    question, folder = map(Path, sys.argv[1:])
    try:
        reply = work(json.loads(question.read_text()))
    except (SettingsError, DatasetError) as error:
        reply = {"error": str(error)}
    file = folder / f"{os.environ['RANK']}.json"
    file.with_suffix(".part").write_text(json.dumps(reply))
    file.with_suffix(".part").rename(file)
    return 1 if "error" in reply else 0


def device_environment(threads: int) -> dict[str, str]:
    """Return variables that a process needs before it loads PyTorch: on a CPU, its number of threads."""
    import torch

    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        return {}
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}


def keep_to(threads: int, pin: bool) -> None:
    """Use this many threads and, with `pin`, only as many cores.

    Without pinning, a lone process would use the cores that other rows of the table give to several processes.
    """
    import torch

    torch.set_num_threads(threads)
    if pin:
        first = threads * int(os.environ["LOCAL_RANK"])
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[first : first + threads])
