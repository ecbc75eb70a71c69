"""What exchanges put on the wires between hosts, and how long that takes: the arithmetic behind the projection of `strategies.py`.

A group of k processes that shares a payload of V bytes passes it round a ring (Patarasu and Yuan, "Bandwidth optimal all-reduce
algorithms for clusters of workstations", JPDC 69, 2009; NCCL and Gloo do so for large payloads). In every round of the ring each
process sends V / k bytes to the next one:

    reduce_scatter, all_gather    k - 1 rounds           each process sends (k - 1) / k V
    all_reduce                    one after the other    each process sends 2 (k - 1) / k V
    broadcast, reduce             a chain                each process but the last sends V
    all_to_all                    k - 1 rounds           each process sends (k - 1) / k V
    send                                                 V: activations to the next stage, their gradients to the one before

So with all gradients of G bytes, a step of `ddp` sends 2 (k - 1) / k G, and what section 7 of the ZeRO paper (arXiv 1910.02054)
says of its stages follows: stages 1 and 2 as much as ddp, stage 3 and fsdp 1.5 times as much. What a strategy really does is not
taken from a paper here: it is counted (`exchange.py`), and DeepSpeed's stages 1 and 2, for example, all-reduce where the paper
has a reduce-scatter.

Processes are numbered host by host, so a ring of all of them enters and leaves each host once, and the wire of a host carries
what one process sends. Links are full duplex: what counts is the host that sends most. Each round costs the link's latency
once. An exchange within a host is part of what was measured there and costs nothing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.lib.communication_trace import Exchange

# Rounds of the ring, and what each process sends in all of them as a share of the payload, for k processes.
RING: dict[str, Callable[[int], tuple[int, float]]] = {
    "all_reduce": lambda k: (2 * (k - 1), 2 * (k - 1) / k),
    "reduce_scatter": lambda k: (k - 1, (k - 1) / k),
    "all_gather": lambda k: (k - 1, (k - 1) / k),
    "all_to_all": lambda k: (k - 1, (k - 1) / k),
    "broadcast": lambda k: (k - 1, float(k > 1)),
    "reduce": lambda k: (k - 1, float(k > 1)),
    "send": lambda k: (1, 1.0),
    "receive": lambda k: (0, 0.0),  # the sender's business
}


@dataclass(frozen=True)
class Link:
    """Between hosts, in each direction."""

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
        """The groups that share gradients or weights, for each step of a period."""
        if self.topology:
            from parallel.topologies import rounds_of

            return rounds_of(self.topology, self.processes, self.per_host)
        replicas = self.processes // self.stages
        return [[list(range(stage * replicas, (stage + 1) * replicas)) for stage in range(self.stages)]]

    def neighbours(self) -> list[list[int]]:
        """Pairs of processes with consecutive stages of one replica."""
        replicas = self.processes // self.stages
        return [[rank, rank + replicas] for rank in range(self.processes - replicas)]


def sent_by_process(exchanges: Sequence[Exchange]) -> float:
    """Bytes that a process sends in a step, as the exchanges were counted."""
    return sum(RING[exchange.kind](exchange.group)[1] * exchange.payload for exchange in exchanges)


def on_the_wire(exchanges: Sequence[Exchange], measured: Layout, layout: Layout) -> tuple[float, float]:
    """Bytes a step through the busiest host's link, and rounds of latency, for exchanges that were counted under `measured`.

    Payloads of gradients and weights do not depend on the number of processes. The activations between two stages are those
    of the whole batch, dealt out to the replicas.
    """
    num_bytes = rounds = 0.0
    whole = [[list(range(layout.processes))]]
    for exchange in exchanges:
        payload, groups = exchange.payload, layout.rounds()
        if exchange.kind in ("send", "receive"):
            payload, groups = (
                payload * len(measured.neighbours()) / max(1, len(layout.neighbours())),
                [layout.neighbours()],
            )
        elif exchange.control:
            groups = whole
        for chosen in groups:
            most, latency = busiest(exchange.kind, chosen, payload, layout.per_host)
            num_bytes += most / len(groups)
            rounds += latency * exchange.calls / len(groups)
    return num_bytes, rounds


def busiest(kind: str, groups: list[list[int]], payload: float, per_host: int) -> tuple[float, int]:
    """Of exchanges that go on at once in several groups: bytes that leave the busiest host, and rounds of latency."""
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
    """Seconds of a step on so many hosts like the measured one, with the same global batch.

    The computation is divided evenly, what communication costs inside a host stays, and what goes between hosts is added:
    nothing of it is hidden behind the computation. On a slow link there is little to hide it behind; on a fast one this is
    too much by at most the computation's seconds.
    """
    layout = Layout(hosts, measured.per_host, measured.stages, measured.topology)
    return (
        compute_seconds / hosts
        + exposed_seconds
        + (link.seconds(*on_the_wire(exchanges, measured, layout)) if hosts > 1 else 0.0)
    )
