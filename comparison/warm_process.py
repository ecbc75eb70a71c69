"""Runs of one comparison that are forked from one process which has imported PyTorch: `launch` starts them.

A run in a process of its own spends most of its start on imports: the launcher, DeepSpeed's launcher and train.py, each
in a new interpreter. Here `fork_server.py` imports the packages once per comparison, and each run is a child of it, in
its own session, with its own log. A run that fails, is killed or runs out of memory ends alone. Where the process
cannot fork, runs start one by one through the launcher, as with `compare.py --cold`.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from typing import Any

from common.machine import free_port, is_alive
from common.paths import PROJECT
from common.text import last_error
from comparison.planned_run import PlannedRun
from comparison.run_queue import launch as launch_cold
from records.provenance import versions

SERVER = PROJECT / "comparison" / "fork_server.py"
# Packages that a run imports. This list decides about speed alone: a run imports the others itself.
PACKAGES = (
    "torch",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "numpy",
    "safetensors.torch",
    "tqdm",
    "PIL.JpegImagePlugin",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
)
DEEPSPEED = (
    "deepspeed",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "setuptools",
    "pkg_resources",
)
WITH_DEEPSPEED = ("zero", "pipeline")  # as parallel/strategies.py, which imports PyTorch
LAUNCHED = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE", "NUM_PROCS")


def launch(task: PlannedRun, environment: dict[str, str]) -> Any:
    """Start a run as a fork of this comparison's warm process. As `run_queue.launch`, it does not wait."""
    return _processes().start(task, environment)


@cache
def _processes() -> WarmProcesses:
    """Those of this process. They end before it does; if it is killed, they end because their requests do."""
    processes = WarmProcesses()
    atexit.register(processes.close)
    return processes


class WarmProcesses:
    """The fork servers of a comparison: one for each set of packages and environment, started when first needed."""

    def __init__(self) -> None:
        self.servers: dict[Any, WarmProcess] = {}
        self.versions: dict[str, str] = {}
        self.retired: list[WarmProcess] = []
        self.refusal: str | None = None

    def start(self, task: PlannedRun, environment: dict[str, str]) -> Any:
        """Start a run. Returns an object with `poll()` and `terminate()`, as subprocess.Popen."""
        if self.refusal:
            return launch_cold(task, environment)
        if self.servers and self.versions != versions():
            # Packages were installed meanwhile. The old processes finish their runs; new runs get new processes.
            self.retired += self.servers.values()
            self.servers.clear()
        strategy = task.expected.get("settings", {}).get("strategy")
        packages = PACKAGES + (DEEPSPEED if strategy in WITH_DEEPSPEED else ())
        everything = run_environment(environment)
        # The GPU is chosen when a run first uses CUDA; all other variables may be read by an import.
        key = packages, tuple(sorted(item for item in environment.items() if item[0] != "CUDA_VISIBLE_DEVICES"))
        if key not in self.servers or self.servers[key].has_ended():
            self.versions = versions()
            self.servers[key] = WarmProcess(packages, everything)
        return WarmRun(self, self.servers[key], task, environment, everything)

    def refuse(self, reason: str) -> None:
        """Start all later runs cold, and print why, once."""
        if self.refusal is None:
            self.refusal = reason
            print(f"note: each run starts its own Python process, because {reason}", flush=True)

    def close(self) -> None:
        """End the servers; their runs save first."""
        for server in [*self.servers.values(), *self.retired]:
            server.close()


