"""DeepSpeed's engine, ZeRO stage 0 to 3 (arXiv 1910.02054)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.errors import SettingsError
from common.packages import is_installed
from common.text import precision_text
from config.settings import Settings
from optim.lr_schedule import Schedule
from optim.muon import Muon
from optim.optimizers import NEEDS_FULL_TENSORS, build_optimizer, restore_counters
from parallel import engine as contract
from parallel import process_group
from parallel.batch_sizes import Batch, BatchSizes
from parallel.buffers import BufferSnapshot, SyncedBuffers, normalize_in_fp32
from parallel.engine import build_seeded
from parallel.gradient_log import GradientLog
from parallel.setting_checks import check_no_scalar_parameters
from parallel.zero_muon import shardings_of
from parallel.zero_state import OptimizerParts, Receive, gather, gather_weights, keys_of, scatter

# PyTorch warns about an unused CUDA toolkit, and DeepSpeed logs every start; neither helps the user.
for name in ("torch.utils.cpp_extension", "DeepSpeed"):
    logging.getLogger(name).setLevel(logging.ERROR)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime import compiler  # noqa: E402
from deepspeed.runtime.zero import stage_1_and_2  # noqa: E402
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It knows a few optimizers; ours are tested with it in tests/parallel/test_optimizers_by_strategy.py.
logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's own Muon without compiling it, which takes a second; DeepSpeed compares types with it."""
    if not is_installed("deepspeed.runtime.zero.muon"):  # versions before 0.18 have none
        return
    decorate, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    import_module("deepspeed.runtime.zero.muon.original_muon")
    compiler.compile = decorate


@contextmanager
def skip_norm_check() -> Iterator[None]:
    """Keep stages 1 and 2 from checking whether the gradient norm is finite, which synchronizes the GPU.

    They would skip such an update. Here a non-finite norm ends the run as soon as it is read (training/non_finite.py).
    """
    if not hasattr(stage_1_and_2, "is_invalid_grad_norm"):  # DeepSpeed 0.16 does not check
        yield
        return
    original = stage_1_and_2.is_invalid_grad_norm
    stage_1_and_2.is_invalid_grad_norm = lambda norm: False
    try:
        yield
    finally:
        stage_1_and_2.is_invalid_grad_norm = original


