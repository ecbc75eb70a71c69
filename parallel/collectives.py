"""Collective operations on flags, numbers and small objects."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import process_group
from parallel.plain_objects import broadcast_value


class Collectives:
    """The part of an Engine that exchanges small values between all processes.

    All methods but `own_value` are collective.
    """

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any process. Collective."""
        return self.any_flags(flag)[0]

    def any_flags(self, *flags: bool) -> list[bool]:
        """Which of the flags hold on any process, in one message. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts, group=process_group.control_group())  # on the CPU, so that the GPUs need not wait
        return [count > 0 for count in counts.tolist()]

    def mean(self, value: Tensor) -> float:
        """Return the mean of a CPU scalar over all processes. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            value = value.double()
            dist.all_reduce(value, group=process_group.control_group())  # on the CPU, so that the GPUs need not wait
            return value.item() / dist.get_world_size()
        return value.item()

    def broadcast_object(self, value: Any) -> Any:
        """Return the main process's value on every process. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        return broadcast_value(value, process_group.control_group())

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Return every process's value, by rank, on every process. Collective."""
        return process_group.all_gather_objects(value)

    def own_value(self, values: list[float]) -> float:
        """Return this process's value of an earlier `all_gather_objects`; the mean if the process count has changed."""
        if len(values) == dist.get_world_size():
            return values[dist.get_rank()]
        return sum(values) / max(1, len(values))
