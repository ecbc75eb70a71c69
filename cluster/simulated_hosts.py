"""Simulate several hosts on one machine: network namespaces box1, box2, ... joined by a bridge, with an sshd in each.

    with Hosts(folder, 2) as hosts:
        hosts.run("box1", ["ssh", "box2", "hostname"])
        hosts.cut("box2")                                unplug the cable

Needs root, iproute2 and openssh-server; `missing()` returns what is missing. All hosts share processes and the file
system, but a host may have its own folder at a path (`own`: {host: {path: folder}}), bound in that host's mount
namespace, so that code or data differ. Every host has a second interface that leads nowhere, and on the host its own
name resolves to that one. failure_trial.py and tests/cluster/test_several_hosts.py use these hosts.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

ADDRESSES, DEAD_ADDRESSES = "10.177.0", "10.178"
SSHD = "/usr/sbin/sshd"
TOOLS = ("ip", "ssh", "ssh-keygen", "nsenter", "unshare")


@cache
def missing() -> str:
    """The reason why hosts cannot be simulated here, found by trying; empty if they can."""
    if os.geteuid() != 0:
        return "needs root"
    if absent := [name for name in (*TOOLS, SSHD) if not shutil.which(name)]:
        return f"needs {', '.join(absent)}: apt-get install iproute2 openssh-server"
    with tempfile.TemporaryDirectory() as folder:
        try:
            with Hosts(Path(folder, "hosts"), 2) as hosts:
                done = hosts.run("box1", ["ssh", "box2", "true"])
        except HostsError as error:
            return f"cannot create namespaces: {error}"
    return "" if done.returncode == 0 else f"ssh between namespaces fails: {done.stdout.strip()}"


class HostsError(RuntimeError):
    """This machine cannot create or use the simulated hosts."""


class Hosts:
    """`count` hosts that exist during a `with` block. A random word in all names keeps concurrent instances apart.

    Args:
        folder: where keys and settings are written; it is created.
        own: folders that a host has instead of the shared ones.
        ports: ports of SSH servers that do not listen on 22.
    """

    def __init__(
        self,
        folder: Path,
        count: int,
        own: dict[str, dict[Path, Path]] | None = None,
        ports: dict[str, int] | None = None,
    ):
        self.folder, self.count, self.own, self.ports = folder, count, own or {}, ports or {}
        self.names = [f"box{i}" for i in range(1, count + 1)]
        self.word = secrets.token_hex(3)
        self.bridge = f"br{self.word}"
        self.sshds: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Hosts:
        try:
            self._keys()
            ip("link", "add", "name", self.bridge, "type", "bridge")
            ip("link", "set", self.bridge, "up")
            for i in range(1, self.count + 1):
                self._host(i)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.names:
            for pid in self.processes(name):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if name in self.sshds:
                self.sshds[name].wait(10)
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)
            shutil.rmtree(f"/etc/netns/{self.space(name)}", ignore_errors=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)

    def space(self, name: str) -> str:
        return f"{name}-{self.word}"

    def cable(self, name: str) -> str:
        return f"{name}v{self.word}"

    # --- creating the hosts ----------------------------------------------------------------------------------------

    def _keys(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        ports = "".join(f"Host {name}\n  Port {port}\n" for name, port in self.ports.items())
        (self.folder / "config").write_text(
            f"{ports}Host *\n  User root\n  IdentityFile {self.folder}/key\n  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        )
        (self.folder / "bin").mkdir()
        (self.folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/config "$@"\n')
        (self.folder / "bin/ssh").chmod(0o755)
        Path("/run/sshd").mkdir(exist_ok=True)

    def _host(self, i: int) -> None:
        name, space = f"box{i}", self.space(f"box{i}")
        ip("netns", "add", space)
        ip("-n", space, "link", "set", "lo", "up")
        ip("link", "add", self.cable(name), "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", self.cable(name), "master", self.bridge, "up")
        ip("-n", space, "addr", "add", f"{ADDRESSES}.{i}/24", "dev", "eth0")
        ip("-n", space, "link", "set", "eth0", "up")
        # The interface that leads nowhere comes before the other in every list.
        ip("-n", space, "link", "add", "dead0", "type", "veth", "peer", "name", "dead1")
        ip("-n", space, "addr", "add", f"{DEAD_ADDRESSES}.{i}.1/24", "dev", "dead0")
        ip("-n", space, "link", "set", "dead0", "up")
        others = "".join(f"{ADDRESSES}.{j} box{j}\n" for j in range(1, self.count + 1) if j != i)
        # On a host, its own name does not resolve to the shared network, as with many an /etc/hosts.
        for file, text in (
            ("hosts", f"127.0.0.1 localhost {os.uname().nodename}\n{DEAD_ADDRESSES}.{i}.1 box{i}\n{others}"),
            ("resolv.conf", "nameserver 127.0.0.1\n"),
        ):
            path = Path("/etc/netns", space, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self._sshd(name)

    def _sshd(self, name: str) -> None:
        config = self.folder / f"sshd-{name}"
        config.write_text(
            f"Port {self.ports.get(name, 22)}\nHostKey {self.folder}/hostkey\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPasswordAuthentication no\n"
            "MaxStartups 50:30:100\nPidFile none\n"
        )
        binds = "".join(
            f"{shlex.join(['mount', '--bind', str(source), str(target)])} && "
            for target, source in self.own.get(name, {}).items()
        )
        words = [
            "ip",
            "netns",
            "exec",
            self.space(name),
            "unshare",
            "-m",
            "sh",
            "-c",
            f"{binds}exec {SSHD} -D -f {config} -E {config}.log",
        ]
        self.sshds[name] = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while "Server listening" not in read(f"{config}.log"):
            if self.sshds[name].poll() is not None:
                errors = self.sshds[name].stderr
                assert errors is not None
                raise HostsError(f"sshd of {name}: {errors.read().strip()} {read(f'{config}.log').strip()}")
            time.sleep(0.02)

    # --- using the hosts -------------------------------------------------------------------------------------------

    def command(self, name: str, words: list) -> list[str]:
        """The command that starts a program on a host from this machine, without a network."""
        return ["nsenter", "-t", str(self.sshds[name].pid), "-n", "-m", f"--wd={os.getcwd()}", *map(str, words)]

    def environment(self, **variables: str) -> dict[str, str]:
        """The environment of a program on a host: its `ssh` knows the other hosts."""
        return {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", **variables}

    def start(self, name: str, words: list, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(name, words),
            env=self.environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name: str, words: list, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(name, words, **variables)
        try:
            out = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise HostsError(
                f"still running after {seconds} s: {' '.join(map(str, words))}\n{process.communicate()[0]}"
            ) from None
        return subprocess.CompletedProcess(words, process.returncode, out)

    def processes(self, name: str) -> list[int]:
        """The process IDs of all processes on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True).stdout
        return [int(pid) for pid in listed.split()]

    def at_work(self) -> list[str]:
        """`host: command` of every process on any host, except the SSH servers."""
        commands = [
            (name, read(f"/proc/{pid}/cmdline").replace("\0", " ").strip())
            for name in self.names
            for pid in self.processes(name)
        ]
        return [
            f"{name}: {command}" for name, command in commands if command and not command.startswith((SSHD, "sshd"))
        ]

    def cut(self, name: str) -> None:
        """Unplug a host's cable."""
        ip("link", "set", self.cable(name), "down")

    def reconnect(self, name: str) -> None:
        ip("link", "set", self.cable(name), "up")

    def wait_for_network(self, seconds: float = 30) -> None:
        """Wait until the first host reaches the SSH server of every other one: it takes a while after `reconnect`."""

        def reaches(number: int, name: str) -> bool:
            connect = f"exec 3<>/dev/tcp/{ADDRESSES}.{number}/{self.ports.get(name, 22)}"
            return self.run(self.names[0], ["timeout", "2", "bash", "-c", connect]).returncode == 0

        others = list(enumerate(self.names[1:], start=2))
        wait_until(lambda: all(reaches(*other) for other in others), seconds)


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # not there yet, or of a process that has ended
        return ""


def wait_until(
    condition: Callable[[], object],
    seconds: float,
    what: Callable[[], str] | str = "the condition did not become true in time",
) -> None:
    """Return as soon as `condition` holds. Raises AssertionError if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(what() if callable(what) else what)
        time.sleep(0.05)
