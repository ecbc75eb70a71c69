"""PyTorch's DistributedDataParallel (arXiv 2006.15704): every process holds the model; gradients are averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parallel.buffers import SyncedBuffers
from parallel.torch_engine import TorchEngine


class Engine(TorchEngine):
    """Data parallelism by all-reduce, overlapped with the backward pass."""

    name = "ddp"
    cuda_graph_refusal = None
    masters_refusal = None

    def wrap_model(self, model: nn.Module) -> nn.Module:
        self.shared_buffers = SyncedBuffers(model)
        if self.data_shard[1] == 1:
            return model  # nothing to exchange, and no copies of gradients in buckets
        device = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=device, broadcast_buffers=False, gradient_as_bucket_view=True)

    def accumulating(self, last: bool) -> AbstractContextManager:
        spread = cast(DistributedDataParallel, self.spread_model)
        return nullcontext() if last or self.data_shard[1] == 1 else spread.no_sync()

    def finish_step(self) -> None:
        self.shared_buffers.average()