class Engine(contract.Engine):
    """Data parallelism by DeepSpeed: stage 1 shards the optimizer states, 2 also gradients, 3 also parameters."""

    name = "zero"
    uses_full_ds_config = True

    def __init__(self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int):
        """Build the model by `build`, which is called with the same random state on every process.

        Raises:
            SettingsError: a combination that would not train as asked.
        """
        super().__init__(settings, schedule, seed)
        self.device = process_group.init_process_group()
        if self.device.type == "cpu":
            # Only inference_all_reduce uses this operation, and compiling it at the start takes a minute.
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
            normalize_in_fp32(model)
        if self.autocast:
            # Inside the network: on a GPU, DeepSpeed disables an autocast that is entered around its engine.
            model.forward = torch.autocast(self.device.type, torch.bfloat16)(model.forward)
        self.start(model, config)
        self.parts = OptimizerParts.from_wrapper(self.stage, self.optimizer)
        if isinstance(self.parts.inner, Muon) and self.stage:
            self.parts.inner.shardings = shardings_of(self.stage, self.optimizer)
        self.finish_setup()

    def check_engine(self, config: dict[str, Any]) -> None:
        """Check the keys of `ds_config.json`. Raises SettingsError for those that cannot be combined."""
        if self.bf16 and self.stage == 0:
            # DeepSpeed's stage 0 bf16 wrapper makes an empty optimizer step first, which falsifies Adam's bias
            # correction.
            raise SettingsError("bf16 needs zero_optimization.stage 1, 2 or 3 (stage 1 costs nothing on one process)")
        optimizer, offload = config["optimizer"]["type"], config["zero_optimization"]["offload_optimizer"]["device"]
        if optimizer in NEEDS_FULL_TENSORS and self.stage:
            raise SettingsError(
                f"optimizer.type={optimizer} needs the norm of each full parameter, but "
                f"zero_optimization.stage={self.stage} "
                "shards them; choose stage 0, or --strategy ddp"
            )
        if offload != "none" and self.stage == 0:
            raise SettingsError("zero_optimization.offload_optimizer needs zero_optimization.stage 1, 2 or 3")
        if offload != "none" and optimizer == "Muon":
            raise SettingsError(
                "optimizer.type=Muon gathers its matrices on the GPUs, so zero_optimization.offload_optimizer "
                "cannot be used"
            )
        if self.stage == 3:
            # PyTorch 2.11 and DeepSpeed 0.19.8: the gradients of compiled layers are missing, without an error.
            self.compile_refusal = (
                "zero_optimization.stage=3 loses the gradients of compiled layers; stages 0 to 2 and fsdp do not"
            )

    def place(self) -> tuple[int, int]:
        """Return this process's `data_shard`."""
        return dist.get_rank(), dist.get_world_size()

    def start(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Initialize DeepSpeed with the model."""
        import_muon_uncompiled()
        optimizer = self.make_optimizer(model)
        # A global that a pipeline engine leaves behind, in a process that creates several engines.
        deepspeed.utils.groups.mpu = None
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=self._deepspeed_config()
        )
        if self.bf16 and self.stage < 3:
            # In bf16 it checks every gradient for infinities, with several kernels each, and then the norm, which shows
            # the same.
            self.optimizer.check_overflow = lambda partition_gradients: None
        self.shared_buffers = SyncedBuffers(self.engine.module, self.replicas())
        self.keeper: BufferSnapshot | None = None  # only with --skip-bad-steps

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        config = self.settings.engine
        offload = config["zero_optimization"]["offload_optimizer"]["device"] != "none"
        return build_optimizer(config["optimizer"], model, fused=self.device.type == "cuda" and not offload)

    def replicas(self) -> dist.ProcessGroup | None:
        """Return the processes that hold the same layers; None for all processes."""
        return None

    def _deepspeed_config(self) -> dict[str, Any]:
        """Return the resolved `ds_config.json` with the derived sizes, without the optimizer, which exists already."""
        config = {key: value for key, value in self.settings.engine.items() if key != "optimizer"}
        zero = {**config["zero_optimization"]}
        if zero["offload_optimizer"]["device"] == "none":
            del zero["offload_optimizer"]
        # DeepSpeed allocates so many numbers at every step, 5e8 by default; there are no more gradients than
        # parameters.
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
            scores = self.engine(self.to_training_input(images))
            loss = self.loss(scores, labels)
            self.engine.backward(loss)
            if self.stage == 0 and i == self.batch_sizes.accumulation - 1:
                self.grad_norm = nn.utils.clip_grad_norm_(self.engine.module.parameters(), math.inf).detach()
            if i == self.batch_sizes.accumulation - 1:
                self.measure_gradients()
            with nullcontext() if self.keeper else skip_norm_check():
                self.engine.step()
            losses.append(loss.detach())
        self.measure_update()
        self.note_norm()
        if self.skipped:
            assert self.keeper is not None
            self.keeper.restore()
        self.shared_buffers.average()
        self.step += 1
        if not self.skipped:
            self.end_step()
        return torch.stack(losses).mean()

    def note_norm(self) -> None:
        """Read DeepSpeed's gradient norm of the step.

        With --skip-bad-steps, stages 1 to 3 have skipped an update with a non-finite norm on all processes. Otherwise,
        the non-finite norm ends the run before anything is saved.
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
                "--skip-bad-steps needs zero_optimization.stage 1, 2 or 3: at stage 0 DeepSpeed updates "
                "without checking"
            )
        if self.stage < 3 and not hasattr(stage_1_and_2, "is_invalid_grad_norm"):  # of before 0.17
            raise SettingsError(
                f"--skip-bad-steps does not work with DeepSpeed {deepspeed.__version__}: it updates without checking "
                "the norm; choose --strategy ddp"
            )
        self.keeper = BufferSnapshot(self.engine.module)

    def make_gradient_log(self) -> GradientLog:
        """DeepSpeed gathers each gradient and each fp32 weight from its shards, in measured steps only."""
        return GradientLog(self.network(), gradient=safe_get_full_grad, weight=self._full_weight)

    def _full_weight(self, parameter: Tensor) -> Tensor:
        full = safe_get_full_fp32_param(parameter) if self.stage else parameter
        return full.detach().float().clone()

    def forward(self, images: Tensor) -> Tensor:
        self.engine.eval()
        return self.engine(self.to_model_input(images))

    def to_model_input(self, images: Tensor) -> Tensor:
        return super().to_model_input(images.bfloat16() if self.bf16 else images)

    def network(self) -> nn.Module:
        return self.engine.module

    def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        return self.parts.inner, self.parts.updated

    def sync_from_masters(self) -> None:
        self.parts.sync_from_masters()

    def describe(self) -> str:
        return f"stage {self.stage}, {precision_text(self.precision)}{self.features()}"

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

        keys, scalars = self.broadcast_object(None if state is None else keys_of(state))
        self.load_tensors(keys, scalars, receive)

    def load_tensors(self, keys: set[str], scalars: dict[str, Tensor], receive: Receive) -> None:
        """Load this process's part of the state; `receive` returns the full tensor of a key. Collective."""
        averaged = scatter(self.network(), self.parts, self.averages(), keys, scalars, receive)
        if self.ema is not None and not averaged:
            self.ema.restart()
        restore_counters(self.parts.inner, self.step, self.schedule)


def plain_names(state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Remove the prefix `weights/` of a checkpoint's keys."""
    return None if state is None else {key.removeprefix("weights/"): tensor for key, tensor in state.items()}
