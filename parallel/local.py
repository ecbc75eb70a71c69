"""Infrequent synchronization for slow links: every worker makes H local steps, then all make one outer step (DiLoCo).

arXiv 2311.08105. The workers here are the processes of one job; in `peers/` they are jobs that join and leave.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from parallel import tensor_transfer
from parallel.buffers import mean_over
from parallel.diloco import OuterStep
from parallel.multi_worker import MultiWorkerEngine


class Engine(MultiWorkerEngine):
    """A worker that synchronizes with the others after every `parallel.local_steps` steps."""

    name = "local"
    used_settings = frozenset({"local_steps", "outer_lr", "outer_momentum"})
    checkpoint_kind = "one worker a process, for local"

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        chosen = self.settings.parallel
        trained = {name: parameter for name, parameter in self.parameters.items() if parameter.requires_grad}
        self.outer = OuterStep(trained, chosen.outer_lr, chosen.outer_momentum)

    @torch.no_grad()
    def finish_step(self) -> None:
        if self.step % self.settings.parallel.local_steps == 0:
            for parameter, value in zip(self.trainable, self.outer.step(mean_over(self.trainable)), strict=True):
                parameter.copy_(value)

    def describe(self) -> str:
        chosen = self.settings.parallel
        return (
            f"{dist.get_world_size()} x {chosen.local_steps} local steps, outer learning rate {chosen.outer_lr} "
            f"and momentum {chosen.outer_momentum}, {super().describe()}"
        )

    # The state of the outer step is the same in all workers and is saved once.

    def gather_state(self) -> dict[str, Tensor] | None:
        state = super().gather_state()
        return None if state is None else {**state, **self.outer.state()}

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        outer = workers = None
        if state is not None:
            outer = {key: value for key, value in state.items() if key.startswith("outer/")}
            workers = {key: value for key, value in state.items() if key not in outer}
        super().scatter_state(workers)
        self.outer.set_state(tensor_transfer.broadcast_tensors(outer))
