"""Record which peers this one cannot exchange with: no path between the two, or repeated failures.

Each peer announces these IDs with the next quorum, so that all peers leave out the same ones (`without_unreachable`).
"""

from __future__ import annotations

import socket
import time
from collections import Counter

import torch.distributed as dist

from parallel.peers.endpoint import open_store
from parallel.peers.heartbeat import background
from parallel.peers.membership import Member

CONNECT_SECONDS = 20.0  # for the members of a quorum to connect with one another; half of it to arrive at the leader's
PROBE_SECONDS = 3.0  # for one connection to another member; tried twice
FAILURES = 2  # of a member, until it is left out


class MemberFailures:
    """The failures of other peers that the peer with this ID has seen."""

    def __init__(self, own_id: str):
        self.id, self.connect = own_id, can_connect
        self.counts: Counter[str] = Counter()  # since the last exchange that worked
        self.unreachable: dict[str, tuple[str, int] | None] = {}  # ID -> address to try again, None: never

    def still_unreachable(self) -> frozenset[str]:
        """IDs of peers that this one cannot exchange with. A path that works again is removed."""
        tried = {key: background(self.connect, *target) for key, target in self.unreachable.items() if target}
        for key, future in tried.items():
            if future.result():
                del self.unreachable[key]
        return frozenset(self.unreachable)

    def forget_others(self, ids: set[str]) -> None:
        """Forget peers that are not in the quorum any more: a restarted peer has a new ID."""
        self.unreachable = {key: target for key, target in self.unreachable.items() if key in ids}

    def probe(self, members: list[Member]) -> list[Member]:
        """Connect to every other member, twice if needed. Return those that cannot be reached."""
        missing = [member for member in members if member.id != self.id]
        for _ in range(FAILURES):
            tried = [(member, background(self.connect, member.address, member.probe_port)) for member in missing]
            missing = [member for member, future in tried if not future.result()]
        for member in missing:
            self.unreachable[member.id] = (member.address, member.probe_port)
        return missing

    def count(self, member: Member) -> None:
        """Count a failure of a member; the second in a row excludes it."""
        self.counts[member.id] += 1
        if self.counts[member.id] >= FAILURES:
            self.exclude(member)

    def exclude(self, member: Member) -> None:
        if member.id != self.id:
            self.unreachable[member.id] = None

    def clear(self) -> None:
        """Reset the counts after an exchange that worked."""
        self.counts.clear()

    def gather_members(self, members: list[Member], leader: Member, name: str) -> dist.Store:
        """Wait until all members of the exchange `name` have arrived at the leader's store, and return the store.

        Raises:
            OSError, RuntimeError: two members have no path, or a member does not arrive.
        """
        missing = self.probe(members)
        seconds = CONNECT_SECONDS / 2
        try:
            store = dist.PrefixStore(name, open_store(leader.endpoint, seconds))
            store.set(self.id, "no" if missing else "yes")
        except (OSError, RuntimeError):
            self.count(leader)
            raise
        if missing:
            raise RuntimeError(f"no connection to {endpoints_of(missing)}")
        deadline, absent = time.monotonic() + seconds, members
        while absent := [member for member in absent if not store.check([member.id])]:
            if time.monotonic() > deadline:
                for member in absent:
                    self.count(member)
                raise RuntimeError(f"{endpoints_of(absent)} did not arrive within {seconds:g} s")
            time.sleep(0.02)
        if blocked := [member for member in members if store.get(member.id) != b"yes"]:
            raise RuntimeError(f"{endpoints_of(blocked)} cannot connect to all others")
        return store


def endpoints_of(members: list[Member]) -> str:
    return ", ".join(member.endpoint for member in members)


def can_connect(address: str, port: int) -> bool:
    """Whether a TCP connection is accepted within PROBE_SECONDS."""
    try:
        socket.create_connection((address, port), timeout=PROBE_SECONDS).close()
    except OSError:
        return False
    return True
