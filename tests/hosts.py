"""Several hosts on one machine: network namespaces box1, box2, ... joined by a bridge, with an sshd in each.

    with Hosts(folder, 2) as hosts:
        hosts.run("box1", ["ssh", "box2", "hostname"])
        hosts.cut("box2")                                the cable

Needs root, iproute2 and openssh-server; `missing()` says what is not there. Processes and the file system are shared, but a
host may have a folder of its own at a path (`own`: {host: {path: folder}}): it is bound there in that host's mount namespace,
so that code or data differ.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

ADDRESSES = "10.177.0"
SSHD = "/usr/sbin/sshd"


def missing() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [name for name in ("ip", "ssh", "ssh-keygen", "nsenter", "unshare") if not shutil.which(name)] + [SSHD] * (not os.path.exists(SSHD))
    if absent:
        return f"needs {', '.join(absent)}: apt-get install iproute2 openssh-server"
    probe = subprocess.run(["unshare", "--net", "--mount", "true"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


class Hosts:
    """`count` hosts, up while the `with` lasts. The number of this process in the names lets two test runs work side by side."""

    def __init__(self, folder: Path, count: int, own: dict[str, dict[Path, Path]] | None = None):
        self.folder, self.count, self.own = folder, count, own or {}
        self.names = [f"box{i}" for i in range(1, count + 1)]
        self.bridge = f"br{os.getpid() % 10**6}"
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
            listed = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True).stdout
            for pid in map(int, listed.split()):
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
        return f"{name}-{os.getpid()}"

    def _keys(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("key", "hostkey"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "key.pub", self.folder / "authorized_keys")
        (self.folder / "config").write_text(
            f"Host *\n  User root\n  IdentityFile {self.folder}/key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n")
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
        # A second interface that leads nowhere, and the machine's own name at the loopback, as many a /etc/hosts has it.
        ip("-n", space, "link", "add", "dead0", "type", "veth", "peer", "name", "dead1")
        ip("-n", space, "addr", "add", f"10.178.{i}.1/24", "dev", "dead0")
        ip("-n", space, "link", "set", "dead0", "up")
        for file, text in (("hosts", f"127.0.0.1 localhost {os.uname().nodename}\n"
                            + "".join(f"{ADDRESSES}.{j} box{j}\n" for j in range(1, self.count + 1))), ("resolv.conf", "nameserver 127.0.0.1\n")):
            path = Path("/etc/netns", space, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        config = self.folder / f"sshd-{name}"
        config.write_text(f"HostKey {self.folder}/hostkey\nAuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\nUsePAM no\n"
                          f"PermitRootLogin yes\nPasswordAuthentication no\nMaxStartups 50:30:100\nPidFile none\n")
        binds = "".join(f"mount --bind {source} {target} && " for target, source in self.own.get(name, {}).items())
        words = ["ip", "netns", "exec", space, "unshare", "-m", "sh", "-c", f"{binds}exec {SSHD} -D -f {config} -E {config}.log"]
        self.sshds[name] = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        wait_until(lambda: "Server listening" in read(f"{config}.log"), 10)

    def cable(self, name: str) -> str:
        return f"{name}v{os.getpid() % 10**6}"

    def command(self, name: str, words: list) -> list[str]:
        """The words that start a program on a host from this machine, without a network."""
        return ["nsenter", "-t", str(self.sshds[name].pid), "-n", "-m", f"--wd={os.getcwd()}", *map(str, words)]

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", **variables}

    def start(self, name: str, words: list, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(self.command(name, words), env=self.environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)

    def run(self, name: str, words: list, seconds: float = 60, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(name, words, **variables)
        try:
            out = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{process.communicate()[0]}") from None
        return subprocess.CompletedProcess(words, process.returncode, out)

    def cut(self, name: str) -> None:
        """Pull a host's cable."""
        ip("link", "set", self.cable(name), "down")

    def mend(self, name: str) -> None:
        ip("link", "set", self.cable(name), "up")


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def wait_until(condition, seconds: float, what: str = "waited in vain") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
