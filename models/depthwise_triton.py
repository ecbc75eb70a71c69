"""The Triton kernels of depthwise_kernel.py, and their launch.

A program processes a few images, BLOCK channels and a strip of columns (all columns of a grid of up to WHOLE). It
iterates over the rows with three rows of h = gelu(x) in registers: every element is read once and its GELU computed
once. Arithmetic is fp32 for all dtypes.

    forward    reads x, writes y
    backward   reads x and dy, writes dx; conv(h), its gradient dz and the gradient of h stay in registers

Two backward kernels with dz in memory between them would need 14 bytes per element in bf16 instead of 6. The gradients
of weight and bias are accumulated in registers over the images of a program, written once (5 % more bytes on a grid of
8, 1 % on a grid of 16) and summed by PyTorch. There are no atomics, so results are bitwise reproducible. The error
function is formula 7.1.26 of Abramowitz and Stegun, accurate to 1.5e-7. It costs half of Triton's and shares its
exponential with the derivative.

A row is a tuple of vectors of BLOCK channels, one per column, so a shift by one column costs nothing. PAD is 0 for a
grid without strips, whose border is known at compile time, and 1 for a strip.
"""

# Triton's kernels build tuples step by step, and Triton compiles no annotations.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

WHOLE = 16  # columns of the widest grid that a program processes without strips
STRIP = 8  # columns per strip of a wider grid; columns at the border of a strip are computed twice
PIXELS = 512  # approximate pixels per backward program; more make the written weight gradients negligible


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
    row, first, values, pointers, mask, COUNT: tl.constexpr, G: tl.constexpr, CHANNELS: tl.constexpr, PAD: tl.constexpr
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
