"""Topologies of decentralized training: which workers average with one another in each round.

A topology is a period of rounds. A round divides the workers into groups; every group takes the mean of its members.
So each round's mixing matrix is symmetric and doubly stochastic for any number of workers: it keeps the mean of all
workers, as convergence proofs require (arXiv 1705.09056). `per_machine` is the number of workers on every machine,
0 where the machines differ.
"""

from __future__ import annotations

from collections.abc import Callable

from common.errors import SettingsError
from config.own_parts import find_entry, is_own_part

Round = list[list[int]]  # groups of workers; each worker is in exactly one


def complete(workers: int, per_machine: int) -> list[Round]:
    """All workers average together, so they stay equal."""
    return [[list(range(workers))]]


def ring(workers: int, per_machine: int) -> list[Round]:
    """Each worker averages with its right neighbor, then with its left one; with an odd number, one pauses in turn."""
    rounds = []
    for shift in range(2 if workers % 2 == 0 else workers):
        order = [(shift + i) % workers for i in range(workers)]
        rounds.append([sorted(order[i : i + 2]) for i in range(0, workers, 2)])
    return rounds


def one_peer_exponential(workers: int, per_machine: int) -> list[Round]:
    """Each worker averages with one other, 1, 2, 4, ... places away (arXiv 2110.13363).

    A power of two of workers agree after one period.
    """
    return [_pairs(workers, 1 << i) for i in range((workers - 1).bit_length())] or [[[0]]]


def alternating_exponential_ring(workers: int, per_machine: int) -> list[Round]:
    """Workers average within their machine, then with one other machine, 1, 2, 4, ... places away (arXiv 2410.11998).

    Half of the machines use the opposite order, which distributes the network load over time.

    Raises:
        SettingsError: the machines are not equal, or their number is not a power of two.
    """
    machines = workers // per_machine if per_machine and workers % per_machine == 0 else 0
    if machines < 2 or machines & (machines - 1):
        raise SettingsError(
            "parallel.topology=alternating_exponential_ring needs 2, 4, 8, ... machines with equal numbers of "
            "processes, "
            f"not {workers} processes with {per_machine or 'different numbers'} per machine; "
            "ring and one_peer_exponential take any number"
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
    """Pair each number with the one that differs in the bit `distance`; alone where there is none."""
    return [[i, i + distance] if i + distance < count else [i] for i in range(count) if not i & distance]


TOPOLOGIES: dict[str, Callable[[int, int], list[Round]]] = {
    "complete": complete,
    "ring": ring,
    "one_peer_exponential": one_peer_exponential,
    "alternating_exponential_ring": alternating_exponential_ring,
}


def rounds_of(name: str, workers: int, per_machine: int) -> list[Round]:
    """Return the rounds of one period. Raises SettingsError for an unknown name or an unsuitable number of workers."""
    rounds = find_entry(TOPOLOGIES, "parallel.topology", name)(workers, per_machine)
    for groups in rounds if is_own_part(name) else ():
        if sorted(worker for group in groups for worker in group) != list(range(workers)):
            raise SettingsError(
                f"parallel.topology={name}: a round must put each of the workers 0 to {workers - 1} into one group, "
                f"got {groups}"
            )
    return rounds
