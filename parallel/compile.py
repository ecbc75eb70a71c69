"""torch.compile for training: which part of the network, in which mode, and whether it works on this machine.

Each layer's forward is compiled on its own: alike blocks then share one compilation, gradients are ready layer by layer
for the exchange between processes, and the names in the state stay as they are, because no module is wrapped. The modes
with CUDA graphs record the whole network instead. Evaluation runs without: it would be compiled a second time for a
small part of the images.
"""

from __future__ import annotations

import logging
import os
from functools import cache

import torch
from torch import nn

from common.errors import SettingsError, unknown

logging.getLogger("torch.utils.cpp_extension").setLevel(
    logging.ERROR
)  # it warns of an unused CUDA toolkit on a machine without a GPU

LOGGER = logging.getLogger("engine")  # train.py shows its lines on the console
ALIGNMENT = 16  # bytes, of the widest load
GRAPHS = ("reduce-overhead", "max-autotune")  # modes of torch.compile that record CUDA graphs
CHOICES = ("auto", "on", "off", *GRAPHS)
CPU_IMAGES = 200_000  # of a run in bf16 on a CPU that gains more than the half minute it takes; fp32 gains nothing
FIRST_STEPS_SECONDS = (
    1800.0  # that they may take on a host that has not compiled this network before, while another one has
)
FIRST_STEPS = {
    "off": 1,
    "on": 2,
    **dict.fromkeys(GRAPHS, 4),
}  # that compile, warm up or record, and do not count as training time


def choose(
    setting: str, device: torch.device, refusal: str | None, graphs_refusal: str | None, pays_on_cpu: bool = False
) -> str:
    """What `compile` comes to: off, on, or one of GRAPHS.

    Args:
        refusal: why the strategy cannot compile at all, graphs_refusal: why it cannot record CUDA graphs; None where it can.
        pays_on_cpu: whether the run is one that gains by it on a CPU; asked for by name, it is compiled all the same.

    Raises:
        SettingsError: asked for by name, and not possible here.
    """
    if setting not in CHOICES:
        raise SettingsError(unknown("compile", setting, list(CHOICES)))
    if setting == "off" or setting == "auto" and (refusal or device.type != "cuda" and not pays_on_cpu):
        return "off"
    if setting in GRAPHS:
        refusal = refusal or graphs_refusal or (None if device.type == "cuda" else "CUDA graphs need a GPU")
    if refusal:
        raise SettingsError(f"compile={setting}: {refusal}")
    trouble = trouble_with(device)
    if trouble and setting != "auto":
        raise SettingsError(
            f"compile={setting}: torch.compile does not work on this machine ({trouble}); compile=off trains without"
        )
    if trouble and os.environ.get("RANK", "0") == "0":
        LOGGER.warning("compile   off, because torch.compile does not work on this machine (%s)", trouble)
    return "off" if trouble else "on" if setting == "auto" else setting


@cache
def trouble_with(device: torch.device) -> str | None:
    """Why a small function cannot be compiled for the device, such as a missing C compiler; None where it can."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler behind the compiler: whatever it is
        return (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        )
    return None


class Compiled:
    """The compiled forwards of a network's layers, put in place for training and taken out for evaluation."""

    def __init__(self, network: nn.Module, layers: list[nn.Module], mode: str, or_plain: bool = False):
        """`or_plain`: a layer that the compiler fails at, or cannot make sense of, runs as it is."""
        self.mode, self.forwards = mode, {}
        if mode == "off":
            return
        import torch._dynamo  # not before it is needed: it takes seconds

        layers = [network] if mode in GRAPHS else layers
        # Each kind of layer, size and precision is a compilation; the limit that PyTorch comes with (8) is for one network in one piece.
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 4 * len(layers))
        # Gradients are ready layer by layer already; PyTorch would cut every layer again at the buckets of DistributedDataParallel.
        torch._dynamo.config.optimize_ddp = mode in GRAPHS
        torch._dynamo.config.suppress_errors = or_plain
        options = {"mode": mode} if mode in GRAPHS else {}
        if any(
            parameter.data_ptr() % ALIGNMENT
            for parameter in network.parameters()
            if parameter.is_cuda and parameter.numel()
        ):
            # ZeRO's parameters are pieces of one buffer, at any offset. PyTorch 2.11 looks at the alignment of the layer that
            # it compiles and lets alike layers share the result, whose wide loads then fail ("misaligned address").
            import torch._inductor.config

            torch._inductor.config.triton.divisible_by_16 = False
        self.forwards = {layer: torch.compile(layer.forward, dynamic=False, **options) for layer in layers}

    def use(self, training: bool) -> None:
        for layer, forward in self.forwards.items():
            if training:
                layer.forward = forward
            else:
                vars(layer).pop("forward", None)
        if training and self.mode in GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
