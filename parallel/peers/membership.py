"""What a peer brings to an exchange, what it gets, and which of the members leads."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PeerState:
    """What a peer brings to an exchange.

    Attributes:
        count: outer steps made.
        step: optimiser steps made.
        share: of the steps that lie between two outer steps, the part it has trained since the last one.
        values: (N,) float32 on the CPU, what is averaged.
        outer: (M,) float32 on the CPU, what all peers have in common: the weights they last agreed on, and the outer momentum.
    """

    count: int
    step: int
    share: float
    values: Tensor
    outer: Tensor

    def mark(self) -> str:
        """Equal for peers whose outer states are equal, bit for bit."""
        return hashlib.blake2b(self.outer.numpy(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Member:
    """One peer of a quorum, as it presented itself."""

    id: str
    place: str
    number: int
    since: float
    count: int
    step: int
    share: float
    mark: str

    @property
    def state(self) -> tuple[int, str]:
        return self.count, self.mark


@dataclass(frozen=True)
class ExchangeResult:
    """What an exchange gave: `mean` (N,) is the same bits for every member.

    Attributes:
        worked: whether any member had trained; if none had, there is no outer step to make.
        count, step: where the leader stood.
        outer: the leader's outer state for a peer that stood elsewhere, else None.
        wait_seconds, seconds: until the quorum, and from then on.
        num_bytes: that this peer sent: 2 (n - 1) / n of the values in a ring of n.
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
    """The furthest; among those, of the state that most members have; among those, the one that has been there the longest."""
    furthest = [member for member in members if member.count == max(other.count for other in members)]
    votes = Counter(member.mark for member in furthest)
    return min(furthest, key=lambda member: (-votes[member.mark], member.since, member.id))


def ring_bytes(num_values: int, num_peers: int) -> int:
    """What each of `num_peers` sends to average float32 values in a ring."""
    return round(2 * (num_peers - 1) / num_peers * 4 * num_values)
