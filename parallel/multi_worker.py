"""The shared part of strategies where each process trains its own model: gossip and local.

Such a run has many models; evaluation and the saved weights use their mean. It replaces the worker's own model for that
time, and the worker's own is restored bit for bit. Every epoch records the distance between the workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import SettingsError
from parallel import tensor_transfer
from parallel.buffers import mean_over, persistent_buffers
from parallel.torch_engine import TorchEngine


class MultiWorkerEngine(TorchEngine):
    """A worker with its own model and optimizer; `finish_step` decides what it exchanges, and when."""

    own_average_refusal = "the workers exchange the trained weights, not the average that evaluation would use"
    cuda_graph_refusal = None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Swap in the mean model of all workers, parameters and floating-point buffers. Collective."""
        tensors = [p.detach() for p in self.parameters.values()]
        tensors += [buffer for buffer in persistent_buffers(self.model).values() if buffer.is_floating_point()]
        own = [tensor.clone() for tensor in tensors]
        for tensor, mean in zip(tensors, mean_over(tensors), strict=True):
            tensor.copy_(mean)
        try:
            yield
        finally:
            for tensor, mine in zip(tensors, own, strict=True):
                tensor.copy_(mine)

    @contextmanager
    def evaluation_weights(self, raw: bool = False) -> Iterator[None]:
        """As for one model: the mean of the workers' averages equals the average of their mean."""
        with super().evaluation_weights(raw), self.averaged():
            yield

    def state_values(self) -> int:
        return super().state_values() * dist.get_world_size()

    def epoch_facts(self) -> dict[str, float]:
        """Return `worker_distance`: the workers' mean L2 distance to the mean model, over all parameters."""
        own = [p.detach() for p in self.trainable]
        apart = [(tensor - mean).double().norm() for tensor, mean in zip(own, mean_over(own), strict=True)]
        return {"worker_distance": self.mean(torch.stack(apart).norm().cpu())}

    # --- every worker's state, under its rank ------------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor] | None:
        own = self.state_tensors(keep=True)
        assert own is not None
        states = tensor_transfer.gather_tensors(own)
        return (
            None
            if states is None
            else {f"{rank}/{key}": t for rank, state in enumerate(states) for key, t in state.items()}
        )

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        states: list[dict[str, Tensor]] | None = None
        if state is not None:
            states = [{} for _ in range(dist.get_world_size())]
            for key, tensor in state.items():
                rank, _, rest = key.partition("/")
                states[int(rank)][rest] = tensor
        self.set_state_tensors(tensor_transfer.scatter_tensors(states))

    def check_state(self, facts: dict[str, Any]) -> None:
        super().check_state(facts)
        if facts["processes"] != dist.get_world_size():
            raise SettingsError(
                f"strategy {self.name} keeps one state per process: this one was saved by {facts['processes']} "
                "processes "
                f"and cannot resume with {dist.get_world_size()}; start it with {facts['processes']}"
            )
