"""Programs on other hosts, over plain SSH: nothing but an ssh client here and an sshd there is needed.

What goes to a host stands in its standard input, as JSON: the remote shell sees only paths, quoted, so no argument can be
taken apart by it and no secret shows in the list of processes.
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
# What ssh says, the reason in words, and the mend. The first that fits.
SSH_ERRORS = [
    ("permission denied", "refuses the key", "give it yours: ssh-copy-id {host}"),
    (
        "host key verification failed",
        "is not known, or has another key than before",
        "look at it once: ssh {host}; after a new installation: ssh-keygen -R {machine}",
    ),
    ("resolve hostname", "has a name that nobody knows", "write its address, or add the name to ~/.ssh/config"),
    (
        "connection refused",
        "is up, but no SSH server answers there",
        "start sshd on it, or give its port in ~/.ssh/config",
    ),
    ("timed out", "does not answer", "look whether it is on, and in this network: ping {machine}"),
    ("no route", "does not answer", "look whether it is on, and in this network: ping {machine}"),
    ("connection closed", "closes the connection", "look into its log: journalctl -u ssh"),
    ("python3", "has no python3", "install it there: apt-get install python3"),
]


class Unreachable(Exception):
    """A host that does not do what it is asked; `reason` reads on from its name, `mend` says what to do."""

    def __init__(self, reason: str, mend: str):
        super().__init__(reason)
        self.reason, self.mend = reason, mend


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
    """What ~/.ssh/config makes of a name: hostname, port, user."""
    if shutil.which("ssh") is None:
        return {}
    text = subprocess.run(["ssh", "-G", name], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    return dict(line.split(" ", 1) for line in text.splitlines() if line.startswith(("hostname ", "port ", "user ")))


@cache
def is_here(name: str) -> bool:
    """Whether a line of the hostfile means this very machine and user, who then need no SSH."""
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
    """The IPv4 address that a host has when seen from here."""
    try:
        return socket.getaddrinfo(ssh_settings(name).get("hostname", name.split("@")[-1]), None, socket.AF_INET)[0][4][
            0
        ]
    except OSError:
        return None


def command(name: str, words: Iterable[str]) -> list[str]:
    """The words to start here for a program to run there."""
    words = [str(word) for word in words]
    return words if is_here(name) else [*SSH, name, shlex.join(words)]


def start(name: str, words: Iterable[str]) -> subprocess.Popen:
    """A program at work there, with pipes. In a session of its own: a Ctrl-C is for the one who started it to pass on."""
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
    """Run one of our scripts there without its being there, and read the last line that it marks as its answer.

    Raises:
        Unreachable: no answer.
    """
    process, began = start(name, ["python3", "-", json.dumps(request)]), time.time()
    try:
        out, err = process.communicate((PROJECT / "cluster" / script).read_text(), timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Unreachable(
            f"gives no answer in {seconds:.0f} s", f"try it by hand: ssh {name} python3 --version"
        ) from None
    answer = {**answer_in(out, script), "arrived": time.time(), "asked": began}
    if len(answer) == 2:
        raise explain(name, process.returncode, err)
    return answer


def answer_in(out: str, script: str) -> dict[str, Any]:
    """The last marked line of what a host printed; login scripts there may print as well."""
    mark = script.removesuffix(".py") + ":"
    lines = [line[len(mark) :] for line in out.splitlines() if line.startswith(mark)]
    return json.loads(lines[-1]) if lines else {}


def explain(name: str, code: int, err: str) -> Unreachable:
    """Why ssh, or the program there, failed."""
    for sign, reason, mend in SSH_ERRORS:
        if sign in err.lower():
            return Unreachable(reason, mend.format(host=name, machine=name.split("@")[-1]))
    last = err.strip().splitlines()[-1:] or [f"exit code {code}"]
    return Unreachable(f"does not answer as it should ({last[0]})", f"try it by hand: ssh {name} python3 --version")


def at_once(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`function` of each item, all at the same time, in their order; an Unreachable is returned in its place."""

    def safely(item: Any) -> Any:
        try:
            return function(item)
        except Unreachable as error:
            return error

    items = list(items)
    with ThreadPoolExecutor(max(1, len(items))) as pool:
        return list(pool.map(safely, items))


def say(text: str = "") -> None:
    """For the person who started it; the screen's other stream is what training prints."""
    print(text, file=sys.stderr, flush=True)
