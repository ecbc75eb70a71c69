"""Start training once on all hosts and supervise it until the last process has ended.

An agent (agent.py) runs on every host, at the end of an SSH connection. Both sides send a heartbeat every few seconds.
A side that receives nothing for `silence` seconds treats the other as dead. The first failure ends the ranks of all
hosts.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import secrets
import subprocess
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster import failure_cause, remote
from cluster.agent import MARK
from cluster.failure_cause import EXIT_STOPPED
from cluster.preflight import Rendezvous
from cluster.remote import Host, say
from common.launch_facts import launch_facts_in
from common.paths import PROJECT

LAST_WORDS_SECONDS = 3  # between the first failure and the end of the other ranks, which may report its cause
KILL_SECONDS = 15  # until an agent has ended its ranks
LEAVE_SECONDS = 60  # between the first host that finishes and the last


@dataclass(frozen=True)
class Limits:
    """Time limits in seconds, from the variables SILENCE_SECONDS, GRACE_SECONDS, REJOIN_SECONDS and SAVE_SECONDS."""

    silence: float = 20  # without a heartbeat, or of a suspended rank, until the other side counts as dead
    grace: float = 20  # for ranks to save after the launcher is lost
    rejoin: float = 30  # for a lost host to come back before a restart
    save: float = 600  # for ranks to save after a signal, which may come during an evaluation or a compilation

    @classmethod
    def of(cls, environment: Any) -> Limits:
        """Read the limits from variables. Raises ValueError if one of them is not a number of seconds."""
        found = {}
        for limit in fields(cls):
            name = f"{limit.name.upper()}_SECONDS"
            if text := environment.get(name):
                if not re.fullmatch(r"\d+(\.\d+)?", text) or not float(text):
                    raise ValueError(f"{name} must be a number of seconds above 0, not '{text}'")
                found[limit.name] = float(text)
        return cls(**found)

    @property
    def beat(self) -> float:
        """Seconds between two heartbeats."""
        return self.silence / 7


@dataclass
class Plan:
    """What to start on every host."""

    hosts: list[Host]
    rendezvous: Rendezvous
    python: str
    script: str
    arguments: list[str]
    environment: dict[str, str]
    on_cpu: bool
    runs: Path
    limits: Limits = Limits()
    # Only ranks of this job know it, so no stranger at the port can pass for a rank (parallel/process_group.py).
    secret: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)

    @property
    def world(self) -> list[tuple[str, list[int]]]:
        return [(host.machine, list(range(host.slots))) for host in self.hosts]

    def command(self, index: int) -> list[str]:
        """DeepSpeed's per-machine launcher for one host; `deepspeed --no_ssh` would start the same."""
        world = base64.urlsafe_b64encode(json.dumps(dict(self.world)).encode()).decode()
        return [
            self.python,
            "-u",
            "-m",
            "deepspeed.launcher.launch",
            "--log_level=critical",
            "--no_local_rank",
            f"--node_rank={index}",
            f"--world_info={world}",
            f"--master_addr={self.rendezvous.address}",
            f"--master_port={self.rendezvous.port}",
        ]

    def order(self, index: int, job: str) -> dict[str, Any]:
        """The order for the agent of one host."""
        host = self.hosts[index]
        logs = str(self.runs.absolute() / ".logs" / job / host.machine)
        command = [*self.command(index), f"--enable_each_rank_log={logs}", self.script, *self.arguments]
        variables = {**self.environment, "RENDEZVOUS_SECRET": self.secret}
        if interface := self.rendezvous.interfaces.get(host.name):
            # Of several interfaces, the one that leads to the first host. It must not be the loopback interface, where
            # many an /etc/hosts puts the host's own name.
            for name, value in (
                ("GLOO_SOCKET_IFNAME", interface),
                ("TP_SOCKET_IFNAME", interface),
                ("NCCL_SOCKET_IFNAME", f"={interface}"),
            ):
                variables.setdefault(name, value)
        return {
            "job": job,
            "index": index,
            "world": self.world,
            "command": command,
            "cwd": os.getcwd(),
            "environment": variables,
            "logs": logs,
            "on_cpu": self.on_cpu,
            "silence": self.limits.silence,
            "grace": self.limits.grace,
            "beat": self.limits.beat,
        }


