"""A process that has imported PyTorch once and forks a child for each run of train.py; a program of its own.

    python -u comparison/fork_server.py PROJECT MODULE...      # requests on standard input, replies on standard output

A child imports train.py and everything of this project from the disk, as a new process would. This server has imported
other packages alone and has used none of them: so a run has the bits, the record of its source code and the present
source files of `python train.py`. That also keeps threads out of the parent, which a fork would lose: OpenMP's
hang the child. Therefore this file imports nothing from the project, and no thread is started before a fork.

Requests are JSON lines: {"run": 3, "script": ..., "words": [...], "environment": {...}, "folder": ..., "log": ...}
starts a run, {"signal": 15, "run": 3} signals it. Replies: {"run": 3, "pid": 71}, {"run": 3, "code": 0,
"cpu_seconds": 9.1} (a negative code: the signal that ended it), and {"refused": "reason"} where this process cannot
fork. At the end of the requests, all runs save and end.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from typing import Any

SECONDS_TO_SAVE = 120.0  # after the end of the requests; then the runs are killed
SET_PARENT_DEATH_SIGNAL = 1  # prctl(2)


def main(project: str, modules: list[str]) -> dict[str, Any] | None:
    """Serve requests. Returns None at their end, and in each child the request that it shall run."""
    replies = os.dup(1)
    os.dup2(2, 1)  # what a package prints at its import is no reply
    sys.path[0] = project  # instead of the folder of this file, as for train.py
    problem = preload(modules)
    if problem:
        _reply(replies, {"refused": problem})
        return None
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages that all children share
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler, so that the wakeup file is written
    running: dict[int, int] = {}  # pid -> number of the run
    buffer, is_open, deadline = b"", True, float("inf")
    while is_open or running:
        select.select([0, woken] if is_open else [woken], [], [], 1.0)
        _drain(woken)
        for number, code, seconds in _ended(running):
            _reply(replies, {"run": number, "code": code, "cpu_seconds": seconds})
        if is_open and select.select([0], [], [], 0)[0]:
            data = os.read(0, 65536)
            is_open, buffer = bool(data), buffer + data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                request = json.loads(line)
                if "signal" in request:
                    _signal([pid for pid, number in running.items() if number == request["run"]], request["signal"])
                    continue
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    for descriptor in (replies, woken, wake):
                        os.close(descriptor)
                    become(request, parent)
                    return request
                running[pid] = request["run"]
                _reply(replies, {"run": request["run"], "pid": pid})
            if not is_open:
                deadline = time.monotonic() + SECONDS_TO_SAVE
                _signal(list(running), signal.SIGTERM)
        if time.monotonic() > deadline:
            _signal(list(running), signal.SIGKILL)
    return None


def preload(modules: list[str]) -> str | None:
    """Import packages; those that are not installed are left out. Returns why this process must not fork, if so."""
    if not hasattr(os, "fork"):
        return "this system cannot fork processes"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # otherwise a look for GPUs initializes CUDA, and forks cannot
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        except Exception as error:  # of an installed package that is broken: the run itself will report it
            return f"{name} cannot be imported ({type(error).__name__}: {error})"
    del os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"]
    others = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if others:
        return f"an imported package has started a thread ({others[0]})"
    torch = sys.modules.get("torch")
    if torch is not None and os.environ.get("DS_ACCELERATOR") != "cpu":
        pid = os.fork()
        if pid == 0:
            os._exit(int(torch.cuda._is_in_bad_fork()))
        if os.waitpid(pid, 0)[1]:
            return "an imported package has initialized CUDA"
    return None


def become(request: dict[str, Any], parent: int) -> None:
    """Turn this forked child into the process that a launcher would start: session, signals, files, environment."""
    os.setsid()  # Ctrl-C in the terminal reaches compare.py alone, which signals its runs once
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)  # the server was killed meanwhile
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    for name in [name for name in os.environ if name not in request["environment"]]:
        del os.environ[name]
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [request["script"], *request["words"]]
    # Python's multiprocessing has kept this module under a second name; the record of the run's source would list it.
    sys.modules["__main__"].__file__ = request["script"]


def _ended(running: dict[int, int]) -> list[tuple[int, int, float]]:
    """Collect the children that have ended: number of the run, exit code, CPU seconds."""
    ended = []
    for pid in list(running):
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            seconds = usage.ru_utime + usage.ru_stime
            ended.append((running.pop(pid), os.waitstatus_to_exitcode(status), seconds))
    return ended


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)  # not reaped yet, so the number is still this child's


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except BlockingIOError:
        pass


def _reply(descriptor: int, message: dict[str, Any]) -> None:
    try:
        os.write(descriptor, json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # compare.py has ended; the requests end too


if __name__ == "__main__":
    try:
        asked = main(sys.argv[1], sys.argv[2:])
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    if asked is not None:
        # The interpreter of the child ends as that of `python train.py`: with its threads and exit handlers.
        runpy.run_path(asked["script"], run_name="__main__")
