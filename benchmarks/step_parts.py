"""Time of single parts of a training step, in the sizes of the recipes.

    python benchmarks/step_parts.py --json parts.json
    python benchmarks/step_parts.py --parts kernel     the kernel of conv_mlp: its errors, and its time against PyTorch

Milliseconds are those of a forward and a backward pass, on a GPU of the device (median). On a CPU the sizes are tiny:
that shows that the program works, not how fast a part is. A part that fails reports the error, and the others continue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.lib.options import keep, origin, output_file, some_of
from common.machine import visible_gpus
from common.text import type_and_first_line
from config.command_line import Parser, run_cli
from config.settings import resolve

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("kernel", "depthwise", "attention", "stem", "optimizer")
GRIDS = ((1024, 768, 8), (512, 768, 16), (512, 1024, 16))  # batch, hidden channels, side: speedrun, 300ep, 100ep
HEADS = ((1024, 4, 64, 64), (512, 3, 256, 64), (512, 4, 256, 64))  # batch, heads, tokens, head size of the same
REPEATS = 20  # timed on a GPU
TINY_GRIDS, TINY_HEADS = ((2, 16, 3),), ((2, 2, 8, 8),)
TINY = ["model.width=32", "model.depth=1", "model.feed_forward_options.hidden=32"]
TINY += ["model.patch_embedding_options.first=8"]
ERROR_BATCH = 32  # images of the comparison with float64


class Bench:
    """Times functions on one device and collects the results."""

    def __init__(self, file: Path | None):
        import torch

        self.file, self.gpu = file, bool(visible_gpus())
        self.device, self.half = torch.device("cuda" if self.gpu else "cpu"), torch.bfloat16
        self.report: dict[str, Any] = {**origin(), "device": self._name(torch), "ms": {}, "errors": {}, "problems": {}}

    def _name(self, torch: Any) -> str:
        return torch.cuda.get_device_name() if self.gpu else "CPU"

    def time(self, name: str, run: Callable[[], Any], num_bytes: float = 0.0) -> None:
        """Time `run` and print its milliseconds, with GB/s for a known number of bytes."""
        try:
            ms = self._median(run)
        except Exception as error:  # of a kernel or of the compiler: whatever it is, the other parts continue
            self.report["problems"][name] = type_and_first_line(error)[:160]
            print(f"{name:72} {self.report['problems'][name]}", flush=True)
        else:
            self.report["ms"][name] = ms
            bandwidth = f"  {num_bytes / ms / 1e6:7.0f} GB/s" if num_bytes else ""
            print(f"{name:72} {ms:9.3f} ms{bandwidth}", flush=True)
        self.write()

    def _median(self, run: Callable[[], Any]) -> float:
        import torch

        for _ in range(4 if self.gpu else 1):
            run()
        if not self.gpu:
            began = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - began)
        times = []
        for _ in range(REPEATS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def compiled(self, function: Callable) -> Callable:
        """Return the compiled function on a GPU, the function itself on a CPU."""
        import torch

        return torch.compile(function, dynamic=False) if self.gpu else function

    def write(self) -> None:
        keep((self.file, json.dumps(self.report, indent=1) + "\n"))


def both_passes(function: Callable, *inputs: Tensor) -> Callable[[], None]:
    """Return a function that runs forward and backward passes of `function`."""
    import torch

    inputs = tuple(tensor.detach().requires_grad_() for tensor in inputs)
    gradient = None

    def run() -> None:
        nonlocal gradient
        result = function(*inputs)
        if gradient is None:  # here, so that `Bench.time` catches a function that fails
            gradient = torch.randn_like(result)
        result.backward(gradient)
        for tensor in inputs:
            tensor.grad = None

    return run


def shifted(image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return a depthwise 3x3 convolution as nine shifted products, channels last: (B, G, G, F)."""
    import torch.nn.functional as F

    G = image.shape[1]
    padded = F.pad(image, (0, 0, 1, 1, 1, 1))
    total = bias.expand_as(image)
    for row in range(3):
        for column in range(3):
            total = total + padded[:, row : row + G, column : column + G] * weight[:, 0, row, column]
    return total


