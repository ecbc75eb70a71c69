"""One start of training on all hosts, from the first order to the last process: who died, of what, and where the logs are.

An agent (agent.py) runs on every host, at the end of an SSH connection. Both sides say every few seconds that they are alive;
a side that hears nothing for `silence` seconds takes the other for dead. The first failure ends the ranks of every host.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import subprocess
import threading
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster import failure_cause as blame
from cluster import remote
from cluster.failure_cause import EXIT_STOPPED
from cluster.preflight import Meeting
from cluster.remote import Host, say
from common.paths import PROJECT

LAST_WORDS_SECONDS = 3  # between the first failure and the end of the others, who may know more of it
KILL_SECONDS = 15  # until an agent has ended its ranks
SAVE_SECONDS = 120  # after a signal
LEAVE_SECONDS = 60  # between the first host that is done and the last
BATCH = re.compile(r"batch +global batch (\d+) = \d+ per process x (\d+) accumulation steps? x (\d+) process")


@dataclass(frozen=True)
class Limits:
    """Seconds of patience, from the variables SILENCE_SECONDS, GRACE_SECONDS and REJOIN_SECONDS."""

    silence: float = 20  # of the other side, or of a halted rank, before it counts as dead
    grace: float = 20  # for ranks that lost us, to save
    rejoin: float = 30  # for a host that went away, at a restart

    @classmethod
    def of(cls, environment: Any) -> Limits:
        """Raises ValueError: one of the variables is no number of seconds."""
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
        """Seconds between two signs of life."""
        return self.silence / 7


@dataclass
class Plan:
    """What to start, everywhere."""

    hosts: list[Host]
    meeting: Meeting
    python: str
    script: str
    arguments: list[str]
    environment: dict[str, str]
    on_cpu: bool
    runs: Path
    limits: Limits = Limits()

    @property
    def world(self) -> list[tuple[str, list[int]]]:
        return [(host.machine, list(range(host.slots))) for host in self.hosts]

    def command(self, index: int) -> list[str]:
        """DeepSpeed's launcher as it works on one host; `deepspeed --no_ssh` would start the same."""
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
            f"--master_addr={self.meeting.address}",
            f"--master_port={self.meeting.port}",
        ]

    def order(self, index: int, job: str) -> dict[str, Any]:
        """What the agent of a host is told."""
        host = self.hosts[index]
        logs = str(self.runs.absolute() / ".logs" / job / host.machine)
        command = [*self.command(index), f"--enable_each_rank_log={logs}", self.script, *self.arguments]
        variables = dict(self.environment)
        if interface := self.meeting.interfaces.get(host.name):
            # Of several interfaces, the one that leads to the first host; and not the loopback, where many a /etc/hosts
            # puts the host's own name.
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
    """The agent of one host, seen from here."""

    host: Host
    process: subprocess.Popen
    heard: float = field(default_factory=time.monotonic)
    end: dict[str, Any] | None = None
    lost: str = ""

    @property
    def at_work(self) -> bool:
        return self.end is None and not self.lost

    def tell(self, words: str) -> None:
        try:
            self.process.stdin.write(words + "\n")
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass  # its end shows elsewhere


@dataclass
class Outcome:
    """How a start ended. `batch` is (global batch, accumulated, shards), `cause` the host and lines to show."""

    code: int
    hosts: list[Host]
    lost: list[Host] = field(default_factory=list)
    cause: str = ""
    lines: list[str] = field(default_factory=list)
    refused: bool = False
    folder: str = ""
    batch: tuple[int, int, int] | None = None
    logs: str = ""


