"""Division of a pipeline into stages of consecutive layers, balanced by parameters, layers or time."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.utils import partition_balanced
from torch import nn

from common.errors import SettingsError
from config.settings import Settings
from models.cost import count_parameters

TIMED_PASSES = 3  # after one warmup pass; the fastest counts


def cut_layers(
    model: nn.Sequential,
    settings: Settings,
    batch_size: int,
    device: torch.device,
    broadcast_object: Callable[[Any], Any],
) -> list[int]:
    """Return the first layer of each stage, and the number of layers at the end; equal on all processes. Collective.

    Raises:
        SettingsError: too many stages, a stage without parameters, or an unknown image side to measure with.
    """
    stages, method = settings.parallel.stages, settings.parallel.partition
    if stages > len(model):
        raise SettingsError(f"parallel.stages={stages} is more than the {len(model)} layers of the network")
    if method == "time" and not settings.image_side:
        raise SettingsError(
            "parallel.partition=time measures the layers before the image side is known; add --set image_side=32"
        )
    weights = [count_parameters(layer) if method == "parameters" else 1 for layer in model]
    if method == "time":
        # One process measures, because each process would find different stages.
        main = torch.distributed.get_rank() == 0
        weights = broadcast_object(layer_microseconds(model, batch_size, settings.image_side, device) if main else None)
    cuts = [int(cut) for cut in partition_balanced(weights, stages)]
    for stage, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        if not any(count_parameters(layer) for layer in list(model)[start:stop]):
            raise SettingsError(
                f"stage {stage} of the pipeline would have no parameters (boundaries {cuts}); "
                "choose fewer parallel.stages or another parallel.partition"
            )
    return cuts


def layer_microseconds(model: nn.Sequential, batch_size: int, side: int, device: torch.device) -> list[int]:
    """Measure each layer's forward and backward on noise, in microseconds. Model and random state do not change."""
    model = copy.deepcopy(model).train()
    shape, best = (batch_size, 3, side, side), [float("inf")] * len(model)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(1 + TIMED_PASSES):
            x = torch.randn(shape, device=device)
            for i, layer in enumerate(model):
                # The gradient of the images is not needed.
                x = x.detach().requires_grad_(i > 0 or not count_parameters(layer))
                began = now()
                y = layer(x)
                y.backward(torch.ones_like(y))
                best[i] = min(best[i], now() - began)
                x = y
    return [max(1, round(1e6 * seconds)) for seconds in best]


def even_out(optimizer: torch.optim.Optimizer, count: int) -> None:
    """Split parameter groups in two until there are `count`.

    DeepSpeed's stage 1 sums the gradient norms over the stages group by group, so all stages must have equally many
    groups; their pairing does not matter.

    Raises:
        SettingsError: a stage has fewer parameters than `count`.
    """
    groups = optimizer.param_groups
    while len(groups) < count:
        largest = max(groups, key=lambda group: len(group["params"]))
        half = len(largest["params"]) // 2
        if not half:
            raise SettingsError(
                f"a stage of the pipeline has only {len(groups)} parameters, but another has {count} parameter groups; "
                "choose fewer parallel.stages or another parallel.partition"
            )
        groups.append({**largest, "params": largest["params"][half:]})
        largest["params"] = largest["params"][:half]