def kernel(bench: Bench) -> None:
    """conv_mlp's inside: errors against float64, then the kernel against PyTorch's forms."""
    import torch

    from models import depthwise_kernel as module

    for B, width, grid in GRIDS if bench.gpu else TINY_GRIDS:
        for dtype in (torch.float32, bench.half):
            kernel_errors(bench, module, min(B, ERROR_BATCH), width, grid, dtype)
    for B, width, grid in GRIDS if bench.gpu else TINY_GRIDS:
        size, moved = f"{B} x {width} x {grid} x {grid}", 10 * B * width * grid**2  # forward 4, backward 6 bytes
        inputs = kernel_inputs(bench, B, width, grid, bench.half)

        def fused(x: Tensor, weight: Tensor, bias: Tensor, grid: int = grid) -> Tensor:
            with torch.autocast(bench.device.type, bench.half):
                return module.conv_gelu(x, weight, bias, grid, 0)

        def plain(x: Tensor, weight: Tensor, bias: Tensor, grid: int = grid) -> Tensor:
            with torch.autocast(bench.device.type, bench.half):
                return module.plain(x, weight, bias, grid, 0)

        bench.time(f"inside of conv_mlp {size}: kernel", both_passes(fused, *inputs), moved)
        bench.time(f"inside of conv_mlp {size}: PyTorch, compiled", both_passes(bench.compiled(plain), *inputs), moved)
        bench.time(f"inside of conv_mlp {size}: PyTorch, eager", both_passes(plain, *inputs), moved)


def kernel_inputs(bench: Bench, B: int, width: int, grid: int, dtype: Any) -> list[Tensor]:
    """Return tokens (B, grid^2, width) of `dtype`, weight and bias in fp32, always the same."""
    import torch

    generator = torch.Generator(bench.device).manual_seed(0)
    shapes = ((B, grid * grid, width), (width, 1, 3, 3), (width,))
    tensors = [torch.randn(shape, generator=generator, device=bench.device) for shape in shapes]
    return [tensors[0].to(dtype), *tensors[1:]]


def kernel_errors(bench: Bench, module: Any, B: int, width: int, grid: int, dtype: Any) -> None:
    """Record the largest differences to float64, as shares of the largest value, of the kernel and of PyTorch."""
    import torch

    inputs = kernel_inputs(bench, B, width, grid, dtype)
    dy = torch.randn_like(inputs[0])

    def results(form: Callable, tensors: list[Tensor]) -> list[Tensor]:
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        y = form(*tensors)
        return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    exact = results(lambda *a: module.plain(*a, grid, 0), [tensor.double() for tensor in inputs])
    forms = {
        "kernel": lambda *a: module.conv_gelu(*a, grid, 0),
        "PyTorch": lambda x, w, b: module.plain(x, w.to(dtype), b.to(dtype), grid, 0),
    }
    for form, function in forms.items():
        name = f"{form}, {B} x {width} x {grid} x {grid}, {str(dtype).removeprefix('torch.')}"
        shares = {
            part: ((found.double() - right).abs().max() / right.abs().max()).item()
            for part, found, right in zip(("y", "dx", "dw", "db"), results(function, inputs), exact, strict=True)
        }
        bench.report["errors"][name] = shares
        print(f"errors of {name}: " + ", ".join(f"{part} {share:.2e}" for part, share in shares.items()), flush=True)
    bench.write()


def depthwise(bench: Bench) -> None:
    """Depthwise 3x3 convolution in bf16: memory formats, cuDNN tuned and not, nine shifts."""
    import torch
    import torch.nn.functional as F

    for B, width, grid in GRIDS if bench.gpu else TINY_GRIDS:
        name, moved = f"depthwise 3x3 {B} x {width} x {grid} x {grid}", 10 * B * width * grid**2
        last = torch.randn(B, grid, grid, width, device=bench.device, dtype=bench.half)
        weight = torch.randn(width, 1, 3, 3, device=bench.device, dtype=bench.half)
        bias = torch.randn(width, device=bench.device, dtype=bench.half)

        def convolve(x: Tensor, w: Tensor, b: Tensor, width: int = width) -> Tensor:
            return F.conv2d(x, w, b, padding=1, groups=width)

        image = last.permute(0, 3, 1, 2)
        for tuned in (False, True) if bench.gpu else (False,):
            torch.backends.cudnn.benchmark = tuned
            end = ", tuned" * tuned
            bench.time(f"{name}: channels last{end}", both_passes(convolve, image, weight, bias), moved)
            bench.time(f"{name}: channels first{end}", both_passes(convolve, image.contiguous(), weight, bias), moved)
        torch.backends.cudnn.benchmark = False
        bench.time(f"{name}: nine shifts, compiled", both_passes(bench.compiled(shifted), last, weight, bias), moved)


