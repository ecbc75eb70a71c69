"""Decentralized training: every worker steps on its own gradient, then averages its weights with a few neighbors.

The default order is adapt-then-combine. On the complete graph with SGD, the mean of x_i - lr g_i is x - lr mean(g): SGD
on the global batch. Sparser graphs send less data per step and let the workers differ a little. Adam's moments stay
local to each worker (DAdam, arXiv 1901.09109), or several steps enter them at once (AccumAdam, arXiv 2410.11998).
Clipping uses the worker's own gradient. This is a separate implementation because the package decent-dp cannot resume,
and because DeepSpeed's stages above 0 shard the optimizer over the workers, which must differ here.

`parallel.gossip_order` is the order of a step: "adapt_then_combine" (default) steps, then averages the stepped weights.
"adapt_with_combine" is the order of Decent-DP (8749e97) and D-PSGD (arXiv 1705.09056): the gradient is computed at the
worker's own weights and applied to the averaged ones, so workers always differ by their last step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from common.errors import SettingsError
from optim.accum_adam import AccumAdam
from optim.param_groups import parameter_groups
from parallel import process_group
from parallel.buffers import mean_over
from parallel.multi_worker import MultiWorkerEngine
from parallel.topologies import Round, rounds_of


class Engine(MultiWorkerEngine):
    """A worker that averages its weights with its group of the current round after every step."""

    name = "gossip"
    used_settings = frozenset({"topology", "moment_steps", "gossip_order"})
    checkpoint_kind = "one worker a process, for gossip"

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.topology, self.order = self.settings.parallel.topology, self.settings.parallel.gossip_order
        self.groups = join_groups(rounds_of(self.topology, dist.get_world_size(), num_per_machine()))

    def make_optimizer(self) -> torch.optim.Optimizer:
        window = self.settings.parallel.moment_steps
        if window == 1:
            return super().make_optimizer()
        config = self.settings.engine["optimizer"]
        if config["type"] not in ("Adam", "AdamW"):
            raise SettingsError(
                f"parallel.moment_steps={window} needs Adam's moments, which optimizer.type={config['type']} "
                "does not have; "
                "choose optimizer.type=AdamW or leave it at 1"
            )
        params = config["params"]
        try:
            groups = parameter_groups(self.model, params["lr"], params["weight_decay"])
            return AccumAdam(groups, **params, window=window, decoupled=config["type"] == "AdamW")
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"parallel.moment_steps={window} cannot be combined with these optimizer.params: {error}"
            ) from error

    def before_step(self) -> None:
        if self.order == "adapt_with_combine":
            self.average(self.step)

    def finish_step(self) -> None:
        if self.order == "adapt_then_combine":
            self.average(self.step - 1)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Average the weights with the group of this step's round. Collective."""
        group = self.groups[step % len(self.groups)]
        if dist.get_world_size(group) > 1:
            for parameter, mean in zip(self.trainable, mean_over(self.trainable, group), strict=True):
                parameter.copy_(mean)

    def describe(self) -> str:
        workers = dist.get_world_size()
        return f"{workers} worker{'s' if workers > 1 else ''} on the graph {self.topology}, {super().describe()}"


def num_per_machine() -> int:
    """Return the number of processes of every machine, 0 where it differs; the same on all processes. Collective."""
    counts = set(process_group.all_gather_objects(process_group.num_local()))
    return counts.pop() if len(counts) == 1 else 0


def join_groups(rounds: list[Round]) -> list[dist.ProcessGroup]:
    """Return this process's group in each round. Collective: every process creates every group, in the same order."""
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}
    mine = []
    for groups in rounds:
        for group in map(tuple, groups):
            if group not in made:
                made[group] = dist.new_group(list(group))
            if dist.get_rank() in group:
                mine.append(made[group])
    return mine
