"""DeepSpeed's engine, ZeRO stage 0 to 3 (arXiv 1910.02054)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import count_parameters
from optimizers import build_optimizer
from parallel import engine as contract
from parallel import processes
from parallel.buffers import SharedBuffers
from parallel.checks import refuse_scalars
from parallel.engine import Batch, BatchSizes, build_seeded
from parallel.zero_state import OptimizerParts, gather, optimizer_entries, scatter
from schedule import Schedule
from settings import Settings, SettingsError

# PyTorch warns of an unused CUDA toolkit, and DeepSpeed tells the story of every start; neither is news to the person.
for name in ("torch.utils.cpp_extension", "DeepSpeed"):
    logging.getLogger(name).setLevel(logging.ERROR)

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class Engine(contract.Engine):
    """Data parallel by DeepSpeed: stage 1 shards the optimiser's state, 2 the gradients too, 3 the parameters too."""

    honours_deepspeed = True

    def __init__(self, build: Callable[[], nn.Module], settings: Settings, schedule: Schedule, seed: int):
        """`build` makes the model; it is called with the same random state in every process.

        Raises:
            SettingsError: a combination that would not train as asked.
        """
        super().__init__(settings, schedule, seed)
        self.device = processes.join()
        if self.device.type == "cpu":
            # Only inference_all_reduce uses this op, and compiling it at start-up takes a minute.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.is_main = dist.get_rank() == 0
        config = settings.engine
        self.stage = config["zero_optimization"]["stage"]
        self.bf16 = config["bf16"]["enabled"]
        self.precision = "bf16" if self.bf16 else "fp32"
        self.check_engine(config)
        self.data_shard = self.place()
        self.batch_sizes = BatchSizes.derive(config, self.data_shard[1])
        model = build_seeded(build, seed).to(self.device)
        refuse_scalars(model, "DeepSpeed")
        self.num_parameters = count_parameters(model)
        self.start(model, config)

    def check_engine(self, config: dict[str, Any]) -> None:
        """Raises SettingsError for keys of `ds_config.json` that do not go together."""
        if self.stage not in (0, 1, 2, 3):
            raise SettingsError(f"zero_optimization.stage is 0, 1, 2 or 3, not {self.stage}")
        if self.bf16 and self.stage == 0:
            # DeepSpeed's stage 0 bf16 wrapper makes an empty optimiser step first, which spoils Adam's bias correction.
            raise SettingsError("bf16 needs zero_optimization.stage 1, 2 or 3 (stage 1 costs nothing on one process)")

    def place(self) -> tuple[int, int]:
        """This process's `data_shard`."""
        return dist.get_rank(), dist.get_world_size()

    def start(self, model: nn.Module, config: dict[str, Any]) -> None:
        """Hand the model to DeepSpeed."""
        optimizer = self.make_optimizer(model)
        deepspeed.utils.groups.mpu = None  # a global that a pipeline leaves behind, in a process that makes one engine after another
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=self._deepspeed_config())
        self.shared_buffers = SharedBuffers(self.engine.module, self.replicas())

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
        return {
            **config,
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": self.batch_sizes.micro,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.engine.train()
        self.prepare_step(self.optimizer)
        losses = []
        for _ in range(self.batch_sizes.accumulation):
            images, labels = next(batches)
            loss = self.loss(self.engine(self._cast(images)), labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        self.shared_buffers.average()
        self.step += 1
        return torch.stack(losses).mean()

    def forward(self, images: Tensor) -> Tensor:
        self.engine.eval()
        return self.engine(self._cast(images))

    def _cast(self, images: Tensor) -> Tensor:
        return images.bfloat16() if self.bf16 else images

    def describe(self) -> str:
        return f"stage {self.stage}, {'bf16' if self.bf16 else 'fp32'}"

    def gather_state(self) -> dict[str, Tensor] | None:
        return gather(self.engine, self.optimizer_parts(), keep=self.is_main)

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        device = torch.device(self.engine.device)

        def receive(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            value = state[key].to(device, dtype) if state is not None else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(value, src=0)
            return value

        keys, scalars = self.from_main(None if state is None else optimizer_entries(state))
        scatter(self.engine, self.optimizer_parts(), keys, scalars, receive)

    def optimizer_parts(self) -> OptimizerParts:
        """Where this stage keeps the optimiser and the tensors it updates."""
        return OptimizerParts.of(self.stage, self.optimizer)
