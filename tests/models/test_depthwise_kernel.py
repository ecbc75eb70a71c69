"""The kernel inside ConvMLP against PyTorch operations in float64.

On a CPU it runs in Triton's interpreter in a separate process, because TRITON_INTERPRET must be set before Triton is
imported. On a GPU it is compiled.

Run: python -m pytest tests/models/test_depthwise_kernel.py, and with -m gpu on a GPU
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from common.paths import PROJECT
from models import depthwise_kernel
from models.feed_forward import ConvMLP
from models.parts import Dimensions

# name: images, grid, channels, prefix tokens, launch configuration (None: the default)
CASES = {
    "one token": (2, 1, 16, 0, None),
    "one row of neighbors": (1, 2, 16, 0, None),
    "odd grid, class token, ragged channels": (2, 3, 70, 1, None),
    "odd grid, two prefix tokens": (1, 7, 48, 2, None),
    "the grid of speedrun": (2, 8, 40, 0, None),
    "a program of two images, one left over": (3, 2, 48, 1, (32, 1, 2, 2)),
    "strips": (1, 7, 40, 1, (32, 1, 3, 1)),
    "strips of one column": (2, 3, 16, 0, (16, 1, 1, 2)),
    "wider than a program takes whole": (1, 17, 16, 0, None),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WIDE = "wider than a program takes whole"  # 13 s in the interpreter
# Cases that compile in a second or two each, and one of each larger kind.
ON_GPU = [(name, kind) for name in CASES for kind in DTYPES if CASES[name][1] <= 3]
ON_GPU += [("the grid of speedrun", "bf16"), ("strips", "bf16"), (WIDE, "fp32")]
INTERPRETED = [
    (name, kind) for name in CASES for kind in DTYPES if name != WIDE and (kind == "fp32" or CASES[name][1] <= 3)
]
# Relative to the largest value: arithmetic is fp32, bf16 rounds only the results; the interpreter truncates.
TOLERANCES = {"fp32": 3e-6, "bf16": 4e-3, "bf16, interpreted": 8e-3}
NAMES = ("y", "dx", "dweight", "dbias")


def case(
    name: str, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], tuple[int, int], tuple[int, ...] | None]:
    images, grid, channels, num_prefix, how = CASES[name]
    torch.manual_seed(0)
    x = 2 * torch.randn(images, num_prefix + grid**2, channels)
    tensors = [x.to(dtype), torch.randn(channels, 1, 3, 3), torch.randn(channels), torch.randn_like(x).to(dtype)]
    return [tensor.to(device) for tensor in tensors], (grid, num_prefix), how


def tolerance(what: str, kind: str) -> float:
    """Return the tolerance: y and dx have the dtype of the case, gradients of the fp32 weights are fp32."""
    return TOLERANCES[kind if what in ("y", "dx") else "fp32"]


def reference(tensors: list[Tensor], place: tuple[int, int]) -> list[Tensor]:
    """Return y, dx, dweight, dbias in float64."""
    *inputs, dy = (tensor.double() for tensor in tensors)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    y = depthwise_kernel.plain(*inputs, *place)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Return the largest difference relative to the largest value."""
    return {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(NAMES, found, expected, strict=True)
    }


def by_kernel(tensors: list[Tensor], place: tuple[int, int], how: tuple[int, ...] | None) -> list[Tensor]:
    (x, weight, bias, dy), kernels = tensors, depthwise_kernel.kernels
    launch = how and kernels.Launch(*how)
    return [
        kernels.run_forward(x, weight, bias, *place, launch),
        *kernels.run_backward(x, weight, bias, dy, *place, launch),
    ]


# --- inside the process of the interpreter ------------------------------------------------------------------------


def network(channels: int = 12) -> ConvMLP:
    torch.manual_seed(1)
    sizes = dict(
        num_classes=10, image_side=6, patch=2, width=8, depth=1, heads=1, head_size=8, num_prefix=1, dropout=0.0
    )
    return ConvMLP(Dimensions(**sizes), hidden=channels)


def gradients_of(part: nn.Module, forward, x: Tensor) -> list[Tensor]:
    part.zero_grad()
    inputs = x.clone().requires_grad_()
    y = forward(inputs)
    y.float().square().sum().backward()
    return [y.detach(), inputs.grad, *(parameter.grad for parameter in part.parameters())]


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    return max((one - two).abs().max().item() for one, two in zip(a, b, strict=True))


def captured(part: nn.Module, x: Tensor) -> bool:
    """Return whether the graph of a compiled layer has the kernel."""
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(part.forward, dynamic=False, backend=backend)(x)
    return any("conv_gelu" in target for target in targets)


def interpreted() -> dict:
    """Return all results of the interpreter, by name."""
    found: dict = {"trouble": depthwise_kernel.trouble(torch.device("cpu")), "errors": {}}
    for name, kind in INTERPRETED:
        tensors, place, how = case(name, DTYPES[kind])
        found["errors"][f"{name}, {kind}"] = errors(by_kernel(tensors, place, how), reference(tensors, place))
    tensors, place, how = case("one row of neighbors", torch.float32)
    again = [by_kernel(tensors, place, how) for _ in range(2)]
    found["same bits"] = all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    part, x = network(), torch.randn(2, 10, 8)
    by_kernel_ = gradients_of(part, part, x)
    compiled = gradients_of(part, torch.compile(part.forward, dynamic=False, fullgraph=True, backend="aot_eager"), x)
    found["captured"] = [captured(part, x) for _ in range(2)]
    depthwise_kernel.set_enabled(False)
    found["captured"].append(captured(part, x))
    depthwise_kernel.set_enabled(True)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = gradients_of(part, part, x)
    depthwise_kernel.set_enabled(False)
    plain = gradients_of(part, part, x)
    with torch.autocast("cpu", torch.bfloat16):
        plain_autocast = gradients_of(part, part, x)
    found |= {
        "module": largest(by_kernel_, plain),
        "compiled": largest(compiled, by_kernel_),
        "autocast": max(
            ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(autocast, plain_autocast, strict=True)
        ),
    }
    return found


