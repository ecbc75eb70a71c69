"""The same bits again on a GPU: `--deterministic`."""

from __future__ import annotations

import os


def make_deterministic() -> None:
    """Let PyTorch take, on a GPU, the kernels that give the same bits every time. Before anything has used the GPU.

    Raises later, as a RuntimeError of PyTorch's, where a part of the network has no such kernel.
    """
    import torch

    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
