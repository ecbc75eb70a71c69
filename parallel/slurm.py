"""Translate the variables of a Slurm task into those that PyTorch and DeepSpeed read.

srun --ntasks-per-node=8 python train.py        one task per rank; Slurm sets SLURM_PROCID where torchrun sets RANK
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import MutableMapping

from common.machine import FIRST_PORT, NUM_PORTS


def rank_environment(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT if `srun` started this process.

    Returns whether it did. It does nothing if a launcher has set RANK, and outside a step of srun: the batch script
    itself has a SLURM_PROCID too, but what it starts directly is a single process, whatever the number of tasks.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return False
    local_rank, local_size = environment["SLURM_LOCALID"], tasks_on_this_node(environment)
    if local_size > 1 and re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", "")):
        local_rank = "0"  # --gpus-per-task=1: each task sees one GPU, as device 0
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=environment["SLURM_STEP_NUM_TASKS"],
        LOCAL_RANK=local_rank,
        LOCAL_WORLD_SIZE=str(local_size),
    )
    environment.setdefault("MASTER_ADDR", master_address(environment))
    # The same port on every node, and a different one for every step of every job.
    number = int(environment.get("SLURM_JOB_ID", 0)) * 7 + int(environment.get("SLURM_STEP_ID", 0))
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + number % NUM_PORTS))
    return True


def tasks_on_this_node(environment: MutableMapping[str, str]) -> int:
    """Number of tasks of this step on this node. `2(x3),1` means three nodes with two tasks and one with one."""
    counts: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(count)] * int(times or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def master_address(environment: MutableMapping[str, str]) -> str:
    """The address where the ranks meet: the loopback if the step has one node, otherwise its first node."""
    if int(environment.get("SLURM_STEP_NUM_NODES", 1)) == 1:
        return "127.0.0.1"
    name = expand_nodes(environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"])[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:  # a name that only Slurm knows; in a batch job srun runs on the first node
        return environment.get("SLURM_LAUNCH_NODE_IPADDR", name)
    return name


def expand_nodes(text: str) -> list[str]:
    """Expand Slurm's short form of node names: `gpu[01-03,7],login` -> gpu01, gpu02, gpu03, gpu7, login."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        expanded = [""]
        for plain, ranges in re.findall(r"([^\[]+)|\[([^\]]*)\]", item):
            choices = [plain]
            if ranges:
                choices = []
                for part in ranges.split(","):
                    first, _, last = part.partition("-")
                    choices += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
            expanded = [name + choice for name in expanded for choice in choices]
        names += expanded
    return names