@pytest.fixture(scope="module")
def found() -> dict:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(PROJECT),
    }
    environment.pop("DEPTHWISE_KERNEL", None)
    done = subprocess.run(
        [sys.executable, __file__], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


needs_triton = pytest.mark.skipif(depthwise_kernel.kernels is None, reason="no Triton")


@needs_triton
@pytest.mark.parametrize(("name", "kind"), INTERPRETED)
def test_the_interpreted_kernel_equals_pytorch_in_float64(found, name, kind):
    assert found["trouble"] is None
    for what, error in found["errors"][f"{name}, {kind}"].items():
        assert error < tolerance(what, "bf16, interpreted" if kind == "bf16" else kind), (what, error)


@needs_triton
def test_the_module_trains_equally_with_without_and_compiled_with_the_kernel(found):
    assert found["same bits"]
    assert found["captured"] == [True, True, False], "a compiled layer has the kernel unless it is disabled"
    assert found["module"] < 2e-5 and found["compiled"] < 2e-5
    assert found["autocast"] < 0.03  # PyTorch rounds to bf16 between its operations, the kernel does not


# --- without the interpreter: the operator around it ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_custom_operator_passes_opcheck(dtype):
    tensors, place, _ = case("odd grid, class token, ragged channels", dtype)
    x, weight, bias, dy = tensors
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(depthwise_kernel.conv_gelu, (*inputs, *place), atol=1e-3, rtol=1e-3)
    torch.library.opcheck(depthwise_kernel.conv_gelu_backward, (x.detach(), weight.detach(), bias.detach(), dy, *place))


def test_without_triton_the_operator_uses_pytorch_operations():
    tensors, place, _ = case("odd grid, two prefix tokens", torch.float32)
    inputs = [tensor.requires_grad_() for tensor in tensors[:3]]
    y = depthwise_kernel.conv_gelu(*inputs, *place)
    found = [y.detach(), *torch.autograd.grad(y, inputs, tensors[3])]
    for what, error in errors(found, reference(tensors, place)).items():
        assert error < 3e-6, what


def test_before_pytorch_2_4_which_has_no_custom_operators_the_network_uses_pytorch_operations():
    program = """if True:
        import torch
        del torch.library.custom_op
        from config.settings import resolve
        from model import build_model
        from models import depthwise_kernel
        settings = resolve("spt-lsa", ["model.feed_forward=conv_mlp", "model.feed_forward_options.hidden=16"])
        model = build_model(settings.model, 10, 32)
        model(torch.ones(2, 3, 32, 32)).sum().backward()
        print(depthwise_kernel.is_chosen(torch.ones(1)))
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_the_kernel_is_used_on_a_gpu_only_and_can_be_disabled(monkeypatch):
    monkeypatch.setattr(depthwise_kernel, "kernels", object())
    for dtype, device, expected in (
        (torch.bfloat16, "cuda", True),
        (torch.float64, "cuda", False),
        (torch.float32, "cpu", False),
    ):
        x = type("Tokens", (), {"device": torch.device(device), "dtype": dtype})()
        assert depthwise_kernel.is_chosen(x) is expected
    depthwise_kernel.set_enabled(False)
    try:
        assert not depthwise_kernel.is_chosen(
            type("Tokens", (), {"device": torch.device("cuda"), "dtype": torch.bfloat16})()
        )
    finally:
        depthwise_kernel.set_enabled(True)


def test_state_names_are_those_of_a_convolution():
    assert list(network().state_dict()) == [
        f"{part}.{name}" for part in ("expand", "neighbours", "contract") for name in ("weight", "bias")
    ]


# --- on a GPU ---------------------------------------------------------------------------------------------------------


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("name", "kind"), ON_GPU)
def test_the_compiled_kernel_equals_pytorch_in_float64(name, kind):
    assert depthwise_kernel.trouble(torch.device("cuda", torch.cuda.current_device())) is None
    tensors, place, how = case(name, DTYPES[kind], "cuda")
    found = by_kernel(tensors, place, how)
    for what, error in errors(found, reference(tensors, place)).items():
        assert error < tolerance(what, kind), (what, error)
    assert all(torch.equal(a, b) for a, b in zip(found, by_kernel(tensors, place, how), strict=True))


@pytest.mark.gpu
@on_gpu
def test_a_compiled_layer_has_the_kernel_and_trains_equally():
    part, x = network(64).cuda(), torch.randn(4, 10, 8, device="cuda")
    by_kernel_ = gradients_of(part, part, x)
    compiled = gradients_of(part, torch.compile(part.forward, dynamic=False, fullgraph=True), x)
    depthwise_kernel.set_enabled(False)
    try:
        plain = gradients_of(part, part, x)
    finally:
        depthwise_kernel.set_enabled(True)
    assert largest(by_kernel_, plain) < 1e-3 * max(tensor.abs().max().item() for tensor in plain)
    assert largest(compiled, by_kernel_) < 1e-3 * max(tensor.abs().max().item() for tensor in plain)


if __name__ == "__main__":
    print(json.dumps(interpreted()))
