"""PyTorch's fully_shard (FSDP2, arXiv 2304.11277): tensors are sharded and gathered layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from optim.muon import MatrixSharding, Muon
from parallel.buffers import SyncedBuffers
from parallel.setting_checks import check_no_scalar_parameters
from parallel.torch_engine import TorchEngine


class RowSharding(MatrixSharding):
    """A parameter whose rows are sharded over the processes."""

    def __init__(self, parameter: DTensor):
        self.mesh, self.placements = parameter.device_mesh, parameter.placements

    def whole(self, part: DTensor) -> list[Tensor]:  # type: ignore[override]
        return [part.full_tensor()]

    def part(self, whole: Sequence[Tensor]) -> DTensor:
        return DTensor.from_local(whole[0], self.mesh, [Replicate()], run_check=False).redistribute(
            placements=self.placements
        )


class Engine(TorchEngine):
    """Data parallelism with sharded parameters, gradients and optimizer states; one layer is gathered at a time."""

    name = "fsdp"
    cuda_graph_refusal = (
        "fully_shard gives the parameters new memory in every step, which CUDA graphs cannot follow; ddp can"
    )

    def wrap_model(self, model: nn.Module) -> nn.Module:
        check_no_scalar_parameters(model, "fully_shard")
        self.shared_buffers = SyncedBuffers(model)
        mesh = init_device_mesh(self.device.type, (self.data_shard[1],))
        for layer in cast(nn.Sequential, model):
            fully_shard(layer, mesh=mesh)
        return cast(nn.Module, fully_shard(model, mesh=mesh, reshard_after_forward=True))

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        if isinstance(optimizer, Muon):
            optimizer.shardings = {
                p: RowSharding(p) for group in optimizer.param_groups if group["hidden"] for p in group["params"]
            }
        return optimizer

    def accumulating(self, last: bool) -> AbstractContextManager:
        cast(Any, self.spread_model).set_requires_gradient_sync(last)
        return nullcontext()

    def finish_step(self) -> None:
        self.shared_buffers.average()

    def unshard(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def shard(self, value: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return super().shard(value, like)
        return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
