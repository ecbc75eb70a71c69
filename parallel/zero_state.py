"""The state of a ZeRO engine as plain full tensors, and back, independent of stage and number of processes.

DeepSpeed's own checkpoints fit one stage and one number of processes, and are pickles. Here each parameter, its fp32
master copy, its optimizer states and its EMA are gathered one by one (`deepspeed.utils.safe_get_*`, which are exact
copies), so a run can resume under any stage and on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from optim.optimizers import scalars_of
from parallel.buffers import persistent_buffers

AVERAGE = "ema"  # name of the EMA among the optimizer states, and prefix of its keys in a checkpoint
Receive = Callable[[str, torch.Size, torch.dtype], Tensor]


@dataclass(frozen=True)
class OptimizerParts:
    """The optimizer inside DeepSpeed's wrapper, the tensors it updates in this process, and the parameters in each."""

    stage: int
    wrapper: Any
    inner: torch.optim.Optimizer
    updated: list[Tensor]
    members: list[list[nn.Parameter]]

    @classmethod
    def from_wrapper(cls, stage: int, optimizer: Any) -> OptimizerParts:
        if stage == 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            return cls(stage, None, optimizer, parameters, [[p] for p in parameters])
        if stage == 3:
            return cls(
                stage,
                optimizer,
                optimizer.optimizer,
                list(optimizer.fp32_partitioned_groups_flat),
                optimizer.fp16_groups,
            )
        return cls(
            stage,
            optimizer,
            optimizer.optimizer,
            list(optimizer.single_partition_of_fp32_groups),
            optimizer.bit16_groups,
        )

    def keys_by_parameter(self) -> dict[nn.Parameter, list[str]]:
        """Return the names of per-element states, such as Adam's `exp_avg`; none before the first step."""
        found: dict[nn.Parameter, list[str]] = {}
        for tensor, members in zip(self.updated, self.members, strict=True):
            keys = sorted(
                key for key, value in self.inner.state.get(tensor, {}).items() if torch.is_tensor(value) and value.ndim
            )
            found |= dict.fromkeys(members, keys)
        return found

    def scalars(self) -> dict[str, Tensor]:
        """Return the states that are one number per tensor, such as Adam's `step`."""
        return scalars_of(self.inner.state.get(tensor, {}) for tensor in self.updated)

    def create(self, keys: dict[nn.Parameter, list[str]], scalars: dict[str, Tensor]) -> None:
        """Create the states that the optimizer would create at its first step, to be filled."""
        # fused optimizers keep their scalars on the device, the others on the CPU
        fused = any(group.get("fused") for group in self.inner.param_groups)
        for tensor, members in zip(self.updated, self.members, strict=True):
            if keys.get(members[0]):
                filled = {key: value.to(tensor.device if fused else "cpu", copy=True) for key, value in scalars.items()}
                self.inner.state[tensor] = {
                    **{key: torch.zeros_like(tensor.data) for key in keys[members[0]]},
                    **filled,
                }

    @contextmanager
    def with_ema_as_state(self, averages: Sequence[Tensor]) -> Iterator[None]:
        """Add the EMA of `updated` (none, or one each) to the optimizer states, where DeepSpeed can gather it."""
        for tensor, average in zip(self.updated, averages, strict=False):
            self.inner.state[tensor][AVERAGE] = average
        self._relink_states()
        try:
            yield
        finally:
            for tensor, _ in zip(self.updated, averages, strict=False):
                del self.inner.state[tensor][AVERAGE]

    def _relink_states(self) -> None:
        """Make the optimizer states visible to `safe_get_*` and `safe_set_*`.

        Stages 1 and 2 link them after the first step of the first parameter group, when the other groups have none yet.
        """
        if self.stage in (1, 2) and any(self.inner.state.get(tensor) for tensor in self.updated):
            self.wrapper._hp_optimizer_states_linked = False
            self.wrapper._lazy_init_hp_params_optimizer_state()

    def state(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self.inner.state[parameter][key] if self.stage == 0 else safe_get_full_optimizer_state(parameter, key)

    def set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.stage == 0:
            self.inner.state[parameter][key].copy_(value)
        elif self.stage == 3:
            safe_set_local_optimizer_state(parameter, _partition(parameter, value), key)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return the full fp32 value of a parameter. Collective."""
        if not parameter.requires_grad and self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        return safe_get_full_fp32_param(parameter) if self.stage and parameter.requires_grad else parameter.detach()

    @torch.no_grad()
    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter and its fp32 master to a value that every process has. Collective."""
        if self.stage == 3:
            if parameter.requires_grad:
                safe_set_local_fp32_param(parameter, _partition(parameter, value))
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if dist.get_rank() == 0:
                    parameter.copy_(value)
            return
        if self.stage and parameter.requires_grad:
            safe_set_full_fp32_param(parameter, value)
        parameter.copy_(value)

    def sync_from_masters(self) -> None:
        """Copy the masters to the network's parameters, as after an optimizer step. Collective."""
        if self.stage in (1, 2):
            self.wrapper.update_lp_params()
        elif self.stage == 3:  # what DeepSpeed's step() does after the optimizer's
            self.wrapper._partition_all_parameters()
            for i in range(len(self.updated)):
                self.wrapper._reassign_or_swap_out_partitioned_parameters(i)
            self.wrapper._post_step(set())


def _partition(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return this process's share of a full tensor at stage 3; the last share is padded with zeros."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # ZeRO's
    padded = value.new_zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() :][:size]


def gather_weights(network: nn.Module, parts: OptimizerParts, keep: bool) -> dict[str, Tensor] | None:
    """Return parameters in fp32 and buffers by `weights/<name>`; None without `keep`. Collective."""
    state: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        _add(state, keep, f"weights/{name}", parts.master(parameter).float())
    for name, buffer in persistent_buffers(network).items():
        _add(state, keep, f"weights/{name}", buffer.float() if buffer.is_floating_point() else buffer)
    return state if keep else None


def gather(
    network: nn.Module, parts: OptimizerParts, averages: Sequence[Tensor], keep: bool
) -> dict[str, Tensor] | None:
    """As `Engine.gather_state`; `averages` are the EMA of the updated tensors, then of the floating-point buffers."""
    state = gather_weights(network, parts, keep) or {}
    with parts.with_ema_as_state(averages):
        keys = parts.keys_by_parameter()
        for name, parameter in network.named_parameters():
            for key in keys.get(parameter, ()):
                _add(state, keep, _path(key, name), parts.state(parameter, key))
    for name, average in _buffer_averages(network, parts, averages).items():
        _add(state, keep, _path(AVERAGE, name), average)
    for key, value in parts.scalars().items():
        _add(state, keep, f"scalars/{key}", value)
    return state if keep else None


def _add(state: dict[str, Tensor], keep: bool, key: str, value: Tensor) -> None:
    if keep:
        state[key] = value.detach().to("cpu", copy=True).contiguous()


def _path(key: str, name: str) -> str:
    return f"{AVERAGE}/{name}" if key == AVERAGE else f"optimizer/{key}/{name}"


def _buffer_averages(network: nn.Module, parts: OptimizerParts, averages: Sequence[Tensor]) -> dict[str, Tensor]:
    floating = [name for name, buffer in persistent_buffers(network).items() if buffer.is_floating_point()]
    return dict(zip(floating, averages[len(parts.updated) :], strict=bool(averages)))


def keys_of(state: dict[str, Tensor]) -> tuple[set[str], dict[str, Tensor]]:
    """Return the keys of a state from `gather`, and its scalars."""
    return set(state), {
        key.removeprefix("scalars/"): value for key, value in state.items() if key.startswith("scalars/")
    }


def scatter(
    network: nn.Module,
    parts: OptimizerParts,
    averages: Sequence[Tensor],
    keys: set[str],
    scalars: dict[str, Tensor],
    receive: Receive,
) -> bool:
    """As `Engine.scatter_state`; `receive` returns the full tensor of a key on the engine's device. Collective.

    Returns:
        Whether the state has an EMA.
    """
    kinds = sorted({key.split("/")[1] for key in keys if key.startswith("optimizer/")})
    parameters = dict(network.named_parameters())
    found = {parameter: [kind for kind in kinds if _path(kind, name) in keys] for name, parameter in parameters.items()}
    parts.create(found, scalars)
    averaged = any(key.startswith(f"{AVERAGE}/") for key in keys)
    with parts.with_ema_as_state(averages):
        for name, parameter in parameters.items():
            # Stage 3 leaves an empty tensor in the parameter's place.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            parts.set_master(parameter, receive(f"weights/{name}", shape, torch.float32))
            for key in found[parameter] + ([AVERAGE] if averaged and averages and parameter.requires_grad else []):
                parts.set_state(parameter, key, receive(_path(key, name), shape, torch.float32))
    for name, buffer in persistent_buffers(network).items():
        buffer.copy_(receive(f"weights/{name}", buffer.shape, buffer.dtype))
    for name, average in _buffer_averages(network, parts, averages).items() if averaged else ():
        average.copy_(receive(_path(AVERAGE, name), average.shape, torch.float32))
    return averaged
