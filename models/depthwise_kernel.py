"""The inside of a convolution MLP as one Triton kernel: GELU, depthwise 3x3 convolution, GELU, shortcut.

    h = gelu(x)        y = h + gelu(conv(h) + bias)        prefix tokens, which are not on the grid: y = h

The operation is memory-bound, so its cost is the number of times that tensors of F channels are read or written. A
program processes a few images, BLOCK channels and a strip of columns (all columns of a grid of up to WHOLE). It
iterates over the rows with three rows of h in registers: every element is read once and its GELU computed once. Bytes
per element in bf16:

    forward    4    reads x, writes y; only x is saved for backward
    backward   6    reads x and dy, writes dx; conv(h), its gradient dz and the gradient of h stay in registers

Two backward kernels with dz in memory between them would need 14. The gradients of weight and bias are accumulated in
registers over the images of a program, written once (5 % more bytes on a grid of 8, 1 % on a grid of 16) and summed by
PyTorch. There are no atomics, so results are bitwise reproducible. Arithmetic is fp32 for all dtypes. The error
function is formula 7.1.26 of Abramowitz and Stegun, accurate to 1.5e-7. It costs half of Triton's and shares its
exponential with the derivative.

DEPTHWISE_KERNEL=off in the environment, or `set_enabled(False)`, selects the PyTorch path everywhere. With
TRITON_INTERPRET=1, set before Triton is imported, the kernels run on a CPU, slowly.
"""

# Triton's kernels build tuples step by step, and Triton compiles no annotations.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # without Triton only the PyTorch path exists
    triton = None

LOGGER = logging.getLogger("engine")  # train.py shows this logger on the console
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WHOLE = 16  # columns of the widest grid that a program processes without strips
STRIP = 8  # columns per strip of a wider grid; columns at the border of a strip are computed twice
PIXELS = 512  # approximate pixels per backward program; more make the written weight gradients negligible
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_enabled = os.environ.get("DEPTHWISE_KERNEL", "on") != "off"


def set_enabled(enabled: bool) -> None:
    """Enable or disable the kernel from the next forward on; a compiled layer keeps a version for each choice."""
    global _enabled
    _enabled = enabled


def usable(x: Tensor) -> bool:
    """Return whether the kernel is used for tokens x: on a GPU with Triton."""
    on_device = x.device.type == "cuda" and torch.version.hip is None or INTERPRETED and x.device.type == "cpu"
    return _enabled and triton is not None and on_device and x.dtype in DTYPES


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


# --- kernels ----------------------------------------------------------------------------------------------------------
# A row is a tuple of vectors of BLOCK channels, one per column, so a shift by one column costs nothing.
# PAD is 0 for a grid without strips, whose border is known at compile time, and 1 for a strip.

