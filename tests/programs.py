"""The project's scripts as programs of their own: on the CPU, with a time limit, and started quickly.

    done = run("train.py", "--max-steps", 3)          # a process that is forked with PyTorch, DeepSpeed and DALI already in memory
    done = launch(2, "train.py", "--max-steps", 3)    # two, by DeepSpeed's launcher or torchrun, as a person would start them

A fork saves four seconds a start. Every test sees the same machine: no GPU, one thread a process.
"""

from __future__ import annotations

import base64
import json
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
LIMIT_SECONDS = 180  # of one program; a hang, not a slow machine
PRELOADED = ["torch", "deepspeed", "deepspeed.ops", "nvidia.dali.fn", "nvidia.dali.plugin.pytorch", "matplotlib.pyplot", "pytest"]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": str(Path(tempfile.gettempdir()) / f"test-extensions-{os.getuid()}"),
}
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Done:
    """How a program ended: its exit code (negative: the signal that killed it) and what it said."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


class Program:
    """A program at work, forked: `script` with its arguments, or a function."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory()
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the server keeps the environment that it is started with
            for name in LAUNCHED:
                os.environ.pop(name, None)
            multiprocessing.forkserver.ensure_running()
        self.process = forks.Process(target=_inside, args=(target, arguments, environment, self._folder.name))
        self.process.start()

    def said(self, name: str = "out") -> str:
        """What it has written so far, to `out` or `err`."""
        path = Path(self._folder.name, name)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str) -> None:
        """Return as soon as it has printed `text`."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.said():
            if not self.process.is_alive() or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"never said {text!r}\n{self.end().text}")
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self, limit_seconds: float = LIMIT_SECONDS) -> Done:
        """Wait for its end; one that takes longer is killed, and the test fails."""
        self.process.join(limit_seconds)
        hangs = self.process.is_alive()
        if hangs:
            self.process.kill()
            self.process.join()
        done = Done(self.process.exitcode, self.said("out"), self.said("err"))
        assert not hangs, f"still running after {limit_seconds} s\n{done.text}"
        return done


def _inside(target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.update(environment)
    os.chdir(ROOT)
    target(*arguments)


def _script(*words: str) -> None:
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    sys.path.insert(0, str(ROOT))
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script: str, *arguments: Any, **environment: str) -> Program:
    """Fork a script of the project, and return at once."""
    return Program(_script, (script, *map(str, arguments)), environment)


def run(script: str, *arguments: Any, code: int | None = 0, **environment: str) -> Done:
    """Run a script of the project to its end, which must be the exit code `code` (None: any)."""
    return _check(start(script, *arguments, **environment).end(), code)


def run_ranks(processes: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run a function of a test module in a process group of forked processes, which must all succeed."""
    meeting = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [Program(function, arguments, {**meeting, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(processes)]
    for done in [rank.end() for rank in ranks]:
        _check(done, 0)


def launcher(processes: int, script: str, *arguments: Any) -> list[str]:
    """The command that starts a script as several processes: DeepSpeed's launcher for train.py, torchrun for the rest."""
    words = [str(ROOT / script), *map(str, arguments)]
    if script != "train.py":
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}", *words]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(processes))}).encode()).decode()
    return [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--no_local_rank", f"--world_info={world}",
            "--master_addr=127.0.0.1", f"--master_port={free_port()}", *words]


def launch(processes: int, script: str, *arguments: Any, code: int | None = 0) -> Done:
    """Run a script as several processes, by a launcher."""
    child = subprocess.Popen(launcher(processes, script, *arguments), cwd=ROOT, env=clean_environment(), text=True, start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = child.communicate(timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        out, err = child.communicate()
        raise AssertionError(f"still running after {LIMIT_SECONDS} s\n{out}\n{err}") from None
    return _check(Done(child.returncode, out, err), code)


def clean_environment() -> dict[str, str]:
    """The environment of a program that no launcher started."""
    return {**{key: value for key, value in os.environ.items() if key not in LAUNCHED}, **ENVIRONMENT}


def _check(done: Done, code: int | None) -> Done:
    assert code is None or done.code == code, f"exit code {code} was due\n{done.text}"
    return done


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
