"""Addresses of peers, and the sockets on which a peer listens.

A peer listens on one address of its machine and on no other, with three things: at `port` a store, where newcomers
read the facts of the run and where it meets; at `port + 1` torchft's lighthouse, which keeps the membership; and on
ports that the system chooses, a socket that only accepts connections (it tests the path) and, during an exchange,
Gloo's sockets. Every peer has a lighthouse, so that the run outlives any single peer: all meet at the first one that
answers.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
from datetime import timedelta
from functools import cache
from hashlib import blake2b
from types import ModuleType

import psutil
import torch.distributed as dist

from common.errors import RunError, SettingsError
from common.paths import PROJECT

DEFAULT_PORT = 29600
HEARTBEAT_SECONDS = 5.0  # without a heartbeat, until a peer counts as gone
# What decides how a peer trains: peers of one run must have the same of it.
CODE_FILES = ("train.py", "model.py", "dali_pipeline.py")
CODE_FOLDERS = ("config", "image_data", "models", "optim", "parallel", "training")


def coordination() -> ModuleType:
    """torchft's building blocks. Raises SettingsError if it is not installed."""
    os.environ.setdefault("RUST_LOG", "error")  # otherwise the lighthouse logs every quorum
    try:
        from torchft import coordination
    except ImportError as error:
        raise SettingsError(
            "peers need torchft, which is not installed here; type: pip install torchft==0.2.0 "
            "(available for Python 3.10 to 3.13 and PyTorch 2.7 or newer)"
        ) from error
    return coordination


def split_address(text: str, flag: str) -> tuple[str, int]:
    """Parse `ADDRESS[:PORT]` into an IPv4 address and a port. Raises SettingsError for anything else."""
    name, colon, port = text.partition(":")
    if colon and not (port.isascii() and port.isdecimal() and 1024 <= int(port) < 65535):
        raise SettingsError(f"{flag} {text}: the port must be a number from 1024 to 65534")
    try:
        return socket.gethostbyname(name), int(port) if colon else DEFAULT_PORT
    except (OSError, UnicodeError):
        raise SettingsError(f"{flag} {text}: {name!r} is neither an IPv4 address nor a name that resolves") from None


def check_own(address: str, flag: str) -> str:
    """Return the address if it belongs to this machine. Raises SettingsError otherwise."""
    own = sorted(
        {
            entry.address
            for entries in psutil.net_if_addrs().values()
            for entry in entries
            if entry.family == socket.AF_INET
        }
    )
    if address == "0.0.0.0":
        raise SettingsError(
            f"{flag} 0.0.0.0 would listen on every network of this machine; give the one address at which the others "
            f"reach it (one of {', '.join(own)})"
        )
    if address not in own and not address.startswith("127."):
        raise SettingsError(f"{flag} {address} is not an address of this machine; it has {', '.join(own)}")
    return address


def own_address(towards: str) -> str:
    """The address from which this machine reaches another. Raises SettingsError for a public one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing
        except OSError as error:
            raise SettingsError(f"no route from this machine to {towards}: {error.strerror}") from None
        address = probe.getsockname()[0]
    if ipaddress.ip_address(address).is_global:
        raise SettingsError(
            f"this machine reaches {towards} from its public address {address}, so anyone could connect to it. "
            f"Use addresses of a VPN, or give --peer-address {address} if you want this"
        )
    return address


def lighthouse_of(endpoint: str) -> str:
    """The URL of the lighthouse of the peer at `address:port`."""
    address, _, port = endpoint.rpartition(":")
    return f"http://{address}:{int(port) + 1}"


def open_store(endpoint: str, seconds: float) -> dist.Store:
    """Connect to the store of the peer at `address:port`. Raises OSError or RuntimeError if nothing answers in time."""
    address, _, port = endpoint.rpartition(":")
    socket.create_connection((address, int(port)), timeout=seconds).close()  # without a listener, TCPStore would retry
    return dist.TCPStore(address, int(port), None, False, timedelta(seconds=seconds), wait_for_workers=False)


class Endpoint:
    """The sockets on which this peer listens; `text` is its `address:port` for others.

    Args:
        fixed: whether it must be this port; otherwise another one is used if it is taken.
        patience_seconds: how long peers that have asked the lighthouse for a quorum wait for a peer that is alive but
        late.

    Raises:
        RunError: the port is in use.
    """

    def __init__(self, address: str, port: int, fixed: bool, patience_seconds: float):
        self.address = address
        for candidate in (port, *([] if fixed else [0] * 20)):
            try:
                self._listen(candidate, patience_seconds)
                return
            except OSError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise RunError(f"cannot listen on {address}:{candidate}: {error.strerror}") from None
        raise RunError(
            f"port {port} or {port + 1} of {address} is in use. End the program there, or choose other ports: "
            f"--host-peers {address}:PORT"
        )

    def _listen(self, port: int, patience_seconds: float) -> None:
        listening = socket.socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self.address, port))
            listening.listen(128)
            self.port = listening.getsockname()[1]
            try:
                self.lighthouse = coordination().LighthouseServer(
                    bind=f"{self.address}:{self.port + 1}",
                    min_replicas=1,
                    join_timeout_ms=round(1000 * patience_seconds),
                    quorum_tick_ms=100,
                    heartbeat_timeout_ms=round(1000 * HEARTBEAT_SECONDS),
                )
            except RuntimeError as error:  # the port after the store's is taken
                raise OSError(errno.EADDRINUSE, str(error)) from None
            self.store = dist.TCPStore(
                self.address,
                self.port,
                None,
                True,
                timedelta(seconds=10),
                wait_for_workers=False,
                master_listen_fd=listening.detach(),
            )
            self._accept_probes()
        finally:
            listening.close()

    def _accept_probes(self) -> None:
        """Accept connections on a port that the system chooses, as Gloo's are, and close them."""
        self.probes = socket.create_server((self.address, 0))
        self.probe_port = self.probes.getsockname()[1]

        def work() -> None:
            try:
                while True:
                    self.probes.accept()[0].close()
            except OSError:
                pass  # closed

        threading.Thread(target=work, name="path probes", daemon=True).start()

    @property
    def text(self) -> str:
        return f"{self.address}:{self.port}"

    def close(self) -> None:
        self.lighthouse.shutdown()
        self.probes.shutdown(socket.SHUT_RDWR)  # `close` alone would not wake the thread in `accept`
        self.probes.close()
        del self.store


@cache
def code_fingerprint() -> str:
    """A hash of the code that decides how a peer trains."""
    digest = blake2b(digest_size=8)
    paths = [PROJECT / name for name in CODE_FILES]
    for folder in CODE_FOLDERS:
        paths += sorted((PROJECT / folder).rglob("*.py"))
    for path in paths:
        if path.exists():
            digest.update(f"{path.relative_to(PROJECT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()
