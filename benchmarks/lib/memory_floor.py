"""Memory floor of a training step: the time that its unavoidable memory traffic takes at the bandwidth of the device.

The traffic is counted, not measured. A forward and a backward pass run on fake tensors, which have shapes and no data,
and every operation of PyTorch's dispatcher is recorded with the bytes that it reads and writes:

    matrix products, convolutions, attention, batch normalization and custom kernels
                    read their inputs and write their outputs
    everything else (activations, normalization, residuals, casts, losses)
                    is fused: connected operations between two of the above read each input from outside once and write
                    each output that is used outside once, as an ideal compiler would do
    the optimizer   reads parameters, gradients and its state, and writes parameters and state

No implementation with these operations moves fewer bytes, except where a tensor stays in a cache from one operation to
the next. The bandwidth is that of a large copy in the same run, bytes read plus bytes written.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.lib.timing import synchronize

# Operations of PyTorch that are a kernel of their own even for an ideal compiler; so is every operation outside of
# `aten`.
SEPARATE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "batch_norm", "attention")
OPTIMIZER_STATES = {"AdamW": 2, "Adam": 2, "Lamb": 2, "Lion": 1, "Muon": 1, "SGD": 1}  # tensors per parameter, in fp32
COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}  # far beyond any cache

Version = tuple[int, int]  # a storage, and how often it has been written in place


@dataclass
class Operation:
    """One recorded operation: bytes by the version of a storage, and how many separate kernels precede it."""

    separate: bool
    depth: int
    reads: dict[Version, int] = field(default_factory=dict)
    writes: dict[Version, int] = field(default_factory=dict)


class RecordTraffic(TorchDispatchMode):
    """Records every operation that is not a view while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._versions: dict[int, int] = defaultdict(int)
        self._depths: dict[Version, int] = {}
        self._alive: list[Any] = []  # storages, so that none is freed and its address reused

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = [(self._version(tensor), num_bytes(tensor), tensor) for tensor in tensors_in((args, kwargs or {}))]
        result = function(*args, **(kwargs or {}))
        written = self._written(function, args, kwargs or {}, result, {version[0] for version, *_ in before})
        if written:
            self._record(function, before, written)
        return result

    def _written(self, function: Any, args: tuple, kwargs: dict, result: Any, given: set[int]) -> list[Tensor]:
        """Tensors that the operation computes: outputs with new storage, and arguments that it changes in place."""
        changed = []
        for i, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                changed += tensors_in(args[i] if i < len(args) else kwargs.get(argument.name))
        return [tensor for tensor in tensors_in(result) if address(tensor) not in given] + changed

    def _record(self, function: Any, before: list[tuple[Version, int, Tensor]], written: list[Tensor]) -> None:
        name = function._schema.name.partition("::")
        separate = name[0] not in ("aten", "prims") or any(part in name[2] for part in SEPARATE)
        depth = max((self._depths.get(version, 0) for version, *_ in before), default=0) + separate
        operation = Operation(separate, depth, {version: size for version, size, _ in before})
        for tensor in written:
            self._alive.append(tensor)
            self._versions[address(tensor)] += 1
            operation.writes[self._version(tensor)] = num_bytes(tensor)
            self._depths[self._version(tensor)] = depth
        self.operations.append(operation)

    def _version(self, tensor: Tensor) -> Version:
        self._alive.append(tensor.untyped_storage())
        return address(tensor), self._versions[address(tensor)]


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (list, tuple)) else []


def address(tensor: Tensor) -> int:
    """Return what identifies the storage of a tensor; views share it."""
    return tensor.untyped_storage()._cdata


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; broadcast dimensions (stride 0) count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def fused_bytes(operations: Iterable[Operation]) -> int:
    """Return the traffic of all operations, with those between two separate kernels fused."""
    operations = list(operations)
    groups = fuse(operations)
    readers: dict[Version, set[int]] = defaultdict(set)
    for i, operation in enumerate(operations):
        for version in operation.reads:
            readers[version].add(groups[i])
    reads: dict[int, dict[Version, int]] = defaultdict(dict)
    total, inside = 0, defaultdict(set)
    for i, operation in enumerate(operations):
        inside[groups[i]] |= set(operation.writes)
        for version, size in operation.writes.items():
            if readers[version] != {groups[i]}:  # used outside, or a result: a gradient, the loss
                total += size
        for version, size in operation.reads.items():
            reads[groups[i]][version] = max(size, reads[groups[i]].get(version, 0))
    return total + sum(
        size for group, sizes in reads.items() for version, size in sizes.items() if version not in inside[group]
    )


def fuse(operations: list[Operation]) -> list[int]:
    """Return the group of each operation: connected ones with the same number of separate kernels before them."""
    parent = list(range(len(operations)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    writer: dict[Version, int] = {}
    for i, operation in enumerate(operations):
        for version in operation.reads:
            j = writer.get(version)
            if j is not None and not operation.separate and not operations[j].separate:
                if operation.depth == operations[j].depth:
                    parent[root(i)] = root(j)
        writer.update(dict.fromkeys(operation.writes, i))
    return [root(i) for i in range(len(operations))]


def pass_bytes(build: Callable[[], nn.Module], images: tuple[int, ...], bf16: bool, device: torch.device) -> int:
    """Return the traffic of one forward and backward pass for images of shape (B, 3, S, S)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with device:  # PyTorch 2.11: a module of fake tensors cannot be moved to another device
            network = build().train()
        batch, labels = torch.empty(images, device=device), torch.empty(images[0], dtype=torch.long, device=device)
        recorder = RecordTraffic()
        with recorder:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                scores = network(batch)
            F.cross_entropy(scores.float(), labels).backward()
    return fused_bytes(recorder.operations)


def optimizer_bytes(num_parameters: int, kind: str) -> int:
    """Return the traffic of an update in fp32: read the gradient, read and write parameter and state."""
    return 4 * num_parameters * (1 + 2 * (1 + OPTIMIZER_STATES.get(kind, 1)))


def copy_bandwidth(device: torch.device, repeats: int = 8) -> float:
    """Return bytes/s of the fastest of several large copies on the device, read plus written."""
    size = COPY_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(repeats + 1):  # the first one touches the pages
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size / best
