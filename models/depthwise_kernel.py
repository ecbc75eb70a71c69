"""The inside of a convolution MLP as one operation: GELU, depthwise 3x3 convolution, GELU, shortcut.

    h = gelu(x)        y = h + gelu(conv(h) + bias)        prefix tokens, which are not on the grid: y = h

The operation is memory-bound, so its cost is the number of times that tensors of F channels are read or written. On a
GPU, one Triton kernel for each direction (depthwise_triton.py) needs the fewest bytes per element in bf16:

    forward    4    reads x, writes y; only x is saved for backward
    backward   6    reads x and dy, writes dx

Elsewhere, where Triton does not work and before PyTorch 2.4, which has no custom operators, the same is computed with
PyTorch operations.

DEPTHWISE_KERNEL=off in the environment, or `set_enabled(False)`, selects the PyTorch path everywhere. With
TRITON_INTERPRET=1, set before Triton is imported, the kernels run on a CPU, slowly.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.text import type_and_first_line

HAS_CUSTOM_OPS = hasattr(torch.library, "custom_op")
kernels: Any = None  # without custom operators or without Triton only the PyTorch path exists
if HAS_CUSTOM_OPS:
    with suppress(ImportError):
        from models import depthwise_triton as kernels

LOGGER = logging.getLogger("engine")  # train.py shows this logger on the console
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_enabled = os.environ.get("DEPTHWISE_KERNEL", "on") != "off"


def set_enabled(enabled: bool) -> None:
    """Enable or disable the kernel from the next forward on; a compiled layer keeps a version for each choice."""
    global _enabled
    _enabled = enabled


def is_chosen(x: Tensor) -> bool:
    """Return whether a network calls `conv_gelu` for tokens x: on an NVIDIA GPU with Triton, unless it is disabled."""
    is_nvidia_or_cpu = x.device.type != "cuda" or torch.version.hip is None
    return _enabled and is_nvidia_or_cpu and _has_kernel_for(x)


def plain(x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int) -> Tensor:
    """Compute the same with PyTorch operations; weight and bias have the dtype of x, or autocast is on."""
    x = F.gelu(x)
    prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
    image = patches.transpose(1, 2).unflatten(2, (grid, grid))  # (B, F, S/P, S/P)
    convolved = F.conv2d(image, weight, bias, padding=1, groups=len(weight))
    patches = patches + F.gelu(convolved).flatten(2).transpose(1, 2)
    return torch.cat([prefix, patches], dim=1)


def plain_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int) -> list[Tensor]:
    """Return the gradients of `plain` for x, weight and bias: autograd does not see inside a custom operator."""

    def image_of(tokens: Tensor) -> Tensor:
        return tokens[:, num_prefix:].transpose(1, 2).unflatten(2, (grid, grid))

    h, kernel = image_of(F.gelu(x)), weight.to(x.dtype)
    z = F.conv2d(h, kernel, bias.to(x.dtype), padding=1, groups=len(weight))
    dz = torch.ops.aten.gelu_backward(image_of(dy), z)
    stride, padding, dilation = [1, 1], [1, 1], [1, 1]
    dh, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, h, kernel, [len(bias)], stride, padding, dilation, False, [0, 0], len(bias), [True] * 3
    )
    through = torch.cat([dy[:, :num_prefix], dy[:, num_prefix:] + dh.flatten(2).transpose(1, 2)], dim=1)
    dx = torch.ops.aten.gelu_backward(through, x)
    return [gradient.to(like.dtype).contiguous() for gradient, like in ((dx, x), (dweight, weight), (dbias, bias))]


@cache
def trouble(device: torch.device) -> str | None:
    """Return why the kernels do not run on this device, such as a missing C compiler; None if they run."""
    try:
        x, weight, bias = (torch.ones(shape, device=device) for shape in ((1, 4, 16), (16, 1, 3, 3), (16,)))
        kernels.run_backward(x, weight, bias, kernels.run_forward(x, weight, bias, 2, 0), 2, 0)
    except torch.cuda.OutOfMemoryError:  # by its name in every version
        raise
    except Exception as error:  # any error of Triton or the compilers that it calls
        text = type_and_first_line(error)
        LOGGER.warning("kernel    off: Triton does not work on this machine (%s)", text)
        return text
    return None


def can_run(x: Tensor) -> bool:
    """Return whether `conv_gelu` runs the kernel on x; it computes with PyTorch operations otherwise."""
    return _has_kernel_for(x) and x.numel() > 0 and trouble(x.device) is None


def _has_kernel_for(x: Tensor) -> bool:
    """Return whether there is a kernel for the device and the dtype of x, be it broken on this machine."""
    on_device = x.device.type == "cuda" or INTERPRETED and x.device.type == "cpu"
    return kernels is not None and on_device and x.dtype in DTYPES


def _forward(x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int) -> Tensor:
    """Return h + GELU(conv(h) + bias) for h = GELU(x).

    Args:
        x: tokens (B, num_prefix + grid^2, F).
        weight: (F, 1, 3, 3).
        bias: (F,).
    """
    if can_run(x):
        return kernels.run_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), grid, num_prefix)
    return plain(x, weight.to(x.dtype), bias.to(x.dtype), grid, num_prefix).contiguous()


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int) -> list[Tensor]:
    """Return the gradients of x, weight and bias."""
    if can_run(x):
        return kernels.run_backward(
            x.contiguous(), weight.contiguous(), bias.contiguous(), dy.to(x.dtype).contiguous(), grid, num_prefix
        )
    return plain_backward(x, weight, bias, dy.to(x.dtype), grid, num_prefix)


def _fake_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weight, bias)]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.grid, ctx.num_prefix = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor) -> tuple:
    return (*conv_gelu_backward(*ctx.saved_tensors, dy, ctx.grid, ctx.num_prefix), None, None)


if HAS_CUSTOM_OPS:
    conv_gelu = torch.library.custom_op("vision_transformers::conv_gelu", _forward, mutates_args=())
    conv_gelu.register_fake(_fake_forward)
    conv_gelu.register_autograd(_gradients, setup_context=_save)
    conv_gelu_backward = torch.library.custom_op("vision_transformers::conv_gelu_backward", _backward, mutates_args=())
    conv_gelu_backward.register_fake(_fake_backward)
