"""The process group: processes of one machine listen on its loopback interface alone; deterministic kernels."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time

import psutil
import pytest
import torch
from programs import run_ranks

from benchmarks.lib.forked_programs import Program
from common.errors import EXIT_STOPPED, RunError, SettingsError
from common.machine import free_port
from common.stop_signal import StopSignal
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


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"DS_ACCELERATOR": "CPU"}, "DS_ACCELERATOR=CPU is unknown; write DS_ACCELERATOR=cpu, or unset it"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not; unset WORLD_SIZE"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' is not a number; unset it"),
        ({"LOCAL_RANK": "one"}, "LOCAL_RANK='one' is not a number"),
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE and MASTER_ADDR and MASTER_PORT are not"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "RANK is set, but MASTER_ADDR is not"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
            "RANK=2 must be below WORLD_SIZE=2",
        ),
        ({"HANG_SECONDS": "."}, "HANG_SECONDS=. is not a number of seconds"),
        ({"HANG_SECONDS": "soon"}, "HANG_SECONDS=soon is not a number of seconds"),
    ],
)
def test_an_inconsistent_environment_is_one_sentence(monkeypatch, variables, sentence):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as refusal:
        process_group.check_environment()
    assert sentence in str(refusal.value)


def wait_for_nobody() -> None:
    """Wait in train.py as one of two processes, of which the other one never starts."""
    import train

    logging.getLogger("engine").addHandler(logging.StreamHandler(sys.stdout))
    StopSignal()
    process_group.SAY_SECONDS = 0.5
    train.main = process_group.init_process_group
    code = train.run()
    sys.stderr.flush()
    os._exit(code)


def meet_at_a_port() -> None:
    try:
        process_group.init_process_group()
    except RunError as error:
        print(error, flush=True)
        os._exit(1)


@pytest.mark.parametrize("port", ["taken", 99999])
def test_a_port_that_cannot_be_used_is_one_sentence(port):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if port == "taken" else port
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = Program(meet_at_a_port, (), alone).end()
    assert done.code == 1 and str(port) in done.out and done.out.count("\n") == 1 and "Traceback" not in done.text


def test_waiting_for_other_processes_is_reported_and_ends_on_sigterm():
    port = free_port()
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    program = Program(wait_for_nobody, (), alone)
    program.wait_for(f"process 0 of 2 waits at 127.0.0.1:{port} for the other processes")
    program.send(signal.SIGTERM)
    asked = time.monotonic()
    done = program.end()
    assert time.monotonic() - asked < 30 and done.code == EXIT_STOPPED
    assert f"stopped while process 0 of 2 waited for the others at 127.0.0.1:{port}" in done.err


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