def run_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the whole environment of a run in one process, as the launchers would set it."""
    on_cpu = {"OMP_WAIT_POLICY": "passive"} if environment.get("DS_ACCELERATOR") == "cpu" else {}
    inherited = {key: value for key, value in os.environ.items() if key not in LAUNCHED}
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**on_cpu, **inherited, **ranks, "MASTER_PORT": str(free_port()), **environment}


class WarmProcess:
    """A running fork server, and what it has replied."""

    def __init__(self, packages: tuple[str, ...], environment: dict[str, str]):
        self.errors = tempfile.TemporaryFile("w+")
        self.child = subprocess.Popen(
            [sys.executable, "-u", str(SERVER), str(PROJECT), *packages],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
            env=environment,
        )
        assert self.child.stdin is not None and self.child.stdout is not None
        os.set_blocking(self.child.stdout.fileno(), False)
        self.count = 0  # of the runs asked for
        self.pids: dict[int, int] = {}
        self.codes: dict[int, int] = {}
        self.cpu_seconds: dict[int, float] = {}
        self.refusal: str | None = None
        self._buffer = b""

    def request(self, message: dict[str, Any]) -> None:
        """Send a request; `read` notices a server that has ended."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(message).encode() + b"\n")
            self.child.stdin.flush()
        except OSError:
            pass

    def read(self) -> None:
        """Take the replies that have arrived."""
        assert self.child.stdout is not None
        ended = self.has_ended()  # before reading, so that its last replies are not missed
        while data := self.child.stdout.read(65536):
            self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            reply = json.loads(line)
            if "refused" in reply:
                self.refusal = reply["refused"]
            elif "pid" in reply:
                self.pids[reply["run"]] = reply["pid"]
            else:
                self.codes[reply["run"]], self.cpu_seconds[reply["run"]] = reply["code"], reply["cpu_seconds"]
        if ended and self.refusal is None:
            self.errors.seek(0)
            self.refusal = f"the warm process ended ({last_error(self.errors.read()) or self.child.returncode})"

    def has_ended(self) -> bool:
        return self.child.poll() is not None

    def close(self) -> None:
        """End the requests, wait for the runs to save, and for the server."""
        assert self.child.stdin is not None
        try:
            self.child.stdin.close()
        except OSError:
            pass
        self.child.wait()


class WarmRun:
    """A run that a fork server was asked for, with the interface of subprocess.Popen."""

    def __init__(
        self,
        processes: WarmProcesses,
        server: WarmProcess,
        task: PlannedRun,
        slot: dict[str, str],
        environment: dict[str, str],
    ):
        self.processes, self.server, self.task, self.slot = processes, server, task, slot
        self.cold: subprocess.Popen | None = None
        self.code: int | None = None
        self.told = 0
        server.count += 1
        self.number = server.count
        task.log.write_bytes(b"")
        server.request(
            {
                "run": self.number,
                "script": str(PROJECT / "train.py"),
                "words": task.arguments,
                "environment": environment,
                "folder": os.getcwd(),
                "log": str(task.log.absolute()),
            }
        )

    @property
    def pid(self) -> int | None:
        """Process number of the run; None until it has been forked."""
        return self.server.pids.get(self.number)

    def poll(self) -> int | None:
        """Return the exit code, None while the run is going on. A run that could not be forked is started cold."""
        if self.cold is not None:
            return self.cold.poll()
        if self.code is not None:
            return self.code
        self.server.read()
        self.code = self.server.codes.get(self.number)
        if self.code is None and self.server.refusal:
            if self.pid is None:
                return self._start_cold(self.server.refusal)
            if not is_alive(self.pid):  # the server was killed, and the kernel has told the run to save
                self.code = -signal.SIGTERM
        if self.code is not None and self.code < 0:
            self._explain(-self.code)
        return self.code

    def terminate(self) -> None:
        """Tell the run to save and end; the second time, to end at once."""
        self.told += 1
        number = signal.SIGTERM if self.told == 1 else signal.SIGINT
        if self.cold is not None:
            self.cold.terminate()
        elif not self.server.has_ended():
            self.server.request({"run": self.number, "signal": int(number)})
        elif self.pid is not None and is_alive(self.pid):
            os.kill(self.pid, number)

    def _start_cold(self, reason: str) -> int | None:
        if self.told:
            self.code = -signal.SIGTERM
            return self.code
        if not self.server.pids:  # it has never forked, so another one would not either
            self.processes.refuse(reason)
        self.cold = launch_cold(self.task, self.slot)
        return None

    def _explain(self, number: int) -> None:
        """Write into the log what ended the process, since it could not."""
        name = signal.Signals(number).name
        why = "; the system may have run out of memory" if number == signal.SIGKILL else ""
        with self.task.log.open("a") as log:
            log.write(f"\nerror: the process of this run was ended by {name}{why}\n")
