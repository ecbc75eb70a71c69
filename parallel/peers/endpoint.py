"""Where peers find one another: addresses, and what a peer listens with.

A peer listens on one address of its machine and on no other, with three things: at `port` a store, where newcomers read
which run this is and where it meets; at `port + 1` torchft's lighthouse, which keeps the membership; and during an
exchange Gloo's sockets, on ports that the system chooses. Every peer has a lighthouse, so that the run outlives any of
them: all meet at the first that answers.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from datetime import timedelta
from types import ModuleType

import psutil
import torch.distributed as dist

from common.errors import RunError, SettingsError

DEFAULT_PORT = 29600
HEARTBEAT_SECONDS = 5.0  # a peer whose heartbeats stay away for so long is gone


def coordination() -> ModuleType:
    """torchft's own building blocks. Raises SettingsError where it is not installed."""
    os.environ.setdefault("RUST_LOG", "error")  # else the lighthouse tells of every quorum
    try:
        from torchft import coordination
    except ImportError as error:
        raise SettingsError(
            "peers need torchft, which is not installed here: pip install torchft==0.2.0 "
            "(it exists for Python 3.10 to 3.13 and PyTorch 2.7 or newer)"
        ) from error
    return coordination


def split_address(text: str, flag: str) -> tuple[str, int]:
    """IPv4 address and port of `ADDRESS[:PORT]`. Raises SettingsError for what is neither."""
    name, colon, port = text.partition(":")
    if colon and not (port.isdecimal() and 1024 <= int(port) < 65535):
        raise SettingsError(f"{flag} {text}: the port must be a number from 1024 to 65534")
    try:
        return socket.gethostbyname(name), int(port) if colon else DEFAULT_PORT
    except OSError:
        raise SettingsError(
            f"{flag} {text}: {name!r} is neither an IPv4 address nor a name that this machine knows"
        ) from None


def check_own(address: str, flag: str) -> str:
    """The address, when it is one of this machine's. Raises SettingsError otherwise."""
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
            f"{flag} 0.0.0.0 would listen on every network of this machine; name the one address by which the others "
            f"reach it (of {', '.join(own)})"
        )
    if address not in own and not address.startswith("127."):
        raise SettingsError(f"{flag} {address} is no address of this machine, which has {', '.join(own)}")
    return address


def own_address(towards: str) -> str:
    """The address of this machine from which it reaches another. Raises SettingsError for a public one: nobody asked for that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # sends nothing
        except OSError as error:
            raise SettingsError(f"there is no way from here to {towards}: {error.strerror}") from None
        address = probe.getsockname()[0]
    if ipaddress.ip_address(address).is_global:
        raise SettingsError(
            f"this machine would reach {towards} from its public address {address}, and anyone could then talk to this peer; "
            f"use the addresses of a VPN, or give --peer-address {address} if that is what you want"
        )
    return address


def lighthouse_of(place: str) -> str:
    """The URL of the lighthouse of the place `address:port`."""
    address, _, port = place.rpartition(":")
    return f"http://{address}:{int(port) + 1}"


def open_store(place: str, seconds: float) -> dist.Store:
    """The store of the place `address:port`. Raises OSError or RuntimeError when nothing answers there in time."""
    address, _, port = place.rpartition(":")
    socket.create_connection(
        (address, int(port)), timeout=seconds
    ).close()  # where nothing listens, the store would try on
    return dist.TCPStore(address, int(port), None, False, timedelta(seconds=seconds), wait_for_workers=False)


class Endpoint:
    """What this peer listens with; `text` is how others name it.

    Args:
        fixed: whether it must be this very port, or may be another where it is in use.
        patience_seconds: how long those who have come to the lighthouse wait for a peer that is alive but late.

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
            f"port {port} or {port + 1} of {address} is in use: end what listens there, or choose another pair with "
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
            except RuntimeError as error:  # the port after the store's is not free
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
        finally:
            listening.close()

    @property
    def text(self) -> str:
        return f"{self.address}:{self.port}"

    def close(self) -> None:
        self.lighthouse.shutdown()
        del self.store
