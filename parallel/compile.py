"""torch.compile for training: which part of the network, in which mode, and whether it works on this machine.

Each layer's forward is compiled separately. Equal blocks then share one compilation, gradients become ready layer by
layer for the exchange between processes, and no module is wrapped, so the names in the state_dict do not change. The
modes with CUDA graphs record the whole network instead. Evaluation is compiled only with `compile_evaluation`: that
takes a second compilation for a small part of the work, and compiled layers round differently, so that train.py's count
of correct images could differ from that of evaluate.py.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import nn

from common.errors import SettingsError, unknown
from common.text import type_and_first_line

# It warns about an unused CUDA toolkit on a machine without a GPU.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console
ALIGNMENT = 16  # bytes of the widest load
GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record CUDA graphs
CHOICES = ("auto", "on", "off", "auto-graphs", *GRAPHS)
# A longer bf16 run on a CPU gains more than the 30 s of compiling; fp32 gains nothing.
CPU_IMAGES, CPU_MINUTES = 150_000, 5.0
FIRST_STEPS_SECONDS = 1800.0  # longest wait for a host that compiles this network while another has it in its cache
# Steps that compile, warm up or record, and do not count as training time.
FIRST_STEPS = {"off": 1, "on": 2, **dict.fromkeys(GRAPHS, 4)}


def is_long(images: int, minutes: float | None) -> bool:
    """Whether a bf16 run on a CPU is long enough to compile. `minutes` is the training time that decides its images."""
    return minutes >= CPU_MINUTES if minutes else images >= CPU_IMAGES


def choose(
    setting: str, device: torch.device, refusal: str | None, graphs_refusal: str | None, pays_on_cpu: bool = False
) -> str:
    """Return the mode for the setting `compile`: off, on, or one of GRAPHS.

    `auto-graphs` is reduce-overhead where device and strategy can record CUDA graphs, else auto.

    Args:
        refusal: why the strategy cannot compile at all; None where it can.
        graphs_refusal: why the strategy cannot record CUDA graphs; None where it can.
        pays_on_cpu: whether the run gains from compiling on a CPU; `compile=on` compiles in any case.

    Raises:
        SettingsError: a mode that was asked for and is not possible here.
    """
    if setting not in CHOICES:
        raise SettingsError(unknown("compile", setting, list(CHOICES)))
    if not hasattr(torch, "compiler"):
        graphs_refusal = graphs_refusal or "CUDA graphs need PyTorch 2.1 or newer"
    if setting == "auto-graphs":
        can_record = device.type == "cuda" and not (refusal or graphs_refusal or trouble_with(device))
        setting = "reduce-overhead" if can_record else "auto"
    if setting == "off" or setting == "auto" and (refusal or device.type != "cuda" and not pays_on_cpu):
        return "off"
    if setting in GRAPHS:
        refusal = refusal or graphs_refusal or (None if device.type == "cuda" else "CUDA graphs need a GPU")
    if refusal:
        raise SettingsError(f"compile={setting}: {refusal}")
    trouble = trouble_with(device)
    if trouble and setting != "auto":
        raise SettingsError(
            f"compile={setting}: torch.compile does not work on this machine ({trouble}); --set compile=off "
            "trains without"
        )
    if trouble and os.environ.get("RANK", "0") == "0":
        LOGGER.warning("compile   off, because torch.compile does not work on this machine (%s)", trouble)
    return "off" if trouble else "on" if setting == "auto" else setting


@cache
def trouble_with(device: torch.device) -> str | None:
    """Return why torch.compile fails for the device, such as a missing C compiler; None where it works."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of any of the compilers behind torch.compile
        return type_and_first_line(error)
    return None


class Compiled:
    """The compiled forwards of a network's layers, active in training and, unless asked for, removed for evaluation."""

    def __init__(
        self,
        network: nn.Module,
        layers: list[nn.Module],
        mode: str,
        or_plain: bool = False,
        in_evaluation: bool = False,
    ):
        """Compile, at the first call of each layer.

        Args:
            or_plain: a layer that the compiler fails on runs uncompiled.
            in_evaluation: evaluation runs the compiled layers too.

        Raises:
            SettingsError: `in_evaluation` in another mode than `on`.
        """
        self.mode, self.in_evaluation, self.forwards = mode, in_evaluation, {}
        if in_evaluation and mode != "on":
            raise SettingsError(f"compile_evaluation=true needs compile=on, and compile is {mode} in this run")
        if mode == "off":
            return
        import torch._dynamo  # late: it takes seconds

        layers = [network] if mode in GRAPHS else layers
        # Each kind of layer, size, precision and image side is one compilation; PyTorch's default limit (8) is meant
        # for one network.
        torch._dynamo.config.cache_size_limit = max(
            torch._dynamo.config.cache_size_limit, (16 if in_evaluation else 8) * len(layers)
        )
        # Gradients become ready layer by layer; PyTorch would also split every layer at DistributedDataParallel's
        # buckets.
        torch._dynamo.config.optimize_ddp = mode in GRAPHS
        torch._dynamo.config.suppress_errors = or_plain
        options: dict[str, Any] = {"mode": mode} if mode in GRAPHS else {}
        if any(
            parameter.data_ptr() % ALIGNMENT
            for parameter in network.parameters()
            if parameter.is_cuda and parameter.numel()
        ):
            # ZeRO's parameters are pieces of one buffer, at any offset. PyTorch 2.11 checks the alignment of the layer
            # that
            # it compiles and reuses the result for equal layers, whose wide loads then fail ("misaligned address").
            import torch._inductor.config

            torch._inductor.config.triton.divisible_by_16 = False
        # A layer may have a forward of its own already (parallel/buffers.py normalize_in_fp32); evaluation restores it.
        self.own = {layer: vars(layer)["forward"] for layer in layers if "forward" in vars(layer)}
        self.forwards = {layer: torch.compile(layer.forward, dynamic=False, **options) for layer in layers}

    def use(self, training: bool) -> None:
        for layer, forward in self.forwards.items():
            if training or self.in_evaluation:
                layer.forward = forward
            elif layer in self.own:
                layer.forward = self.own[layer]
            else:
                vars(layer).pop("forward", None)
        if training and self.mode in GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
