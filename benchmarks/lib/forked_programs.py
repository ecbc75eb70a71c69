"""The project's scripts as separate processes: on the CPU, with a time limit, and started quickly.

    done = start("train.py", "--max-steps", 3).end()      # forked with PyTorch, DeepSpeed and DALI already in memory

A fork saves four seconds per start. Every program sees the same machine: no GPU, one thread per process.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.lib.private_folder import private_folder
from common.paths import PROJECT

LIMIT_SECONDS = 180  # of one program; a slow machine stays below it, a hang does not
PRELOADED = [
    "torch",
    "deepspeed",
    "deepspeed.ops",
    "nvidia.dali.fn",
    "nvidia.dali.plugin.pytorch",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "torch.utils.tensorboard",
    "pytest",
    # PyTorch optimizers and DeepSpeed engines import these when they are created: half the time of a short run.
    "torch._dynamo",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch.utils.cpp_extension",  # with setuptools: DeepSpeed's builders of operations
    "safetensors.torch",
    "benchmarks.lib.frozen_heap",
]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": str(private_folder("test-extensions")),
}
LAUNCHED = (  # variables that a launcher sets
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Done:
    """How a program ended: its exit code (negative: the signal that killed it) and its output."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


class Program:
    """A running, forked program: `script` with its arguments, or a function."""

    def __init__(self, target: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str]):
        self._folder = tempfile.TemporaryDirectory()
        with mock.patch.dict(os.environ, ENVIRONMENT):  # the fork server keeps the environment that it is started with
            for name in LAUNCHED:
                os.environ.pop(name, None)
            multiprocessing.forkserver.ensure_running()
        self.process = forks.Process(target=_inside, args=(target, arguments, environment, self._folder.name))
        self.process.start()

    def said(self, name: str = "out") -> str:
        """Return what it has written so far to `out` or `err`."""
        path = Path(self._folder.name, name)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text`."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while text not in self.said():
            if not self.process.is_alive() or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"never printed {text!r}\n{self.end().text}")
            time.sleep(0.005)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self, limit_seconds: float = LIMIT_SECONDS) -> Done:
        """Wait for its end; a program that takes longer is killed, and the caller's test fails."""
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
    os.chdir(PROJECT)
    sys.dont_write_bytecode = False  # else each program compiles the project's modules again
    target(*arguments)


def run_script(*words: str) -> None:
    """Run the script that the first word names as the main program of this process."""
    sys.argv = [str(PROJECT / words[0]), *words[1:]]
    sys.path.insert(0, str(PROJECT))
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(script: str, *arguments: Any, **environment: str) -> Program:
    """Fork a script of the project and return at once."""
    return Program(run_script, (script, *map(str, arguments)), environment)
