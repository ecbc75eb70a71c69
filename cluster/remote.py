"""Run programs on other hosts over plain SSH: an ssh client here and an sshd there are all it needs.

Content for a host goes to the program's standard input as JSON. The remote shell sees only quoted paths, so it cannot
split an argument, and no secret shows in the process list.
"""

from __future__ import annotations

import getpass
import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from common.paths import PROJECT

LOCAL_NAMES = {"localhost", "127.0.0.1"}
# Never ask for a password; notice within 20 s that the other side is gone.
SSH = [
    "ssh",
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=8",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=4",
]
EXIT_SSH, EXIT_NOT_FOUND = 255, 127  # ssh itself failed; the shell there did not find the program
# A part of ssh's message, the reason in words, and the fix. The first match counts.
SSH_ERRORS = [
    ("permission denied", "refuses the key", "copy your key to it: ssh-copy-id {host}"),
    (
        "host key verification failed",
        "has an unknown or changed host key",
        "check it once by hand: ssh {host}; after a new installation: ssh-keygen -R {machine}",
    ),
    ("resolve hostname", "has a name that does not resolve", "write its address, or add the name to ~/.ssh/config"),
    (
        "connection refused",
        "is up, but no SSH server answers there",
        "start sshd on it, or give its port in ~/.ssh/config",
    ),
    ("timed out", "does not answer", "check that it is on and in this network: ping {machine}"),
    ("no route", "does not answer", "check that it is on and in this network: ping {machine}"),
    ("connection closed", "closes the connection", "check its log: journalctl -u ssh"),
]


class Unreachable(Exception):
    """A host does not do what it is asked. `reason` continues a sentence that begins with the host's name."""

    def __init__(self, reason: str, fix: str):
        super().__init__(reason)
        self.reason, self.fix = reason, fix


@dataclass(frozen=True)
class Host:
    """A line of the hostfile."""

    name: str
    slots: int

    @property
    def machine(self) -> str:
        """The name without the user."""
        return self.name.split("@")[-1]


@cache
def ssh_settings(name: str) -> dict[str, str]:
    """Host name, port and user that ~/.ssh/config gives for a name."""
    if shutil.which("ssh") is None:
        return {}
    words = ["ssh", "-G", "--", name]
    text = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    return dict(line.split(" ", 1) for line in text.splitlines() if line.startswith(("hostname ", "port ", "user ")))


@cache
def is_here(name: str) -> bool:
    """Whether a name of the hostfile means this machine and user, which need no SSH."""
    if name in LOCAL_NAMES:
        return True
    settings = ssh_settings(name)
    if settings.get("port", "22") != "22" or settings.get("user", getpass.getuser()) != getpass.getuser():
        return False
    address = address_of(name)
    with socket.socket() as test:
        try:
            test.bind((address or "", 0))
        except OSError:
            return False
    return address is not None


def address_of(name: str) -> str | None:
    """The IPv4 address of a host as seen from this machine; None if its name does not resolve."""
    machine = ssh_settings(name).get("hostname", name.split("@")[-1])
    try:
        return str(socket.getaddrinfo(machine, None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError):
        return None


def command(name: str, words: Iterable[str]) -> list[str]:
    """The command that runs a program on a host from this machine."""
    words = [str(word) for word in words]
    return words if is_here(name) else [*SSH, "--", name, shlex.join(words)]


def start(name: str, words: Iterable[str]) -> subprocess.Popen:
    """Start a program on a host, with pipes.

    It gets a session of its own, so that Ctrl-C reaches only the launcher, which forwards it.
    """
    return subprocess.Popen(
        command(name, words),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def ask(name: str, script: str, request: dict[str, Any], seconds: float = 20) -> dict[str, Any]:
    """Run one of the scripts of cluster/ on a host that may not have it, and return its marked answer.

    Raises:
        Unreachable: no answer.
    """
    process, began = start(name, ["python3", "-", json.dumps(request)]), time.time()
    try:
        out, err = process.communicate((PROJECT / "cluster" / script).read_text(), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Unreachable(f"gives no answer in {seconds:.0f} s", by_hand(name)) from None
    answer = {**answer_in(out, script), "arrived": time.time(), "asked": began}
    if len(answer) == 2:
        raise explain(name, process.returncode, err)
    return answer


def answer_in(out: str, script: str) -> dict[str, Any]:
    """The last marked JSON object in a host's output; login scripts there may print as well."""
    mark = script.removesuffix(".py") + ":"
    for line in reversed(out.splitlines()):
        if not line.startswith(mark):
            continue
        try:
            answer = json.loads(line[len(mark) :])
        except ValueError:
            continue
        if isinstance(answer, dict):
            return answer
    return {}


def by_hand(name: str) -> str:
    return f"try it by hand: ssh {name} python3 --version"


def explain(name: str, code: int, err: str) -> Unreachable:
    """The reason why ssh, or the program on the host, failed."""
    if code == EXIT_NOT_FOUND:
        return Unreachable("has no python3", "install it there: apt-get install python3")
    for sign, reason, fix in SSH_ERRORS if code == EXIT_SSH else ():
        if sign in err.lower():
            return Unreachable(reason, fix.format(host=name, machine=name.split("@")[-1]))
    last = err.strip().splitlines()[-1:] or [f"exit code {code}"]
    return Unreachable(f"does not answer as expected ({last[0]})", by_hand(name))


def at_once(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """Call `function` for all items in parallel, and return results, or Unreachable errors, in order."""

    def safely(item: Any) -> Any:
        try:
            return function(item)
        except Unreachable as error:
            return error

    items = list(items)
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        return list(pool.map(safely, items))


def say(text: str = "") -> None:
    """Print a line for the user to standard error; standard output is what training prints."""
    print(text, file=sys.stderr, flush=True)
