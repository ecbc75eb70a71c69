"""Peers of an exchange: what each announces, which of them take part, and which one leads.

Announcements come from other machines, so nothing in them is trusted: what cannot be parsed, or does not fit this
peer, is left out of the exchange.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROTOCOL = 2  # of what peers announce and exchange; peers of another protocol are left out
HASH = re.compile(r"[0-9a-f]{16}")
ENDPOINT = re.compile(r"\d{1,3}(\.\d{1,3}){3}:\d{1,5}")


@dataclass(frozen=True)
class PeerState:
    """What a peer brings to an exchange.

    Attributes:
        count: number of outer steps made.
        step: number of optimizer steps made.
        share: optimizer steps since the last outer step, as a fraction of the steps between two outer steps.
        values: (N,) float32 on the CPU, to be averaged.
        outer: (M,) float32 on the CPU, equal for all peers: the weights of the last exchange and the outer momentum.
    """

    count: int
    step: int
    share: float
    values: Tensor
    outer: Tensor

    def state_hash(self) -> str:
        """A hash that is equal for peers whose outer states are equal bit for bit."""
        return hashlib.blake2b(self.outer.numpy(), digest_size=8).hexdigest()  # type: ignore[arg-type]  # a buffer

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.values).all() and torch.isfinite(self.outer).all())


@dataclass(frozen=True)
class Member:
    """One peer of a quorum, as it announced itself.

    Attributes:
        endpoint: `address:port` of its store.
        probe_port: port that accepts connections, to test the path to this peer.
        since: start time; the oldest peer leads among equals.
        finite: whether its weights and outer state are finite.
        sizes: (N, M), lengths of the vectors of its PeerState.
        code: fingerprint of its training code.
        unreachable: IDs of peers that it cannot connect to, or that failed twice.
    """

    id: str
    endpoint: str
    number: int
    since: float
    count: int
    step: int
    share: float
    state_hash: str
    finite: bool = True
    sizes: tuple[int, int] = (0, 0)
    code: str = ""
    protocol: int = PROTOCOL
    probe_port: int = 0
    unreachable: frozenset[str] = frozenset()

    @property
    def state(self) -> tuple[int, str]:
        return self.count, self.state_hash

    @property
    def address(self) -> str:
        return self.endpoint.rpartition(":")[0]

    def announcement(self) -> dict[str, Any]:
        """The JSON object that goes to the lighthouse; ID, endpoint and count have fields of their own there."""
        return {
            "protocol": self.protocol,
            "code": self.code,
            "sizes": list(self.sizes),
            "number": self.number,
            "since": self.since,
            "step": self.step,
            "share": self.share,
            "state_hash": self.state_hash,
            "finite": self.finite,
            "probe_port": self.probe_port,
            "unreachable": sorted(self.unreachable),
        }


def parse_member(participant: Any) -> Member:
    """Parse a participant of torchft's quorum. Raises ValueError for an announcement that no peer makes."""
    data = participant.data
    if not isinstance(data, dict):
        raise ValueError("announces nothing")
    if data.get("protocol") != PROTOCOL:
        raise ValueError(f"has protocol {data.get('protocol')!r:.20}, this one {PROTOCOL}")

    def number(name: str, kind: Any, least: float = 0, most: float = 1e15) -> Any:
        value = data.get(name)
        if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:  # NaN fails as well
            raise ValueError(f"announces {name}={value!r:.40}")
        return value

    def text(name: str, value: Any, pattern: re.Pattern) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise ValueError(f"announces {name}={value!r:.40}")
        return value

    sizes, unreachable = data.get("sizes"), data.get("unreachable")
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int for size in sizes)):
        raise ValueError(f"announces sizes={sizes!r:.40}")
    if not (isinstance(unreachable, list) and all(isinstance(key, str) for key in unreachable)):
        raise ValueError(f"announces unreachable={unreachable!r:.40}")
    return Member(
        id=participant.replica_id,
        endpoint=text("endpoint", participant.store_address, ENDPOINT),
        number=number("number", int),
        since=number("since", (int, float)),
        count=participant.step,
        step=number("step", int),
        share=number("share", (int, float), 0.0, 1.0),
        state_hash=text("state_hash", data.get("state_hash"), HASH),
        finite=data.get("finite") is True,
        sizes=(sizes[0], sizes[1]),
        code=str(data.get("code"))[:40],
        protocol=PROTOCOL,
        probe_port=number("probe_port", int, 1, 65535),
        unreachable=frozenset(unreachable[:1000]),
    )


def misfit(member: Member, own: Member, most_outer_steps: float = math.inf, most_steps: float = math.inf) -> str:
    """The reason why a member cannot exchange with this peer; empty if it can."""
    if member.code != own.code:
        return f"runs other code ({member.code:.8}, here {own.code:.8})"
    if member.sizes != own.sizes:
        theirs, ours = (" and ".join(f"{size:,}" for size in sizes) for sizes in (member.sizes, own.sizes))
        return f"has vectors of {theirs} values, here {ours}"
    if not (0 <= member.count <= most_outer_steps and member.step <= most_steps):
        return f"announces outer step {member.count:,} and step {member.step:,}, which this run does not have"
    return ""


def without_unreachable(members: Iterable[Member]) -> tuple[list[Member], list[Member]]:
    """Split members into those that can all connect with one another, and the others.

    While a pair has no path, the member of the most such pairs is left out, of equals the youngest. All members compute
    this from the same announcements, so they agree. A peer that wrongly reports everybody leaves out itself.
    """
    kept = list(members)
    left_out: list[Member] = []
    while True:
        ids = {member.id for member in kept}
        pairs = {frozenset((member.id, other)) for member in kept for other in member.unreachable & ids - {member.id}}
        if not pairs:
            return kept, left_out
        counts = Counter(key for pair in pairs for key in pair)
        worst = max(kept, key=lambda member: (counts[member.id], member.since, member.id))
        kept.remove(worst)
        left_out.append(worst)


@dataclass(frozen=True)
class ExchangeResult:
    """The result of an exchange; `mean` (N,) has the same bits for every member.

    Attributes:
        worked: whether any member had trained; if none had, no outer step is due.
        count, step: the leader's.
        outer: the leader's outer state for a peer whose own differs, otherwise None.
        wait_seconds, seconds: time until the quorum, and time of the exchange after it.
        num_bytes: bytes that this peer sent: 2 (n - 1) / n of the values in a ring of n.
    """

    mean: Tensor
    worked: bool
    count: int
    step: int
    outer: Tensor | None
    members: list[Member]
    wait_seconds: float
    seconds: float
    num_bytes: int


def choose_leader(members: list[Member]) -> Member:
    """The member with the most outer steps; then the one whose state most members share; then the oldest.

    A member with non-finite values leads only if all have some.
    """
    candidates = [member for member in members if member.finite] or members
    furthest = [member for member in candidates if member.count == max(other.count for other in candidates)]
    votes = Counter(member.state_hash for member in furthest)
    return min(furthest, key=lambda member: (-votes[member.state_hash], member.since, member.id))


def ring_bytes(num_values: int, num_peers: int) -> int:
    """Bytes that each of `num_peers` sends to average float32 values in a ring."""
    return round(2 * (num_peers - 1) / num_peers * 4 * num_values)
