"""Transfer of named tensors between processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.process_group import control_group

State = dict[str, Tensor]


def broadcast_tensors(state: State | None) -> State:
    """Return the main process's tensors on the CPU of every process. Collective."""
    if dist.get_world_size() == 1:
        return state
    box = [[(key, value.shape, value.dtype) for key, value in state.items()] if state is not None else None]
    dist.broadcast_object_list(box, src=0, group=control_group())
    shared = {}
    for key, shape, dtype in box[0]:
        shared[key] = state[key] if state is not None else torch.empty(shape, dtype=dtype)
        dist.broadcast(shared[key], src=0, group=control_group())
    return shared


def gather_tensors(state: State) -> list[State] | None:
    """Return the CPU tensors of every process, by rank, on the main process; None elsewhere. Collective."""
    if dist.get_rank():
        _send(state, 0)
        return None
    return [state, *(_receive(rank) for rank in range(1, dist.get_world_size()))]


def scatter_tensors(states: list[State] | None) -> State:
    """Inverse of `gather_tensors`: send each process its own tensors. Collective."""
    if dist.get_rank():
        return _receive(0)
    for rank, state in enumerate(states):
        if rank:
            _send(state, rank)
    return states[0]


def _send(state: State, rank: int) -> None:
    dist.send_object_list(
        [[(key, value.shape, value.dtype) for key, value in state.items()]], rank, group=control_group()
    )
    for value in state.values():
        dist.send(value, rank, group=control_group())


def _receive(rank: int) -> State:
    box: list = [None]
    dist.recv_object_list(box, rank, group=control_group())
    state = {key: torch.empty(shape, dtype=dtype) for key, shape, dtype in box[0]}
    for value in state.values():
        dist.recv(value, rank, group=control_group())
    return state
