"""Transfer of named tensors between processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.plain_objects import broadcast_value, receive_value, send_value
from parallel.process_group import control_group

State = dict[str, Tensor]


def broadcast_tensors(state: State | None) -> State:
    """Return the main process's tensors on the CPU of every process. Collective."""
    if dist.get_world_size() == 1:
        assert state is not None
        return state
    own = [(key, value.shape, value.dtype) for key, value in state.items()] if state is not None else None
    shared = {}
    for key, shape, dtype in broadcast_value(own, control_group()):
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
    assert states is not None
    for rank, state in enumerate(states):
        if rank:
            _send(state, rank)
    return states[0]


def _send(state: State, rank: int) -> None:
    send_value([(key, value.shape, value.dtype) for key, value in state.items()], rank, control_group())
    for value in state.values():
        dist.send(value, rank, group=control_group())


def _receive(rank: int) -> State:
    listed = receive_value(rank, control_group())
    state = {key: torch.empty(shape, dtype=dtype) for key, shape, dtype in listed}
    for value in state.values():
        dist.recv(value, rank, group=control_group())
    return state
