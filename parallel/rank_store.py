"""The store where the ranks of a run meet."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from common.errors import RunError

LOOPBACK = ("127.0.0.1", "localhost")


def make_store(limit: timedelta) -> dist.Store | None:
    """Return the store where the ranks meet. It listens on MASTER_ADDR alone; PyTorch's own listens on every interface.

    Its keys begin with RENDEZVOUS_SECRET if the launcher set one (cluster/job.py). So neither a stranger nor a rank of
    another job at the same port counts as a rank. Returns None, for PyTorch's own store, if torchrun has made a store,
    or if this PyTorch (2.0) cannot choose the interface.

    Raises:
        RunError: rank 0 cannot listen on the port.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "master_listen_fd" not in str(
        dist.TCPStore.__init__.__doc__
    ):
        return None
    port, world_size = int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    name, secret = os.environ["MASTER_ADDR"], os.environ.get("RENDEZVOUS_SECRET", "")
    address = "127.0.0.1" if name in LOOPBACK else name
    if os.environ["RANK"] != "0":
        store = dist.TCPStore(address, port, world_size, False, limit)
    else:
        try:
            listener = socket.create_server((own_address(address, world_size), port), backlog=2048)
        except OSError as error:
            raise RunError(
                f"cannot listen on MASTER_ADDR={name}, MASTER_PORT={port}: {error.strerror}. Choose a free MASTER_PORT"
            ) from None
        store = dist.TCPStore(address, port, world_size, True, limit, master_listen_fd=listener.detach())
    return dist.PrefixStore(secret, store) if secret else store


def own_address(name: str, world_size: int) -> str:
    """The IPv4 address to listen on for MASTER_ADDR; empty for all, if this machine does not have the address.

    A host's own name often resolves to the loopback there (/etc/hosts), where other hosts cannot connect. Behind
    address translation, MASTER_ADDR is not an address of the host.
    """
    try:
        address = socket.gethostbyname(name)
        with socket.socket() as test:
            test.bind((address, 0))
    except OSError:
        return ""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    return "" if address.startswith("127.") and num_local < world_size else address
