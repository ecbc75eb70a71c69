"""The process group: processes of one machine listen on its loopback interface alone; deterministic kernels."""

from __future__ import annotations

import os

import psutil
import pytest
import torch
from programs import run_ranks

from benchmarks.lib.forked_programs import Program
from parallel import process_group
from training.determinism import make_deterministic

HERE = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def meet() -> None:
    """Join, exchange a value in every group, and list the addresses on which this process listens."""
    import torch.distributed as dist

    process_group.init_process_group()
    total = torch.ones(3)
    dist.all_reduce(total)
    dist.all_reduce(total, group=process_group.control_group())
    assert total.tolist() == [dist.get_world_size() ** 2] * 3
    listening = {
        link.laddr.ip for link in psutil.Process().net_connections("inet") if link.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= HERE, listening
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("count", [1, 2])
def test_the_processes_of_one_machine_listen_on_its_loopback_interface_alone(count):
    run_ranks(count, meet)


def test_a_process_without_a_launcher_listens_on_the_loopback_interface_alone():
    done = Program(meet, (), {}).end()
    assert done.code == 0, done.text


def deterministic() -> None:
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)


def test_deterministic_kernels_are_used_and_an_operation_without_one_fails():
    done = Program(deterministic, (), {}).end()
    assert done.code == 0, done.text


def test_a_group_that_was_left_is_not_used_again():
    """Two engines one after the other in a process: the second creates its own groups."""
    done = Program(make_two_groups, (), {}).end()
    assert done.code == 0, done.text


def make_two_groups() -> None:
    from parallel import process_group

    for _ in range(2):
        process_group.init_process_group()
        assert process_group.all_gather_objects(3) == [3]
        process_group.control_group()
        process_group.destroy_process_group()
