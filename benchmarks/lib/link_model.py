"""Bytes and seconds of communication between hosts: the model behind the projection of `strategies.py`.

A group of k processes that shares a payload of V bytes passes it around a ring (Patarasu and Yuan, "Bandwidth optimal
all-reduce algorithms for clusters of workstations", JPDC 69, 2009; NCCL and Gloo do so for large payloads). In every
round of the ring each process sends V / k bytes to the next one:

    reduce_scatter, all_gather    k - 1 rounds        each process sends (k - 1) / k V
    all_reduce                    both in sequence    each process sends 2 (k - 1) / k V
    broadcast, reduce             a chain             each process but the last sends V
    all_to_all                    k - 1 rounds        each process sends (k - 1) / k V
    send                                              V: activations to the next stage, their gradients back

With gradients of G bytes, a step of `ddp` therefore sends 2 (k - 1) / k G. Section 7 of the ZeRO paper (arXiv
1910.02054) follows: stages 1 and 2 send as much as ddp, stage 3 and fsdp 1.5 times as much. The payloads are not taken
from the paper but counted (`communication_trace.py`): DeepSpeed's stages 1 and 2, for example, all-reduce where the
paper reduce-scatters.

Processes are numbered host by host, so a ring of all of them enters and leaves each host once, and a host's link
carries what one process sends. Links are full duplex: the host that sends most determines the time. Each round costs
the link's latency once. Communication inside a host is part of the measurement on that host and adds nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.lib.communication_trace import Exchange

# For k processes: rounds of the ring, and the share of the payload that each process sends in all rounds.
RING: dict[str, Callable[[int], tuple[int, float]]] = {
    "all_reduce": lambda k: (2 * (k - 1), 2 * (k - 1) / k),
    "reduce_scatter": lambda k: (k - 1, (k - 1) / k),
    "all_gather": lambda k: (k - 1, (k - 1) / k),
    "all_to_all": lambda k: (k - 1, (k - 1) / k),
    "broadcast": lambda k: (k - 1, float(k > 1)),
    "reduce": lambda k: (k - 1, float(k > 1)),
    "send": lambda k: (1, 1.0),
    "receive": lambda k: (0, 0.0),  # counted at the sender
}


@dataclass(frozen=True)
class Link:
    """A link between hosts; the numbers hold in each direction."""

    gigabits: float
    latency_seconds: float

    def __str__(self) -> str:
        return f"{self.gigabits:g} Gbit/s, {1e6 * self.latency_seconds:g} us"

    def seconds(self, num_bytes: float, rounds: float) -> float:
        return 8 * num_bytes / (1e9 * self.gigabits) + rounds * self.latency_seconds


@dataclass(frozen=True)
class Layout:
    """How a strategy's processes are numbered and grouped: hosts x per_host of them."""

    hosts: int
    per_host: int
    stages: int = 1  # of a pipeline
    topology: str | None = None  # of gossip

    @property
    def processes(self) -> int:
        return self.hosts * self.per_host

    def rounds(self) -> list[list[list[int]]]:
        """Return the groups that share gradients or weights, for each step of a period."""
        if self.topology:
            from parallel.topologies import rounds_of

            return rounds_of(self.topology, self.processes, self.per_host)
        replicas = self.processes // self.stages
        return [[list(range(stage * replicas, (stage + 1) * replicas)) for stage in range(self.stages)]]

    def adjacent_stages(self) -> list[list[int]]:
        """Return pairs of processes that hold consecutive stages of one replica."""
        replicas = self.processes // self.stages
        return [[rank, rank + replicas] for rank in range(self.processes - replicas)]


def sent_by_process(exchanges: Sequence[Exchange]) -> float:
    """Return the bytes that a process sends per step, from the counted exchanges."""
    return sum(RING[exchange.kind](exchange.group)[1] * exchange.payload for exchange in exchanges)


def on_the_wire(exchanges: Sequence[Exchange], measured: Layout, layout: Layout) -> tuple[float, float]:
    """Return bytes per step through the busiest host's link, and rounds of latency.

    `exchanges` were counted under the layout `measured`. Payloads of gradients and weights do not depend on the number
    of processes. The activations between two stages are those of the full batch, divided over the replicas.
    """
    num_bytes = rounds = 0.0
    everyone = [[list(range(layout.processes))]]
    for exchange in exchanges:
        payload, groups = exchange.payload, layout.rounds()
        if exchange.kind in ("send", "receive"):
            payload, groups = (
                payload * len(measured.adjacent_stages()) / max(1, len(layout.adjacent_stages())),
                [layout.adjacent_stages()],
            )
        elif exchange.control:
            groups = everyone
        for chosen in groups:
            most, latency = busiest(exchange.kind, chosen, payload, layout.per_host)
            num_bytes += most / len(groups)
            rounds += latency * exchange.calls / len(groups)
    return num_bytes, rounds


def busiest(kind: str, groups: list[list[int]], payload: float, per_host: int) -> tuple[float, int]:
    """Return bytes that leave the busiest host and rounds of latency, for concurrent exchanges in several groups."""
    leaving: Counter[int] = Counter()
    latency = 0
    for group in groups:
        rounds, share = RING[kind](len(group))
        ring = group[1:] + (group[:1] if kind not in ("broadcast", "reduce") else [])  # a chain has an end
        crossing = [a // per_host for a, b in zip(group, ring, strict=False) if a // per_host != b // per_host]
        leaving.update({host: crossing.count(host) * share * payload for host in set(crossing)})
        latency = max(latency, rounds if crossing else 0)
    return max(leaving.values(), default=0.0), latency


def project(
    exchanges: Sequence[Exchange],
    measured: Layout,
    hosts: int,
    compute_seconds: float,
    exposed_seconds: float,
    link: Link,
) -> float:
    """Return seconds per step on `hosts` hosts like the measured one, with the same global batch.

    The computation is divided evenly, communication inside a host stays as measured, and communication between hosts is
    added without overlap. On a slow link there is little computation to overlap with; on a fast one the result is too
    high by at most the computation's seconds.
    """
    layout = Layout(hosts, measured.per_host, measured.stages, measured.topology)
    return (
        compute_seconds / hosts
        + exposed_seconds
        + (link.seconds(*on_the_wire(exchanges, measured, layout)) if hosts > 1 else 0.0)
    )