if triton is not None:

    @triton.jit
    def _gaussian(x):
        """Return P(N(0, 1) < x) and exp(-x^2 / 2)."""
        density = tl.exp2(x * x * -0.7213475204444817)
        root = tl.rsqrt(tl.fma(tl.abs(x), 0.23164189, 1.0))  # 0.3275911 / sqrt(2); squared below, instead of a division
        t = root * root
        series = tl.fma(
            t, tl.fma(t, tl.fma(t, tl.fma(t, 0.5307027145, -0.7265760135), 0.7107068705), -0.142248368), 0.127414796
        )
        tail = series * t * density
        return tl.where(x >= 0, 1.0 - tail, tail), density

    @triton.jit
    def _gelu(x):
        below, _ = _gaussian(x)
        return x * below

    @triton.jit
    def _slope(x):
        """Return the derivative of GELU."""
        below, density = _gaussian(x)
        return tl.fma(x * 0.3989422804014327, density, below)

    @triton.jit
    def _gelu_and_slope(x):
        below, density = _gaussian(x)
        return x * below, tl.fma(x * 0.3989422804014327, density, below)

    @triton.jit
    def _load(row, column, pointers, mask, G: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr):
        """Load BLOCK channels of a pixel as fp32, 0 outside the image; `pointers` point to row 0, column 0."""
        inside = mask & (row < G)
        if PAD > 0:
            inside = inside & (column >= 0) & (column < G)
        return tl.load(pointers + (row * G + column) * CHANNELS, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _loaded(
        row, first, pointers, mask, COUNT: tl.constexpr, G: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr
    ):
        """Load COUNT columns of a row, from column `first`, as fp32."""
        values = ()
        for j in tl.static_range(COUNT):
            values = values + (_load(row, first + j, pointers, mask, G, CHANNELS, PAD),)
        return values

    @triton.jit
    def _activated(values, COUNT: tl.constexpr):
        """Return h of a row."""
        activated = ()
        for j in tl.static_range(COUNT):
            activated = activated + (_gelu(values[j]),)
        return activated

    @triton.jit
    def _activated_with_slopes(values, COUNT: tl.constexpr, EDGE: tl.constexpr):
        """Return h of a row, and the derivative of GELU except in EDGE columns at each end."""
        activated, slopes = (), ()
        for j in tl.static_range(COUNT):
            if j >= EDGE and j < COUNT - EDGE:
                value, slope = _gelu_and_slope(values[j])
                slopes = slopes + (slope,)
            else:
                value = _gelu(values[j])
            activated = activated + (value,)
        return activated, slopes

    @triton.jit
    def _store(
        row,
        first,
        values,
        pointers,
        mask,
        COUNT: tl.constexpr,
        G: tl.constexpr,
        CHANNELS: tl.constexpr,
        PAD: tl.constexpr,
    ):
        """Store COUNT columns of a row, from column `first`, except those outside the image."""
        for j in tl.static_range(COUNT):
            inside = mask
            if PAD > 0:
                inside = mask & (first + j < G)
            tl.store(pointers + (row * G + first + j) * CHANNELS, values[j].to(pointers.dtype.element_ty), mask=inside)

    @triton.jit
    def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr):
        values = ()
        for _ in tl.static_range(COUNT):
            values = values + (tl.zeros([BLOCK], tl.float32),)
        return values

    @triton.jit
    def _weights(weight, channels, mask):
        values = ()
        for k in tl.static_range(9):
            values = values + (tl.load(weight + channels * 9 + k, mask=mask, other=0.0).to(tl.float32),)
        return values

    @triton.jit
    def _convolved(above, here, below, weights, bias, at: tl.constexpr, COUNT: tl.constexpr):
        """Return conv(h) + bias at column `at` of three rows of COUNT columns."""
        total = bias
        for kx in tl.static_range(3):
            if at + kx - 1 >= 0 and at + kx - 1 < COUNT:
                total = tl.fma(weights[kx], above[at + kx - 1], total)
                total = tl.fma(weights[3 + kx], here[at + kx - 1], total)
                total = tl.fma(weights[6 + kx], below[at + kx - 1], total)
        return total

    @triton.jit
    def _forward_kernel(
        x,
        weight,
        bias,
        y,
        B,
        PREFIX: tl.constexpr,
        G: tl.constexpr,
        CHANNELS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STRIPS: tl.constexpr,
        IMAGES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        PAD: tl.constexpr = 0 if STRIPS == 1 else 1
        BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        WIDTH: tl.constexpr = COLUMNS + 2 * PAD
        program = tl.program_id(0)
        channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        strip = program // BLOCKS % STRIPS
        begin = program // (BLOCKS * STRIPS) * IMAGES
        exists, first = channels < CHANNELS, strip * COLUMNS
        w = _weights(weight, channels, exists)
        b = tl.load(bias + channels, mask=exists, other=0.0).to(tl.float32)
        for i in range(IMAGES):
            image = begin + i
            mask = exists & (image < B)
            start = image.to(tl.int64) * ((PREFIX + G * G) * CHANNELS)
            for p in range(PREFIX):
                at = start + p * CHANNELS + channels
                value = _gelu(tl.load(x + at, mask=mask & (strip == 0), other=0.0).to(tl.float32))
                tl.store(y + at, value.to(y.dtype.element_ty), mask=mask & (strip == 0))
            patches = x + start + PREFIX * CHANNELS + channels
            outputs = y + start + PREFIX * CHANNELS + channels
            above = _zeros(WIDTH, BLOCK)
            here = _activated(_loaded(0, first - PAD, patches, mask, WIDTH, G, CHANNELS, PAD), WIDTH)
            for row in range(G):
                below = _activated(_loaded(row + 1, first - PAD, patches, mask, WIDTH, G, CHANNELS, PAD), WIDTH)
                values = ()
                for j in tl.static_range(COLUMNS):
                    values = values + (here[j + PAD] + _gelu(_convolved(above, here, below, w, b, j + PAD, WIDTH)),)
                _store(row, first, values, outputs, mask, COLUMNS, G, CHANNELS, PAD)
                above = here
                here = below

    @triton.jit
    def _backward_kernel(
        x,
        weight,
        bias,
        dy,
        dx,
        sums,
        B,
        PREFIX: tl.constexpr,
        G: tl.constexpr,
        CHANNELS: tl.constexpr,
        COLUMNS: tl.constexpr,
        STRIPS: tl.constexpr,
        IMAGES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Compute dx, and each program's gradients of weight and bias in sums (programs per block, 10, CHANNELS).

        Row r computes h of row r + 1, then dz of row r, with which row r - 1 of dx is complete.
        """
        PAD: tl.constexpr = 0 if STRIPS == 1 else 1
        BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
        WIDTH: tl.constexpr = COLUMNS + 4 * PAD  # of h; dz has COLUMNS + 2 PAD columns, dx COLUMNS
        MIDDLE: tl.constexpr = COLUMNS + 2 * PAD
        program = tl.program_id(0)
        channels = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        strip = program // BLOCKS % STRIPS
        begin = program // (BLOCKS * STRIPS) * IMAGES
        exists, first = channels < CHANNELS, strip * COLUMNS
        w = _weights(weight, channels, exists)
        b = tl.load(bias + channels, mask=exists, other=0.0).to(tl.float32)
        gradients = _zeros(10, BLOCK)  # nine weights and the bias
        for i in range(IMAGES):
            image = begin + i
            mask = exists & (image < B)
            start = image.to(tl.int64) * ((PREFIX + G * G) * CHANNELS)
            for p in range(PREFIX):
                at = start + p * CHANNELS + channels
                value = _slope(tl.load(x + at, mask=mask & (strip == 0), other=0.0).to(tl.float32))
                value *= tl.load(dy + at, mask=mask & (strip == 0), other=0.0).to(tl.float32)
                tl.store(dx + at, value.to(dx.dtype.element_ty), mask=mask & (strip == 0))
            patches = x + start + PREFIX * CHANNELS + channels
            incoming = dy + start + PREFIX * CHANNELS + channels
            outputs = dx + start + PREFIX * CHANNELS + channels
            above = _zeros(WIDTH, BLOCK)
            slopes_above = _zeros(COLUMNS, BLOCK)
            here, slopes = _activated_with_slopes(
                _loaded(0, first - 2 * PAD, patches, mask, WIDTH, G, CHANNELS, PAD), WIDTH, 2 * PAD
            )
            earlier = _zeros(COLUMNS, BLOCK)  # gradient of h in row r - 1, without the share of dz of row r
            current = _zeros(COLUMNS, BLOCK)  # gradient of h in row r, the share of dz of row r - 1
            for row in range(G):
                given = _loaded(row, first - PAD, incoming, mask, MIDDLE, G, CHANNELS, PAD)
                values = _loaded(row + 1, first - 2 * PAD, patches, mask, WIDTH, G, CHANNELS, PAD)
                below, slopes_below = _activated_with_slopes(values, WIDTH, 2 * PAD)
                dz = ()
                for j in tl.static_range(MIDDLE):
                    dz = dz + (given[j] * _slope(_convolved(above, here, below, w, b, j + PAD, WIDTH)),)
                # gradients of weight and bias: only from the strip's own columns
                totals = ()
                for k in tl.static_range(9):
                    total = gradients[k]
                    for j in tl.static_range(COLUMNS):
                        if j + 2 * PAD + k % 3 - 1 >= 0 and j + 2 * PAD + k % 3 - 1 < WIDTH:
                            if k < 3:
                                total = tl.fma(dz[j + PAD], above[j + 2 * PAD + k % 3 - 1], total)
                            elif k < 6:
                                total = tl.fma(dz[j + PAD], here[j + 2 * PAD + k % 3 - 1], total)
                            else:
                                total = tl.fma(dz[j + PAD], below[j + 2 * PAD + k % 3 - 1], total)
                    totals = totals + (total,)
                total = gradients[9]
                for j in tl.static_range(COLUMNS):
                    total += dz[j + PAD]
                gradients = totals + (total,)
                # gradient of h: dz at column c reaches column c + kx - 1 of the row ky - 1 below
                finished, next_earlier, next_current = (), (), ()
                for j in tl.static_range(COLUMNS):
                    up = earlier[j]
                    same = current[j] + given[j + PAD]
                    down = tl.zeros([BLOCK], tl.float32)
                    for kx in tl.static_range(3):
                        if j + PAD + 1 - kx >= 0 and j + PAD + 1 - kx < MIDDLE:
                            up = tl.fma(w[kx], dz[j + PAD + 1 - kx], up)
                            same = tl.fma(w[3 + kx], dz[j + PAD + 1 - kx], same)
                            down = tl.fma(w[6 + kx], dz[j + PAD + 1 - kx], down)
                    finished = finished + (up * slopes_above[j],)
                    next_earlier = next_earlier + (same,)
                    next_current = next_current + (down,)
                _store(row - 1, first, finished, outputs, mask & (row > 0), COLUMNS, G, CHANNELS, PAD)
                earlier, current = next_earlier, next_current
                above, here = here, below
                slopes_above, slopes = slopes, slopes_below
            last = ()
            for j in tl.static_range(COLUMNS):
                last = last + (earlier[j] * slopes_above[j],)
            _store(G - 1, first, last, outputs, mask, COLUMNS, G, CHANNELS, PAD)
        for k in tl.static_range(10):
            tl.store(sums + (program // BLOCKS * 10 + k) * CHANNELS + channels, gradients[k], mask=exists)


# --- launch -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Work per program: channels, warps of 32 threads, columns of the grid, and images."""

    block: int
    warps: int
    columns: int
    images: int

    def constants(self, grid: int) -> dict[str, int]:
        return dict(COLUMNS=self.columns, STRIPS=-(-grid // self.columns), IMAGES=self.images, BLOCK=self.block)

    def programs(self, batch: int, grid: int, channels: int) -> tuple[int, int]:
        """Return the number of programs for one block of channels, and in total."""
        of_a_block = -(-batch // self.images) * -(-grid // self.columns)
        return of_a_block, of_a_block * -(-channels // self.block)


def launch(batch: int, grid: int, backward: bool) -> Launch:
    """Return the launch configuration: one channel per thread, so that rows fit in registers; two in a wide forward.

    The fastest of the configurations tried on an H200 with 768 channels on grids of 8 and 16 (results/LOG.md).
    """
    columns = grid if grid <= WHOLE else STRIP
    narrow = grid <= 8
    if not backward:
        return Launch(32 if narrow else 64, 1, columns, max(1, min(batch, 128 // grid**2)))
    return Launch(64, 2, columns, max(1, min(batch, (PIXELS // 2 if narrow else PIXELS) // grid**2)))


def run_forward(
    x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int, how: Launch | None = None
) -> Tensor:
    """Run the forward kernel on contiguous tensors and return y."""
    B, _, channels = x.shape
    how = how or launch(B, grid, backward=False)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _forward_kernel[how.programs(B, grid, channels)[1],](
            x,
            weight,
            bias,
            y,
            B,
            PREFIX=num_prefix,
            G=grid,
            CHANNELS=channels,
            **how.constants(grid),
            num_warps=how.warps,
        )
    return y


def run_backward(
    x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int, how: Launch | None = None
) -> list[Tensor]:
    """Run the backward kernel on contiguous tensors and return the gradients of x, weight and bias."""
    B, _, channels = x.shape
    how = how or launch(B, grid, backward=True)
    of_a_block, programs = how.programs(B, grid, channels)
    dx, sums = torch.empty_like(x), torch.empty(of_a_block, 10, channels, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _backward_kernel[programs,](
            x,
            weight,
            bias,
            dy,
            dx,
            sums,
            B,
            PREFIX=num_prefix,
            G=grid,
            CHANNELS=channels,
            **how.constants(grid),
            num_warps=how.warps,
        )
    total = sums.sum(0)
    return [
        dx,
        total[:9].T.reshape(weight.shape).to(weight.dtype).clone(memory_format=torch.contiguous_format),
        total[9].to(bias.dtype, copy=True),
    ]


@cache
def trouble(device: torch.device) -> str | None:
    """Return why the kernels do not run on this device, such as a missing C compiler; None if they run."""
    try:
        x, weight, bias = (torch.ones(shape, device=device) for shape in ((1, 4, 16), (16, 1, 3, 3), (16,)))
        run_backward(x, weight, bias, run_forward(x, weight, bias, 2, 0), 2, 0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any error of Triton or the compilers that it calls
        text = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
        LOGGER.warning("kernel    off: Triton does not work on this machine (%s)", text)
        return text
    return None


def runs_on(x: Tensor) -> bool:
    """Return whether the kernel runs on x; otherwise PyTorch operations do."""
    possible = x.device.type == "cuda" or INTERPRETED and x.device.type == "cpu"
    return triton is not None and possible and x.dtype in DTYPES and x.numel() > 0 and trouble(x.device) is None


@torch.library.custom_op("vision_transformers::conv_gelu", mutates_args=())
def conv_gelu(x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int) -> Tensor:
    """Return h + GELU(conv(h) + bias) for h = GELU(x).

    Args:
        x: tokens (B, num_prefix + grid^2, F).
        weight: (F, 1, 3, 3).
        bias: (F,).
    """
    if runs_on(x):
        return run_forward(x.contiguous(), weight.contiguous(), bias.contiguous(), grid, num_prefix)
    return plain(x, weight.to(x.dtype), bias.to(x.dtype), grid, num_prefix).contiguous()


@conv_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, grid: int, num_prefix: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("vision_transformers::conv_gelu_backward", mutates_args=())
def conv_gelu_backward(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int) -> list[Tensor]:
    """Return the gradients of x, weight and bias."""
    if runs_on(x):
        return run_backward(
            x.contiguous(), weight.contiguous(), bias.contiguous(), dy.to(x.dtype).contiguous(), grid, num_prefix
        )
    return plain_backward(x, weight, bias, dy.to(x.dtype), grid, num_prefix)


@conv_gelu_backward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor, grid: int, num_prefix: int) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weight, bias)]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.grid, ctx.num_prefix = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, dy: Tensor) -> tuple:
    return (*conv_gelu_backward(*ctx.saved_tensors, dy, ctx.grid, ctx.num_prefix), None, None)


conv_gelu.register_autograd(_gradients, setup_context=_save)
