"""DeepSpeed's engine, ZeRO stage 0 to 3 (arXiv 1910.02054)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import Settings
from optim.lr_schedule import Schedule
from optim.muon import Muon
from optim.optimizers import NEEDS_FULL_TENSORS, build_optimizer, restore_counters
from parallel import engine as contract
from parallel import process_group
from parallel.batch_sizes import Batch, BatchSizes
from parallel.buffers import BufferSnapshot, SyncedBuffers, normalise_in_fp32
from parallel.engine import build_seeded
from parallel.setting_checks import check_no_scalar_parameters
from parallel.zero_muon import shardings_of
from parallel.zero_state import OptimizerParts, Receive, gather, gather_weights, keys_of, scatter

# PyTorch warns of an unused CUDA toolkit, and DeepSpeed tells the story of every start; neither is news to the person.
for name in ("torch.utils.cpp_extension", "DeepSpeed"):
    logging.getLogger(name).setLevel(logging.ERROR)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It knows a handful of optimisers; ours are tested with it in tests/parallel/test_optimizers_by_strategy.py.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())


def import_muon_uncompiled() -> None:
    """DeepSpeed asks whether an optimiser is its own Muon, which it compiles on import: a second at every start."""
    decorate, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    with suppress(ImportError):  # versions before 0.18 have none
        import_module("deepspeed.runtime.zero.muon.original_muon")
    compiler.compile = decorate


@contextmanager
def skip_norm_check() -> Iterator[None]:
    """Stages 1 and 2 do not ask the GPU whether the norm is finite, once a step and once a group, each time waiting for it.

    They would leave out the update. A norm that is not finite ends the run as it is, as soon as it is looked at (`training/non_finite.py`).
    """
    asks = stage_1_and_2.is_invalid_grad_norm
    stage_1_and_2.is_invalid_grad_norm = lambda norm: False
    try:
        yield
    finally:
        stage_1_and_2.is_invalid_grad_norm = asks


class Engine(contract.Engine):
    """Data parallel by DeepSpeed: stage 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too."""

    name = "zero"
    uses_full_ds_config = True

    def __init__(self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int):
        """`build` makes the model; it is called with the same random state in every process.

        Raises:
            SettingsError: a combination that would not train as asked.
        """
        super().__init__(settings, schedule, seed)
        self.device = process_group.init_process_group()
        if self.device.type == "cpu":
            # Only inference_all_reduce uses this op, and compiling it at start-up takes a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.is_main = dist.get_rank() == 0
        config = settings.engine
        self.stage = config["zero_optimization"]["stage"]
        self.bf16, self.autocast = self.bf16_enabled is True, self.bf16_enabled == "autocast"
        self.precision = "bf16" if self.bf16 else "autocast" if self.autocast else "fp32"
        self.check_engine(config)
        self.data_shard = self.place()
        self.batch_sizes = BatchSizes.derive(config, self.data_shard[1])
        model = build_seeded(build, seed).to(self.device)
        check_no_scalar_parameters(model, "DeepSpeed")
        self.record_shapes(model)
        if self.bf16:
            normalise_in_fp32(model)
        self.start(model, config)
        self.parts = OptimizerParts.from_wrapper(self.stage, self.optimizer)
        if isinstance(self.parts.inner, Muon) and self.stage:
            self.parts.inner.shardings = shardings_of(self.stage, self.optimizer)
        self.finish_setup()

    def check_engine(self, config: dict[str, Any]) -> None:
        """Raises SettingsError for keys of `ds_config.json` that do not go together."""
        if self.stage not in (0, 1, 2, 3):
            raise SettingsError(f"zero_optimization.stage is 0, 1, 2 or 3, not {self.stage}")
        if self.bf16 and self.stage == 0:
            # DeepSpeed's stage 0 bf16 wrapper makes an empty optimiser step first, which spoils Adam's bias correction.
            raise SettingsError("bf16 needs zero_optimization.stage 1, 2 or 3 (stage 1 costs nothing on one process)")
        optimizer, offload = config["optimizer"]["type"], config["zero_optimization"]["offload_optimizer"]["device"]
        if optimizer in NEEDS_FULL_TENSORS and self.stage:
            raise SettingsError(
                f"optimizer.type={optimizer} looks at the norm of each parameter, and zero_optimization.stage={self.stage} hands it "
                "pieces of many; take stage 0, or strategy ddp"
            )
        if offload not in ("none", "cpu"):
            raise SettingsError(f"zero_optimization.offload_optimizer.device is none or cpu, not {offload}")
        if offload != "none" and self.stage == 0:
            raise SettingsError("zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3")
        if offload != "none" and optimizer == "Muon":
            raise SettingsError(
                "optimizer.type=Muon gathers its matrices on the GPUs, so zero_optimization.offload_optimizer cannot keep them off"
            )
        if self.stage == 3:
            # PyTorch 2.11 and DeepSpeed 0.19.8: the gradients of compiled layers are missing, without a word.
            self.compile_refusal = (
                "zero_optimization.stage=3 loses the gradients of compiled layers; stages 0 to 2 and fsdp do not"
            )

    def place(self) -> tuple[int, int]:
        """This process's `data_shard`."""
        return dist.get_rank(), dist.get_world_size()

    def start(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Hand the model to DeepSpeed."""
        import_muon_uncompiled()
        optimizer = self.make_optimizer(model)
        deepspeed.utils.groups.mpu = (
            None  # a global that a pipeline leaves behind, in a process that makes one engine after another
        )
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        if self.bf16 and self.stage < 3:
            # In bf16 it looks for infinities gradient by gradient, some kernels each, and then in the norm of all, which shows the same.
            self.optimizer.check_overflow = lambda partition_gradients: None
        self.shared_buffers = SyncedBuffers(self.engine.module, self.replicas())
        self.keeper: BufferSnapshot | None = None  # only where bad steps are skipped

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.settings.engine
        offload = config["zero_optimization"]["offload_optimizer"]["device"] != "none"
        return build_optimizer(config["optimizer"], model, fused=self.device.type == "cuda" and not offload)

    def replicas(self) -> dist.ProcessGroup | None:
        """The processes that hold the same layers; None is all of them."""
        return None

    def _deepspeed_config(self) -> dict[str, Any]:
        """`ds_config.json` as resolved, with the derived sizes; the optimiser is already made."""
        config = {key: value for key, value in self.settings.engine.items() if key != "optimizer"}
        zero = {**config["zero_optimization"]}
        if zero["offload_optimizer"]["device"] == "none":
            del zero["offload_optimizer"]
        # DeepSpeed takes room for so many numbers at every step, 5e8 by default; a network has no more gradients than parameters.
        zero.setdefault("reduce_bucket_size", min(500_000_000, self.num_parameters))
        return {
            **config,
            "bf16": {**config["bf16"], "enabled": self.bf16},
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": self.batch_sizes.micro,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.engine.train()
        self.compiled.use(training=True)
        self.prepare_step(self.optimizer)
        if self.keeper:
            self.keeper.keep()
        losses = []
        for i in range(self.batch_sizes.accumulation):
            images, labels = next(batches)
            with self._precision():
                scores = self.engine(self.to_model_input(images))
            loss = self.loss(scores, labels)
            self.engine.backward(loss)
            if self.stage == 0 and i == self.batch_sizes.accumulation - 1:
                self.grad_norm = nn.utils.clip_grad_norm_(self.engine.module.parameters(), math.inf).detach()
            with nullcontext() if self.keeper else skip_norm_check():
                self.engine.step()
            losses.append(loss.detach())
        self.note_norm()
        if self.skipped:
            self.keeper.restore()
        self.shared_buffers.average()
        self.step += 1
        if not self.skipped:
            self.end_step()
        return torch.stack(losses).mean()

    def note_norm(self) -> None:
        """Take over what DeepSpeed knows of the step's gradient. Where bad steps are to be skipped, stages 1 to 3 have left out an
        update whose norm is not finite, everywhere; else the infinite norm ends the run before anything is saved.
        """
        if self.stage:
            self.grad_norm = torch.as_tensor(
                self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device
            )
            self.skipped = self.keeper is not None and self.optimizer.overflow

    def skip_bad_steps(self) -> None:
        self.refuse_own_count()
        if self.stage == 0:
            raise SettingsError(
                "--skip-bad-steps needs zero_optimization.stage 1, 2 or 3: at stage 0 DeepSpeed updates without looking"
            )
        self.keeper = BufferSnapshot(self.engine.module)

    def forward(self, images: Tensor) -> Tensor:
        self.engine.eval()
        with self._precision():
            return self.engine(self.to_model_input(images))

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def to_model_input(self, images: Tensor) -> Tensor:
        return super().to_model_input(images.bfloat16() if self.bf16 else images)

    def network(self) -> nn.Module:
        return self.engine.module

    def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.parts.inner, self.parts.updated

    def sync_from_masters(self) -> None:
        self.parts.sync_from_masters()

    def describe(self) -> str:
        words = {"bf16": "bf16 weights and all", "autocast": "bf16", "fp32": "fp32"}
        return f"stage {self.stage}, {words[self.precision]}{self.features()}"

    def gather_state(self) -> dict[str, Tensor] | None:
        return gather(self.network(), self.parts, self.averages(), keep=self.is_main)

    def gather_weights(self) -> dict[str, Tensor] | None:
        return plain_names(gather_weights(self.network(), self.parts, keep=self.is_main))

    def averages(self) -> list[Tensor]:
        return self.ema.values if self.ema is not None else []

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        device = torch.device(self.engine.device)

        def receive(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            value = (
                state[key].to(device, dtype) if state is not None else torch.empty(shape, dtype=dtype, device=device)
            )
            dist.broadcast(value, src=0)
            return value

        self.load_tensors(*self.broadcast_object(None if state is None else keys_of(state)), receive)

    def load_tensors(self, keys: set[str], scalars: dict[str, Tensor], receive: Receive) -> None:
        """Fill this process's part of the state in; `receive` gives the full tensor of a key. Collective."""
        averaged = scatter(self.network(), self.parts, self.averages(), keys, scalars, receive)
        if self.ema is not None and not averaged:
            self.ema.restart()
        restore_counters(self.parts.inner, self.step, self.schedule)


def plain_names(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Without the `weights/` of a checkpoint's keys."""
    return None if state is None else {key.removeprefix("weights/"): tensor for key, tensor in state.items()}