class Job:
    """The ranks of all hosts."""

    def __init__(self, plan: Plan, stop: Any):
        self.plan, self.stop = plan, stop
        self.name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
        self.gone: list[tuple[int, int]] = []  # (index of the host, rank) in the order in which they ended
        self.folder, self.batch = "", None
        self.failed_at = self.killed_at = self.stopped_at = self.done_at = 0.0
        self.agents = [self._start(i) for i in range(len(plan.hosts))]

    def _start(self, index: int) -> Agent:
        host = self.plan.hosts[index]
        agent = Agent(host, remote.start(host.name, [self.plan.python, str(PROJECT / "cluster" / "agent.py")]))
        agent.tell(json.dumps(self.plan.order(index, self.name)))
        threading.Thread(target=self._listen, args=(index, agent.process.stdout), daemon=True).start()
        return agent

    def _listen(self, index: int, pipe: Any) -> None:
        for line in pipe:
            if line.startswith("{"):  # login scripts may print as well
                self.events.put((index, json.loads(line)))
        self.events.put((index, None))

    def run(self) -> Outcome:
        """Until every agent has ended, or is given up."""
        beat, limits = 0.0, self.plan.limits
        while any(agent.at_work for agent in self.agents):
            try:
                self._handle(*self.events.get(timeout=0.1))
                continue
            except queue.Empty:
                pass
            now = time.monotonic()
            if now - beat > limits.beat:
                beat = now
                self._tell_all("beat")
            for agent in self.agents:
                if agent.at_work and now - agent.heard > limits.silence:
                    self._lose(agent, f"said nothing for {limits.silence:g} s")
            self._drive(now)
        return self._outcome()

    def _handle(self, index: int, message: dict[str, Any] | None) -> None:
        agent = self.agents[index]
        agent.heard = time.monotonic()
        if message is None:
            if agent.at_work:
                self._lose(agent, "ended the connection")
        elif message["event"] == "line":
            print(message["text"], flush=True)
            self._learn(message["text"])
        elif message["event"] == "gone":
            self.gone.append((index, message["rank"]))
        elif message["event"] == "end":
            agent.end = message
            if message["code"] in (0, EXIT_STOPPED):
                self.done_at = self.done_at or time.monotonic()
            else:
                self.failed_at = self.failed_at or time.monotonic()

    def _learn(self, line: str) -> None:
        """From what the first rank says: where the run folder is, and the sizes of the batch."""
        if line.startswith("run       ") and not self.folder:
            self.folder = os.path.abspath(line[10:].strip())
            for agent in self.agents:
                agent.tell(f"logs {self.folder}/logs/{self.name}/{agent.host.machine}")
        if found := BATCH.match(line):
            self.batch = tuple(map(int, found.groups()))

    def _lose(self, agent: Agent, how: str) -> None:
        agent.lost = how
        self.failed_at = self.failed_at or time.monotonic()

    def _tell_all(self, words: str) -> None:
        for agent in self.agents:
            if agent.at_work:
                agent.tell(words)

    def _drive(self, now: float) -> None:
        """Pass on a signal; end the others after a failure; give up those that do not end."""
        if self.stop.requested and not self.stopped_at:
            self.stopped_at = now
            say("Stopping: training saves its state first (a second Ctrl-C ends it in any case).")
            self._tell_all("stop")
        due = (
            self.failed_at
            and now - self.failed_at > LAST_WORDS_SECONDS
            or self.stopped_at
            and now - self.stopped_at > SAVE_SECONDS
            or self.done_at
            and now - self.done_at > LEAVE_SECONDS
            or self.stop.now
        )
        if due and not self.killed_at:
            self.killed_at = now
            self._tell_all("kill")
        if self.killed_at and now - self.killed_at > KILL_SECONDS:
            for agent in self.agents:
                if agent.at_work:
                    self._lose(agent, "does not end its ranks")

    # --- afterwards -----------------------------------------------------------------------------------------------

    def _outcome(self) -> Outcome:
        self._sweep()
        logs = (
            f"{self.folder}/logs/{self.name}" if self.folder else str(self.plan.runs.absolute() / ".logs" / self.name)
        )
        outcome = Outcome(
            0,
            self.plan.hosts,
            [agent.host for agent in self.agents if agent.lost],
            folder=self.folder,
            batch=self.batch,
            logs=logs,
        )
        codes = [agent.end["code"] for agent in self.agents if agent.end]
        if not outcome.lost and all(code in (0, EXIT_STOPPED) for code in codes):
            outcome.code = max(codes)
            return outcome
        outcome.code, outcome.cause, outcome.lines = blame.cause(self.agents, self.gone)
        outcome.refused = bool(outcome.lines) and bool(blame.REFUSED.match(outcome.lines[0]))
        return outcome

    def _sweep(self) -> None:
        """End what an agent that was lost may have left; a host that cannot be reached ends its ranks by itself."""

        def one(item: tuple[int, Agent]) -> None:
            index, agent = item
            agent.process.kill()
            if agent.lost:
                words = [
                    self.plan.python,
                    str(PROJECT / "cluster" / "agent.py"),
                    "--end",
                    f"CLUSTER_JOB={self.name}:{index}",
                ]
                process = remote.start(agent.host.name, words)
                try:
                    process.communicate(timeout=12)
                except subprocess.TimeoutExpired:
                    process.kill()
                if process.returncode:
                    limits = self.plan.limits
                    say(
                        f"{agent.host.name} cannot be reached: its ranks end by themselves within {limits.silence + limits.grace:g} s."
                    )

        remote.at_once(one, enumerate(self.agents))
