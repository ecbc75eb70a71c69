"""The Gloo group of one exchange: the outer state from the leader, and sums over all members."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.peers.membership import Member


class Averaging:
    """A Gloo group of the members of one exchange. All methods are collective and raise RuntimeError if a member fails.

    Args:
        store: where the members find one another's addresses.
        rank: of this peer among `members`.
        device: Gloo device of this peer's address.
        connect_seconds, patience_seconds: time limits of the connections and of each operation.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        members: list[Member],
        device: object,
        connect_seconds: float,
        patience_seconds: float,
    ):
        gloo: Any = dist.ProcessGroupGloo  # PyTorch's type stubs lack its options and operations
        options = gloo._Options()
        options._devices, options._timeout = [device], timedelta(seconds=connect_seconds)
        self.group: Any = gloo(store, rank, len(members), options)
        self.rank, self.members, self.patience = rank, members, timedelta(seconds=patience_seconds)

    def sync_outer_state(self, outer: Tensor, leader: Member) -> Tensor | None:
        """Send the leader's outer state (M,) to members with another one, or receive it; None if not needed."""
        leads = self.members.index(leader)
        if self.rank == leads:
            for other, member in enumerate(self.members):
                if member.state != leader.state:
                    self.group.send([outer], other, 0).wait(self.patience)
        elif self.members[self.rank].state != leader.state:
            received = torch.empty_like(outer)
            self.group.recv([received], leads, 0).wait(self.patience)
            return received
        return None

    def sum(self, values: Tensor) -> Tensor:
        """Sum a vector over all members, in place."""
        options = dist.AllreduceOptions()
        options.timeout = self.patience
        self.group.allreduce([values], options).wait()
        return values

    def sum_of_finite(self, own: Tensor, shares: list[float]) -> tuple[Tensor, list[float], list[Member]]:
        """The sum of the finite contributions, their shares, and the members whose contribution is not finite.

        Every member sends its contribution to all others, so that all see the same. This costs n / 2 times as much as
        the sum in a ring, and happens only after a sum that was not finite.
        """
        total, shares, faulty = torch.zeros_like(own), list(shares), []
        for rank, member in enumerate(self.members):
            values = own.clone() if rank == self.rank else torch.empty_like(own)
            options = dist.BroadcastOptions()
            options.rootRank, options.timeout = rank, self.patience
            self.group.broadcast([values], options).wait()
            if torch.isfinite(values).all():
                total += values
            else:
                shares[rank] = 0.0
                faulty.append(member)
        return (total, shares, faulty) if sum(shares) else (own, [1.0], faulty)
