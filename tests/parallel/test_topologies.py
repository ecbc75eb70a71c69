"""parallel/topologies.py: every round keeps the mean of the workers, and many rounds make all workers equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import run_ranks
from torch import Tensor

from common.errors import SettingsError
from parallel.topologies import TOPOLOGIES, Round, rounds_of


def mixing_matrix(groups: Round) -> Tensor:
    """Return the mixing matrix of a round: (workers, workers), float64."""
    workers = sum(len(group) for group in groups)
    matrix = torch.zeros(workers, workers, dtype=torch.float64)
    for group in groups:
        for i in group:
            matrix[i, group] = 1 / len(group)
    return matrix


def machines(name: str, workers: int) -> list[int]:
    """Workers a machine that a topology can be tried with."""
    if name != "alternating_exponential_ring":
        return [workers]
    return [size for size in (1, 2, 3) if workers % size == 0 and workers // size in (2, 4, 8)]


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_every_round_keeps_the_mean_and_many_rounds_make_all_equal(name, workers):
    for per_machine in machines(name, workers):
        product = torch.eye(workers, dtype=torch.float64)
        rounds = rounds_of(name, workers, per_machine)
        for groups in rounds:
            assert sorted(worker for group in groups for worker in group) == list(range(workers))
            matrix = mixing_matrix(groups)
            ones = torch.ones(workers, dtype=torch.float64)
            assert torch.allclose(matrix.sum(0), ones) and torch.allclose(matrix.sum(1), ones) and (matrix >= 0).all()
            product = matrix @ product
        mean = torch.full_like(product, 1 / workers)
        assert torch.allclose(torch.linalg.matrix_power(product, 200), mean, atol=1e-6)
        if name in ("complete", "one_peer_exponential", "alternating_exponential_ring") and workers in (1, 2, 4, 8, 16):
            assert torch.allclose(product, mean)  # after one period already


def test_the_known_graphs():
    assert rounds_of("ring", 4, 4) == [[[0, 1], [2, 3]], [[1, 2], [0, 3]]]
    assert rounds_of("ring", 3, 3) == [[[0, 1], [2]], [[1, 2], [0]], [[0, 2], [1]]]
    assert rounds_of("one_peer_exponential", 4, 4) == [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    # of two pairs of machines, one averages at home while the other sends
    assert rounds_of("alternating_exponential_ring", 8, 2)[:2] == [
        [[0, 1], [2, 3], [4, 5, 6, 7]],
        [[0, 1, 2, 3], [4, 5], [6, 7]],
    ]


@pytest.mark.parametrize(("workers", "per_machine"), [(4, 4), (6, 2), (5, 2), (4, 0)])
def test_alternating_rings_need_a_power_of_two_of_machines(workers, per_machine):
    with pytest.raises(SettingsError, match="needs 2, 4, 8, ... machines"):
        rounds_of("alternating_exponential_ring", workers, per_machine)


def job_on_unequal_machines() -> None:
    import torch.distributed as dist

    from parallel import process_group
    from parallel.gossip import num_per_machine

    process_group.init_process_group()
    assert num_per_machine() == 0
    dist.barrier()
    dist.destroy_process_group()


def test_processes_of_unequal_machines_make_the_same_rounds():
    """Three on one machine and one on another: by its own number, only the latter would find four equal machines."""
    run_ranks(4, job_on_unequal_machines, local=3)


def job_mixing(out: str) -> None:
    """A number a worker, through one period of rounds of every topology, over the groups that an engine makes."""
    import torch.distributed as dist

    from parallel import process_group, tensor_transfer
    from parallel.buffers import mean_over
    from parallel.gossip import join_groups

    process_group.init_process_group()
    results = {}
    for name in TOPOLOGIES:
        value = torch.tensor([float(dist.get_rank() ** 2)])
        for group in join_groups(rounds_of(name, dist.get_world_size(), 2)):
            (value,) = mean_over([value], group)
        results[name] = tensor_transfer.gather_tensors({"value": value})
    if dist.get_rank() == 0:
        torch.save(results, Path(out, "results"))
    dist.barrier()
    dist.destroy_process_group()


def test_four_processes_mix_as_the_matrices_say(tmp_path):
    run_ranks(4, job_mixing, str(tmp_path), local=2)
    results = torch.load(tmp_path / "results", weights_only=False)
    for name in TOPOLOGIES:
        values = torch.arange(4, dtype=torch.float64) ** 2
        for groups in rounds_of(name, 4, 2):
            values = mixing_matrix(groups) @ values
        assert torch.tensor([part["value"] for part in results[name]]).double() == pytest.approx(values), name
