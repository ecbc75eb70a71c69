"""Who averages with whom in decentralised training, round after round.

A topology is a period of rounds; a round cuts the workers into groups, and every group takes the mean of its members.
So whatever the number of workers, each round's mixing matrix is symmetric and doubly stochastic: it leaves the mean of
all workers where it is, which is what convergence proofs ask for (arXiv 1705.09056).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import SettingsError, unknown

Round = list[list[int]]  # groups of workers; each worker is in exactly one


def complete(workers: int, per_machine: int) -> list[Round]:
    """All with all: the workers stay equal."""
    return [[list(range(workers))]]


def ring(workers: int, per_machine: int) -> list[Round]:
    """With the right neighbour, then with the left one; of an odd number one sits out, each in its turn."""
    rounds = []
    for shift in range(2 if workers % 2 == 0 else workers):
        order = [(shift + i) % workers for i in range(workers)]
        rounds.append([sorted(order[i : i + 2]) for i in range(0, workers, 2)])
    return rounds


def one_peer_exponential(workers: int, per_machine: int) -> list[Round]:
    """With one other worker, 1, 2, 4, ... places away; a power of two of workers agree after one period (arXiv 2110.13363)."""
    return [_pairs(workers, 1 << i) for i in range((workers - 1).bit_length())] or [[[0]]]


def alternating_exponential_ring(workers: int, per_machine: int) -> list[Round]:
    """Within a machine, then with one other machine, 1, 2, 4, ... places away; half of the machines do it the other way
    round, which spreads the load of the network over time (arXiv 2410.11998).

    Raises:
        SettingsError: not a power of two of equal machines.
    """
    machines = workers // per_machine
    if workers % per_machine or machines < 2 or machines & (machines - 1):
        raise SettingsError(
            f"parallel.topology=alternating_exponential_ring needs 2, 4, 8, ... machines of as many processes each, not "
            f"{workers} processes with {per_machine} on this machine; ring or one_peer_exponential take any number"
        )
    alone = [list(range(m * per_machine, (m + 1) * per_machine)) for m in range(machines)]
    rounds = []
    for i in range((machines - 1).bit_length()):
        first, second = [], []
        for number, (a, b) in enumerate(_pairs(machines, 1 << i)):
            together, apart = [alone[a] + alone[b]], [alone[a], alone[b]]
            first += apart if number % 2 == 0 else together
            second += together if number % 2 == 0 else apart
        rounds += [first, second]
    return rounds


def _pairs(count: int, distance: int) -> Round:
    """Each number with the one that differs in the bit `distance`; alone where there is none."""
    return [[i, i + distance] if i + distance < count else [i] for i in range(count) if not i & distance]


TOPOLOGIES: dict[str, Callable[[int, int], list[Round]]] = {
    "complete": complete,
    "ring": ring,
    "one_peer_exponential": one_peer_exponential,
    "alternating_exponential_ring": alternating_exponential_ring,
}


def rounds_of(name: str, workers: int, per_machine: int) -> list[Round]:
    """The period of rounds of a topology. Raises SettingsError for an unknown name or a number of workers that does not fit."""
    if name not in TOPOLOGIES:
        raise SettingsError(unknown("parallel.topology", name, list(TOPOLOGIES)))
    return TOPOLOGIES[name](workers, per_machine)


def mixing_matrix(groups: Round) -> Tensor:
    """What a round does to the column of all workers' weights: (workers, workers), float64."""
    workers = sum(len(group) for group in groups)
    matrix = torch.zeros(workers, workers, dtype=torch.float64)
    for group in groups:
        for i in group:
            matrix[i, group] = 1 / len(group)
    return matrix
