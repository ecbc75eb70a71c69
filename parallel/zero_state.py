"""The whole state of a ZeRO engine as plain full tensors, and back: independent of stage and number of processes.

DeepSpeed's own checkpoints fit one stage and one number of processes, and are pickles. Here each parameter, its fp32
master copy and its optimiser states are gathered one by one (`deepspeed.utils.safe_get_*`, which are exact copies), so a
run goes on under any stage on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param, safe_set_full_optimizer_state
from torch import Tensor, nn

from parallel.buffers import persistent_buffers


@dataclass(frozen=True)
class OptimizerParts:
    """The optimiser proper, inside DeepSpeed's wrapper, and the tensors it updates in this process."""

    stage: int
    wrapper: Any
    inner: torch.optim.Optimizer
    updated: list[Tensor]

    @classmethod
    def of(cls, stage: int, optimizer: Any) -> OptimizerParts:
        if stage == 0:
            return cls(stage, None, optimizer, [p for group in optimizer.param_groups for p in group["params"]])
        flat = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        return cls(stage, optimizer, optimizer.optimizer, list(flat))

    def state_keys(self) -> list[str]:
        """Names of the states that have a value for every element, such as Adam's `exp_avg`; none before the first step."""
        return sorted(key for key, value in self._sample().items() if torch.is_tensor(value) and value.ndim)

    def scalars(self) -> dict[str, Tensor]:
        """States that are one number for a whole tensor, such as Adam's `step`: the same for all."""
        return {key: torch.as_tensor(value) for key, value in self._sample().items() if not torch.is_tensor(value) or not value.ndim}

    def _sample(self) -> dict[str, Any]:
        return self.inner.state.get(self.updated[0], {})

    def create(self, keys: list[str], scalars: dict[str, Tensor]) -> None:
        """Make the states that the optimiser would make at its first step, to be filled in."""
        if not keys and not scalars:
            return
        for tensor in self.updated:
            # fused optimisers keep their scalars on the device, the others on the CPU
            place = tensor.device if any(group.get("fused") for group in self.inner.param_groups) else "cpu"
            filled = {key: value.to(place, copy=True) for key, value in scalars.items()}
            self.inner.state[tensor] = {**{key: torch.zeros_like(tensor.data) for key in keys}, **filled}

    def link(self) -> None:
        """Let `safe_get_*` and `safe_set_*` see the optimiser's states.

        Stages 1 and 2 link them after the first step of the first parameter group, when the other groups have none yet.
        """
        if self.stage in (1, 2) and self._sample():
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self.inner.state[parameter][key] if self.stage == 0 else safe_get_full_optimizer_state(parameter, key)

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self.inner.state[parameter][key].copy_(value)
        elif self.stage == 3:
            _partition(parameter, self.wrapper.get_local_fp32_param(parameter, key), value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 value of a parameter, whole."""
        return parameter.detach() if self.stage == 0 else safe_get_full_fp32_param(parameter)

    @torch.no_grad()
    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage == 3:
            _partition(parameter, self.wrapper.get_local_fp32_param(parameter), value)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.copy_(value)
            return
        if self.stage:
            safe_set_full_fp32_param(parameter, value)
        parameter.copy_(value)


def _partition(parameter: nn.Parameter, mine: Tensor, value: Tensor) -> None:
    """Copy this process's share of `value` into `mine`; the last share is filled up with zeros."""
    padded = value.new_zeros(mine.numel() * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    mine.copy_(padded[mine.numel() * dist.get_rank() :][: mine.numel()])


def gather(engine: Any, parts: OptimizerParts, keep: bool) -> dict[str, Tensor] | None:
    """See `Engine.gather_state`; None unless this process is to keep it."""
    state: dict[str, Tensor] = {}

    def add(key: str, value: Tensor) -> None:
        if keep:
            full = value.detach().to("cpu", copy=True).contiguous()
            state[key] = full.float() if full.is_floating_point() and key.startswith("weights/") else full

    parts.link()
    keys = parts.state_keys()
    for name, parameter in engine.module.named_parameters():
        add(f"weights/{name}", parts.master(parameter))
        for key in keys:
            add(f"optimizer/{key}/{name}", parts.state(parameter, key))
    for name, buffer in persistent_buffers(engine.module).items():
        add(f"weights/{name}", buffer)
    for key, value in parts.scalars().items():
        add(f"scalars/{key}", value)
    return state if keep else None


def optimizer_entries(state: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the optimiser's states, and its scalars, in what `gather` returned."""
    scalars = {key.removeprefix("scalars/"): value for key, value in state.items() if key.startswith("scalars/")}
    return sorted({key.split("/")[1] for key in state if key.startswith("optimizer/")}), scalars


def scatter(engine: Any, parts: OptimizerParts, keys: list[str], scalars: dict[str, Tensor],
            receive: Callable[[str, torch.Size, torch.dtype], Tensor]) -> None:
    """See `Engine.scatter_state`; `receive` gives the full tensor of a key, on the engine's device."""
    parts.create(keys, scalars)
    parts.link()
    for name, parameter in engine.module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves an empty tensor in the parameter's place
        parts.set_master(parameter, receive(f"weights/{name}", shape, torch.float32))
        for key in keys:
            parts.set_state(parameter, key, receive(f"optimizer/{key}/{name}", shape, torch.float32))
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(receive(f"weights/{name}", buffer.shape, buffer.dtype))
