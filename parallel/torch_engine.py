"""The shared part of the PyTorch engines: the step, mixed precision, clipping, and the state as plain tensors.

A strategy defines how the model is distributed (`wrap_model`), what happens after a step (`finish_step`) and, where
tensors are sharded, how they are gathered and sharded again. bf16 is `torch.autocast`: the weights, their gradients and
the optimizer stay in fp32. With `bf16.enabled=masters` (ddp) a copy of the model has bf16 weights and computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.text import precision_text
from config.settings import Settings
from optim.lr_schedule import Schedule
from optim.optimizers import build_optimizer, restore_counters, scalars_of
from parallel import engine, process_group, tensor_transfer
from parallel.batch_sizes import Batch, BatchSizes
from parallel.bf16_copy import Bf16Copy
from parallel.buffers import BufferSnapshot, persistent_buffers
from parallel.engine import build_seeded
from parallel.gradient_log import GradientLog


class TorchEngine(engine.Engine):
    """One process of a strategy that consists of a PyTorch module and a PyTorch optimizer."""

    def __init__(self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int):
        """Build the model by `build`, which is called with the same random state on every process.

        Raises:
            SettingsError: a combination that would not train as asked.
        """
        super().__init__(settings, schedule, seed)
        self.device = process_group.init_process_group()
        self.data_shard = (dist.get_rank(), dist.get_world_size())
        self.is_main = dist.get_rank() == 0
        has_copy = self.bf16_enabled == "masters"
        self.autocasts = bool(self.bf16_enabled) and not has_copy
        self.precision = "bf16" if has_copy else "autocast" if self.autocasts else "fp32"
        self.clipping = settings.engine["gradient_clipping"]
        self.batch_sizes = BatchSizes.derive(settings.engine, dist.get_world_size())
        self.model = build_seeded(build, seed).to(self.device)
        self.record_shapes(self.model)
        self.bf16_copy = Bf16Copy(self.model) if has_copy else None
        self.computing_model = self.bf16_copy.network if self.bf16_copy else self.model
        self.spread_model = self.wrap_model(self.computing_model)
        # By the names of the plain model; where `wrap_model` shards the parameters, these are the shards.
        self.parameters = dict(self.model.named_parameters())
        self.trainable: list[Tensor] = [parameter for parameter in self.parameters.values() if parameter.requires_grad]
        self.optimizer = self.make_optimizer()
        self.keeper: BufferSnapshot | None = None  # only with --skip-bad-steps
        self.finish_setup()

    # --- what a strategy may override --------------------------------------------------------------------------------

    def wrap_model(self, model: nn.Module) -> nn.Module:
        """Return the module that a training step calls; `model` itself is evaluated."""
        return model

    def make_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.settings.engine["optimizer"], self.model, fused=self.device.type == "cuda")

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Return the context of a micro-batch's forward and backward; only the last one must exchange gradients."""
        return nullcontext()

    def before_step(self) -> None:
        """Called before every optimizer step, when the gradients are complete and `self.step` does not count it yet."""

    def finish_step(self) -> None:
        """Called after every optimizer step, when `self.step` counts it."""

    def unshard(self, tensor: Tensor) -> Tensor:
        """Return the full tensor of a possible shard. Collective."""
        return tensor

    def shard(self, value: Tensor, like: Tensor) -> Tensor:
        """Return this process's part of a full tensor, sharded like `like`, on its device. Collective."""
        return value.to(like.device, like.dtype, copy=True)

    # --- the Engine interface -----------------------------------------------------------------------------------------

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.spread_model.train()
        self.compiled.use(training=True)
        self.prepare_step(self.optimizer)
        if self.keeper:
            self.keeper.keep()
        accumulation = self.batch_sizes.accumulation
        losses = []
        for i in range(accumulation):
            images, labels = next(batches)
            with self.accumulating(last=i == accumulation - 1):
                with self._precision():
                    scores = self.spread_model(self.to_training_input(images))
                loss = self.loss(scores, labels)
                (loss / accumulation).backward()
            losses.append(loss.detach())
        loss = torch.stack(losses).mean()
        if self.bf16_copy:
            self.bf16_copy.hand_over_gradients()
        self.measure_gradients()
        self.grad_norm = self.unshard(nn.utils.clip_grad_norm_(self.trainable, self.clipping or math.inf)).detach()
        # Reading them synchronizes the device: only with --skip-bad-steps.
        self.skipped = self.keeper is not None and self.any(not math.isfinite(loss.item() + self.grad_norm.item()))
        self.before_step()
        if self.skipped:
            assert self.keeper is not None
            self.keeper.restore()
        else:
            self.optimizer.step()
            self.sync_from_masters()
        self.measure_update()
        self.optimizer.zero_grad()
        self.step += 1
        self.finish_step()
        if not self.skipped:
            self.end_step()
        return loss

    def skip_bad_steps(self) -> None:
        self.refuse_own_count()
        self.keeper = BufferSnapshot(self.model)

    def forward(self, images: Tensor) -> Tensor:
        self.computing_model.eval()
        with self._precision():
            return self.computing_model(self.to_model_input(images))

    def to_model_input(self, images: Tensor) -> Tensor:
        return super().to_model_input(images.bfloat16() if self.bf16_copy else images)

    def make_gradient_log(self) -> GradientLog:
        return GradientLog(self.model, whole=self.unshard)

    def network(self) -> nn.Module:
        return self.computing_model

    def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.optimizer, self.trainable

    def sync_from_masters(self) -> None:
        """Without a bf16 copy nothing is to be done: the optimizer updates the network's parameters themselves."""
        if self.bf16_copy:
            self.bf16_copy.take_weights()

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocasts)

    def describe(self) -> str:
        return precision_text(self.precision) + self.features()

    # --- the state ------------------------------------------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor] | None:
        return self.state_tensors(keep=self.is_main)

    def gather_weights(self) -> dict[str, Tensor] | None:
        named = {**self.parameters, **persistent_buffers(self.model)}
        return self._full(named, keep=self.is_main)

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        self.set_state_tensors(tensor_transfer.broadcast_tensors(state))

    def state_tensors(self, keep: bool) -> dict[str, Tensor] | None:
        """Return the state of this process's model as full fp32 CPU tensors; None without `keep`. Collective."""
        named: dict[str, Tensor] = {}
        states = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            named[f"weights/{name}"] = parameter
            named |= {
                f"optimizer/{key}/{name}": value
                for key, value in states[name].items()
                if torch.is_tensor(value) and value.ndim
            }
        scalars = {f"scalars/{key}": value.clone() for key, value in scalars_of(states.values()).items()}
        named |= {f"weights/{name}": buffer for name, buffer in persistent_buffers(self.model).items()}
        named |= {f"ema/{name}": average for name, average in self._averages().items()}
        state = self._full(named, keep)
        return {**state, **scalars} if state is not None else None

    def _averages(self) -> dict[str, Tensor]:
        """Return the EMA tensors by the names of what they average."""
        trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        floating = [name for name, buffer in persistent_buffers(self.model).items() if buffer.is_floating_point()]
        return dict(zip([*trained, *floating], self.ema.values, strict=True)) if self.ema is not None else {}

    def _full(self, named: dict[str, Tensor], keep: bool) -> dict[str, Tensor] | None:
        """Return possible shards as full CPU tensors, gathered one by one; None without `keep`. Collective."""
        state: dict[str, Tensor] = {}
        for key, tensor in named.items():
            full = self.unshard(tensor.detach())
            if keep:
                state[key] = full.to("cpu", copy=True).contiguous()
        return state if keep else None

    @torch.no_grad()
    def set_state_tensors(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; every process has the whole state. Collective."""
        scalars = {key.removeprefix("scalars/"): value for key, value in state.items() if key.startswith("scalars/")}
        kinds = sorted({key.split("/")[1] for key in state if key.startswith("optimizer/")})
        # fused optimizers keep their scalars on the device, the others on the CPU
        place = self.device if any(group.get("fused") for group in self.optimizer.param_groups) else "cpu"
        for name, parameter in self.parameters.items():
            parameter.copy_(self.shard(state[f"weights/{name}"], parameter))
            values = {kind: state[f"optimizer/{kind}/{name}"] for kind in kinds if f"optimizer/{kind}/{name}" in state}
            if values:
                filled = {kind: self.shard(value, parameter) for kind, value in values.items()}
                self.optimizer.state[parameter] = {
                    **filled,
                    **{key: value.to(place, copy=True) for key, value in scalars.items()},
                }
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(state[f"weights/{name}"])
        restore_counters(self.optimizer, self.step, self.schedule)
        averages = self._averages()
        if self.ema is not None and averages and not any(key.startswith("ema/") for key in state):
            self.ema.restart()
        else:
            for name, average in averages.items():
                average.copy_(self.shard(state[f"ema/{name}"], average))
        self.sync_from_masters()
