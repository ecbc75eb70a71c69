"""Communication of a process group in training: bytes and time.

Both are observed below all engines, in PyTorch's dispatcher and profiler: DeepSpeed, DistributedDataParallel's reducer
(which is C++) and fully_shard all end in operations of the namespace c10d. Neither disturbs the timed steps, because
both observe additional ones.

Time: the profiler records when each exchange was in flight and when this process computed. On a GPU these are NCCL's
kernels and all other kernels; on a CPU, Gloo's work items and the operations of the training thread. `under_way` is the
time with at least one exchange in flight. `exposed` is the part of it without computation, which is what communication
costs. Both include waiting for a slower process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Interval = tuple[float, float]

# PyTorch operation -> kind of exchange. fully_shard's gradient clipping uses the functional operations.
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "send": "send",
    "recv_": "receive",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
NAMESPACES = ("c10d", "_c10d_functional")
CONTROL_BYTES = 64  # an exchange of at most this size carries a flag or a norm


@dataclass(frozen=True)
class Exchange:
    """Exchanges of one kind among groups of one size: calls per step, and bytes of the full tensors in them.

    Exchanges of a flag or a norm (`control`) are separate: they go to all processes, whatever the topology of the rest.
    """

    kind: str
    group: int
    calls: float
    payload: float
    control: bool = False


class CountExchanges(TorchDispatchMode):
    """Counts every exchange of this process while the mode is active.

    The payload of an exchange is the size of the tensor that the group shares: the gradient of an all-reduce, the full
    tensor (not the shard) of an all-gather or a reduce-scatter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int, bool]] = Counter()
        self.payload: Counter[tuple[str, int, bool]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace in NAMESPACES:
            kind = KINDS.get(function.__name__.partition(".")[0])
            if kind:
                self._add(kind, args)
        return function(*args, **(kwargs or {}))

    def _add(self, kind: str, args: tuple) -> None:
        group, full = group_size(args), max(map(num_bytes, args))
        if kind == "all_gather" and len([arg for arg in args if num_bytes(arg)]) == 1:
            full *= group  # the functional form receives only this process's shard
        key = kind, group, full <= CONTROL_BYTES
        self.calls[key] += 1
        self.payload[key] += full

    def exchanges(self, steps: int) -> list[Exchange]:
        """Return the exchanges per step."""
        return [
            Exchange(kind, group, calls / steps, self.payload[kind, group, control] / steps, control)
            for (kind, group, control), calls in sorted(self.calls.items())
        ]


def uncompiled() -> AbstractContextManager:
    """Run compiled networks eagerly meanwhile: the dispatcher's view must not depend on the compiler."""
    stance = getattr(torch.compiler, "set_stance", None)  # PyTorch 2.6 and newer
    return stance("force_eager") if stance else nullcontext()


def num_bytes(value: Any) -> int:
    """Return the bytes of a tensor or of tensors in nested lists; 0 for everything else."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def group_size(args: Iterable[Any]) -> int:
    """Return the size of the process group that an operation received as object or name; else the world size."""
    for value in args:
        if isinstance(value, dist.ProcessGroup):
            return value.size()
        if isinstance(value, torch.ScriptObject) and str(value._type()).endswith("ProcessGroup"):
            return dist.ProcessGroup.unbox(value).size()
        if isinstance(value, str):
            try:
                return dist.distributed_c10d._resolve_process_group(value).size()
            except (RuntimeError, LookupError, ValueError):  # another string argument: the reduction operation
                continue
    return dist.get_world_size()


@dataclass(frozen=True)
class Timing:
    """Seconds of the profiled steps."""

    steps: float
    under_way: float
    exposed: float

    def shares(self) -> dict[str, float]:
        return {"under_way_share": self.under_way / self.steps, "exposed_share": self.exposed / self.steps}


def time_exchanges(work: Callable[[], None], device: torch.device) -> Timing:
    """Profile `work` and return how much of its time went into communication."""
    from torch.profiler import ProfilerActivity, profile, record_function

    on_gpu = device.type == "cuda"
    with (
        profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler,
        record_function(MARK),
    ):
        work()
        if on_gpu:
            torch.cuda.synchronize(device)
    events = profiler.events()
    mark = next(event for event in events if event.name == MARK and event.device_type == torch.autograd.DeviceType.CPU)
    exchanges, computing = (on_the_gpu if on_gpu else on_the_cpu)(events, mark.thread)
    span = mark.time_range.start, mark.time_range.end
    exchanges, computing = merge(exchanges, span), merge(computing, span)
    return Timing(1e-6 * (span[1] - span[0]), 1e-6 * length(exchanges), 1e-6 * length(subtract(exchanges, computing)))


MARK = "timed exchanges"


def on_the_cpu(events: Iterable[Any], thread: int) -> tuple[list[Interval], list[Interval]]:
    """Return Gloo's work items and the operations of the training thread, as intervals."""
    exchanges = [interval(event) for event in events if event.is_async and event.name.startswith("gloo:")]
    return exchanges, [
        interval(event)
        for event in events
        if event.thread == thread and not event.is_async and event.name.startswith("aten::")
    ]


def on_the_gpu(events: Iterable[Any], thread: int) -> tuple[list[Interval], list[Interval]]:
    """Return NCCL's kernels and all other kernels and copies, as intervals."""
    kernels = [
        event for event in events if event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation
    ]
    exchanges = [interval(event) for event in kernels if "nccl" in event.name.lower()]
    return exchanges, [interval(event) for event in kernels if "nccl" not in event.name.lower()]


def interval(event: Any) -> Interval:
    return event.time_range.start, event.time_range.end


def merge(intervals: Iterable[Interval], within: Interval) -> list[Interval]:
    """Return the union as disjoint, sorted intervals, clipped to `within`."""
    result: list[Interval] = []
    for begin, end in sorted((max(a, within[0]), min(b, within[1])) for a, b in intervals):
        if end <= begin:
            continue
        if result and begin <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((begin, end))
    return result


def subtract(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """Return the parts of `intervals` that no interval of `others` covers; both as `merge` returns them."""
    result, i = [], 0
    for begin, end in intervals:
        while i < len(others) and others[i][1] <= begin:
            i += 1
        j = i
        while begin < end and j < len(others) and others[j][0] < end:
            if others[j][0] > begin:
                result.append((begin, others[j][0]))
            begin = max(begin, others[j][1])
            j += 1
        if begin < end:
            result.append((begin, end))
    return result


def length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