def attention(bench: Bench) -> None:
    """Scaled dot-product attention in bf16, by PyTorch's choice and by each of its implementations."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    named = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    for B, H, T, D in HEADS if bench.gpu else TINY_HEADS:
        q, k, v = torch.randn(B, T, 3, H, D, device=bench.device, dtype=bench.half).permute(2, 0, 3, 1, 4)
        name, moved = f"attention {B} x {H} x {T} x {D}", 24 * B * H * T * D
        bench.time(f"{name}: PyTorch's choice", both_passes(F.scaled_dot_product_attention, q, k, v), moved)
        for backend in named if bench.gpu else ():
            with sdpa_kernel(backend):
                bench.time(f"{name}: {backend.name}", both_passes(F.scaled_dot_product_attention, q, k, v), moved)


def network_of(bench: Bench, preset: str) -> tuple[Any, Any]:
    """Return the settings and the network of a preset for CIFAR-100."""
    from benchmarks.recipe_costs import DATASETS
    from model import build_model

    settings, data = resolve(preset, [] if bench.gpu else TINY), DATASETS["cifar100"]
    return settings, build_model(settings.model, data.num_classes, data.image_side).to(bench.device)


def stem(bench: Bench) -> None:
    """The patch embedding of speedrun and 300ep in bf16, eager and compiled."""
    import torch

    for preset in ("speedrun", "300ep"):
        settings, network = network_of(bench, preset)
        count = settings.engine["train_batch_size"] if bench.gpu else 2
        images = torch.randn(count, 3, 32, 32, device=bench.device).contiguous(memory_format=torch.channels_last)

        def embed(x: Tensor, module: Any = network[0]) -> Tensor:
            with torch.autocast(bench.device.type, bench.half):
                return module(x)

        torch.backends.cudnn.benchmark = bench.gpu
        bench.time(f"stem of {preset}, eager", both_passes(embed, images))
        if bench.gpu:
            bench.time(f"stem of {preset}, compiled", both_passes(bench.compiled(embed), images))


def optimizer(bench: Bench) -> None:
    """The optimizer step and gradient clipping of speedrun and 300ep."""
    import torch

    from optim.optimizers import build_optimizer

    for preset in ("speedrun", "300ep"):
        settings, network = network_of(bench, preset)
        built = build_optimizer(settings.engine["optimizer"], network, fused=bench.gpu)
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        clip = torch.nn.utils.clip_grad_norm_
        bench.time(f"optimizer step of {preset}", built.step)
        bench.time(f"clipping of {preset}", lambda network=network, clip=clip: clip(network.parameters(), 1.0))


MEASUREMENTS = {"kernel": kernel, "depthwise": depthwise, "attention": attention, "stem": stem, "optimizer": optimizer}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python benchmarks/step_parts.py",
        "Time single parts of a training step in the sizes of the recipes.",
        example="python benchmarks/step_parts.py --parts kernel,attention --json parts.json",
    )
    parser.add_argument(
        "--parts",
        type=some_of("part", PARTS),
        default=",".join(PARTS),
        metavar="A,B",
        help=f"parts to time: {', '.join(PARTS)} (default: all)",
    )
    parser.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all measurements to this file (default: none)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    return run_cli(lambda: measure(options))


def measure(options: argparse.Namespace) -> int:
    """Time the chosen parts. Returns the exit code: 1 if nothing could be timed."""
    bench = Bench(options.json)
    for name in options.parts:
        try:
            MEASUREMENTS[name](bench)
        except Exception as error:  # such as a module that this version lacks: the other parts continue
            bench.report["problems"][name] = type_and_first_line(error)
            print(f"{name}: {bench.report['problems'][name]}", flush=True)
    bench.write()
    return int(not bench.report["ms"])


if __name__ == "__main__":
    sys.exit(main())