@dataclass
class Agent:
    """The launcher's view of one host's agent. A thread writes to it, so a full pipe blocks nothing else."""

    host: Host
    process: subprocess.Popen
    heard: float = field(default_factory=time.monotonic)
    end: dict[str, Any] | None = None
    lost: str = ""
    outgoing: queue.Queue[str] = field(default_factory=queue.Queue)

    def __post_init__(self) -> None:
        threading.Thread(target=self._write, daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self.end is None and not self.lost

    def send(self, words: str) -> None:
        self.outgoing.put(words)

    def _write(self) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        try:
            while True:
                stdin.write(self.outgoing.get() + "\n")
                stdin.flush()
        except (OSError, ValueError):
            pass  # the end of its output is noticed in Job._handle


@dataclass
class Outcome:
    """How a start ended; `cause` and `lines` are printed.

    `folder` of the run and `batch` (global batch, accumulation steps, ranks per shard) are unknown until training
    begins.
    """

    code: int
    hosts: list[Host]
    lost: list[Host] = field(default_factory=list)
    cause: str = ""
    lines: list[str] = field(default_factory=list)
    refused: bool = False
    folder: str = ""
    batch: tuple[int, int, int] | None = None
    logs: str = ""


def message_in(line: str) -> dict[str, Any] | None:
    """The agent's message in a line of its output; None for what login scripts print."""
    if not line.startswith(MARK):
        return None
    try:
        message = json.loads(line[len(MARK) :])
    except ValueError:
        return None
    return message if isinstance(message, dict) and "event" in message else None


class Job:
    """The ranks of all hosts."""

    def __init__(self, plan: Plan, stop: Any):
        self.plan, self.stop = plan, stop
        self.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.gone: list[tuple[int, int]] = []  # (index of the host, rank) in the order in which they ended
        self.folder = ""
        self.batch: tuple[int, int, int] | None = None
        self.failed_at = self.killed_at = self.stopped_at = self.done_at = 0.0
        self.agents = [self._start(i) for i in range(len(plan.hosts))]
        self.is_over = threading.Event()

    def _start(self, index: int) -> Agent:
        host = self.plan.hosts[index]
        agent = Agent(host, remote.start(host.name, [self.plan.python, str(PROJECT / "cluster" / "agent.py")]))
        agent.send(json.dumps(self.plan.order(index, self.name)))
        threading.Thread(target=self._listen, args=(index, agent.process.stdout), daemon=True).start()
        return agent

    def _listen(self, index: int, pipe: Any) -> None:
        for line in pipe:
            if message := message_in(line):
                self.events.put((index, message))
        self.events.put((index, None))

    def _beat(self) -> None:
        """Send heartbeats from a thread of their own, whatever the main thread waits for."""
        while not self.is_over.wait(self.plan.limits.beat):
            self._send_all("beat")

    def run(self) -> Outcome:
        """Supervise until every agent has ended or is given up."""
        threading.Thread(target=self._beat, daemon=True).start()
        limits = self.plan.limits
        while any(agent.is_running for agent in self.agents):
            try:
                self._handle(*self.events.get(timeout=0.1))
                continue
            except queue.Empty:
                pass
            now = time.monotonic()
            for agent in self.agents:
                if agent.is_running and now - agent.heard > limits.silence:
                    self._lose(agent, f"sent no heartbeat for {limits.silence:g} s")
            self._drive(now)
        self.is_over.set()
        return self._outcome()

    def _handle(self, index: int, message: dict[str, Any] | None) -> None:
        agent = self.agents[index]
        agent.heard = time.monotonic()
        if message is None:
            if agent.is_running:
                self._lose(agent, "closed the connection")
        elif message["event"] == "line":
            if facts := launch_facts_in(message["text"]):
                self._learn(*facts)
            else:
                print(message["text"], flush=True)
        elif message["event"] == "gone":
            self.gone.append((index, message["rank"]))
        elif message["event"] == "end":
            agent.end = message
            if message["code"] in (0, EXIT_STOPPED):
                self.done_at = self.done_at or time.monotonic()
            else:
                self.failed_at = self.failed_at or time.monotonic()

    def _learn(self, folder: str, batch: tuple[int, int, int]) -> None:
        """Record the facts of the run, and let the agents move their logs into its folder."""
        total, accumulation, shards = batch
        ranks = sum(host.slots for host in self.plan.hosts)
        self.folder, self.batch = folder, (total, accumulation, max(1, ranks // shards))
        for agent in self.agents:
            agent.send(f"logs {folder}/logs/{self.name}/{agent.host.machine}")

    def _lose(self, agent: Agent, how: str) -> None:
        agent.lost = how
        self.failed_at = self.failed_at or time.monotonic()

    def _send_all(self, words: str) -> None:
        for agent in self.agents:
            if agent.is_running:
                agent.send(words)

    def _drive(self, now: float) -> None:
        """Forward a signal, end the other hosts after a failure, and give up hosts that do not end."""
        if self.stop.requested and not self.stopped_at:
            self.stopped_at = now
            say(
                "Stopping: training saves its state first; that may take "
                f"{self.plan.limits.save:g} s (press Ctrl-C again to end it without saving)."
            )
            self._send_all("stop")
        late = self.stopped_at and now - self.stopped_at > self.plan.limits.save
        due = (
            self.failed_at
            and now - self.failed_at > LAST_WORDS_SECONDS
            or self.done_at
            and now - self.done_at > LEAVE_SECONDS
            or late
            or self.stop.now
        )
        if due and not self.killed_at:
            self.killed_at = now
            if self.stop.now:
                say("Ending the ranks at once.")
            elif late:
                say(f"The ranks have not saved within {self.plan.limits.save:g} s: ending them.")
            self._send_all("kill")
        if self.killed_at and now - self.killed_at > KILL_SECONDS:
            for agent in self.agents:
                if agent.is_running:
                    self._lose(agent, "does not end its ranks")

    # --- afterwards ------------------------------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        self._sweep()
        hidden = str(self.plan.runs.absolute() / ".logs" / self.name)
        outcome = Outcome(
            0,
            self.plan.hosts,
            [agent.host for agent in self.agents if agent.lost],
            folder=self.folder,
            batch=self.batch,
            logs=f"{self.folder}/logs/{self.name}" if self.folder else hidden,
        )
        codes = [agent.end["code"] for agent in self.agents if agent.end]
        if not outcome.lost and all(code in (0, EXIT_STOPPED) for code in codes):
            outcome.code = max(codes)
            return outcome
        outcome.code, outcome.cause, outcome.lines = failure_cause.cause(self.agents, self.gone)
        outcome.refused = failure_cause.is_refusal(outcome.lines, has_begun=bool(self.folder))
        return outcome

    def _sweep(self) -> None:
        """End what a lost agent may have left behind. A host that cannot be reached ends its ranks by itself."""

        def one(item: tuple[int, Agent]) -> None:
            index, agent = item
            agent.process.kill()
            if not agent.lost:
                return
            mark = f"CLUSTER_JOB={self.name}:{index}"
            words = [self.plan.python, str(PROJECT / "cluster" / "agent.py"), "--end", mark]
            process = remote.start(agent.host.name, words)
            try:
                process.communicate(timeout=12)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.returncode != 0:
                seconds = self.plan.limits.silence + self.plan.limits.grace
                say(f"{agent.host.name} cannot be reached: its ranks end by themselves within {seconds:g} s.")

        remote.at_once(one, enumerate(self.agents))
