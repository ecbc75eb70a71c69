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


class PlainUnpickler(pickle.Unpickler):
    """Unpickles values, and instances of the project's data classes, but nothing that could run other code."""

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


def pack(value: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def unpack(data: torch.Tensor) -> Any:
    return PlainUnpickler(io.BytesIO(data.numpy().tobytes())).load()
