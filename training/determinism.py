"""Bitwise-reproducible training on a GPU: `--deterministic`."""

from __future__ import annotations

import os


def make_deterministic() -> None:
    """Make PyTorch use deterministic GPU kernels. Call it before anything has used the GPU.

    PyTorch raises a RuntimeError later, where a part of the network has no deterministic kernel.
    """
    import torch

    # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
