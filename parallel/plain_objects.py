"""Small objects as tensors, for messages between processes: values and data classes, but nothing that could run code.

PyTorch's `broadcast_object_list` unpickles whatever arrives, so a stranger that reaches the port first could run any
code in the other processes.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import pickle
from typing import Any

import torch
import torch.distributed as dist

PROJECT_PACKAGES = ("common", "config", "records", "image_data", "optim", "models", "parallel", "inference", "training")
# Classes of Python and PyTorch whose instances are plain values.
PLAIN_CLASSES = {
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "complex"),
    ("builtins", "slice"),
    ("builtins", "range"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("datetime", "timedelta"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch", "Size"),
}


class PlainPickler(pickle.Pickler):
    """Pickles tensors as bytes: PyTorch's own way names functions that the other side would have to call."""

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype).removeprefix("torch."), tuple(value.shape), flat.numpy().tobytes()


class PlainUnpickler(pickle.Unpickler):
    """Unpickles values, tensors and instances of the project's data classes, but nothing that could run other code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN_CLASSES:
            return super().find_class(module, name)
        if module.split(".")[0] in PROJECT_PACKAGES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and (
                dataclasses.is_dataclass(found) or issubclass(found, (tuple, enum.Enum, Exception))
            ):
                return found
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"a process sent a {module}.{name}, which is no plain value")

    def persistent_load(self, saved: Any) -> torch.Tensor:
        name, shape, data = saved
        dtype = getattr(torch, name)
        if not data:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def pack(value: Any) -> torch.Tensor:
    file = io.BytesIO()
    PlainPickler(file).dump(value)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def unpack(data: torch.Tensor) -> Any:
    return PlainUnpickler(io.BytesIO(data.numpy().tobytes())).load()


def gather_values(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every process's value, by rank, on every process. Collective; `group` is one of Gloo with all processes."""
    own = pack(value)
    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(own)] = own
    packed = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(packed, padded, group=group)
    return [unpack(data[: int(size)]) for data, size in zip(packed, sizes, strict=True)]


def broadcast_value(value: Any, group: dist.ProcessGroup) -> Any:
    """Rank 0's value, on every process. Collective; `group` is one of Gloo with all processes."""
    is_first = dist.get_rank() == 0
    own = pack(value) if is_first else torch.empty(0, dtype=torch.uint8)
    size = torch.tensor([len(own)])
    dist.broadcast(size, src=0, group=group)
    data = own if is_first else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0, group=group)
    return value if is_first else unpack(data)


def send_value(value: Any, rank: int, group: dist.ProcessGroup) -> None:
    """Send a value to a process, which calls `receive_value`."""
    own = pack(value)
    dist.send(torch.tensor([len(own)]), rank, group=group)
    dist.send(own, rank, group=group)


def receive_value(rank: int, group: dist.ProcessGroup) -> Any:
    """The value that a process sends with `send_value`."""
    size = torch.empty(1, dtype=torch.int64)
    dist.recv(size, rank, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, rank, group=group)
    return unpack(data)
