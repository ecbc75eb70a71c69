"""DeepSpeed's pipeline parallelism (arXiv 1806.03377): the layers are divided into stages, with one process per stage.

The processes are stages x replicas. All stages of a replica read the same batches: the first needs the images, the last
the labels. A global batch passes as `gradient_accumulation_steps` micro-batches, one after the other. With fewer than
about four per stage, most processes wait most of the time.

ZeRO stage 0 and 1 only. The state has the keys of the other strategies, so a run can resume under them and with other
stages.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import Settings
from parallel import engine, tensor_transfer, zero
from parallel.batch_sizes import Batch
from parallel.pipeline_stages import cut_layers, even_out
from parallel.zero_state import gather, gather_weights, keys_of


class Stages(PipelineModule):
    """A PipelineModule with given stage boundaries."""

    def __init__(self, layers: nn.Sequential, cuts: list[int], **keywords: Any):
        self.cuts = cuts
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every layer
            super().__init__(layers, num_stages=len(cuts) - 1, **keywords)
        self._layer_specs: list[Any] = []  # it would keep the other stages' layers in memory

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self.cuts
        self._set_bounds(start=self.cuts[self.stage_id], stop=self.cuts[self.stage_id + 1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()  # sending to the next stage needs it


class Engine(zero.Engine):
    """Stages x replicas; the main process is the first stage of the first replica."""

    name = "pipeline"
    used_settings = frozenset({"stages", "partition"})
    fits_one_device = False
    cuts: list[int]
    autocast_refusal = "strategy pipeline has only DeepSpeed's bf16, with bf16 weights"
    gradient_log_refusal = "DeepSpeed makes backward pass and update of a pipeline in one call"
    channels_last_refusal = "activations sent between stages must be contiguous"
    resizing_refusal = "what DeepSpeed sends between stages has one shape in the whole run"

    @classmethod
    def num_shards(cls, settings: Settings, world_size: int) -> int:
        return max(1, world_size // max(1, settings.parallel.stages))  # check_engine rejects what is not divisible

    def check_engine(self, config: dict[str, Any]) -> None:
        super().check_engine(config)
        self.num_stages = self.settings.parallel.stages
        if self.stage > 1:
            raise SettingsError(f"strategy pipeline works with zero_optimization.stage 0 or 1, not {self.stage}")
        if config["zero_optimization"]["offload_optimizer"]["device"] != "none":
            raise SettingsError("strategy pipeline would not use zero_optimization.offload_optimizer; zero does")
        if self.stage == 0 and config["gradient_clipping"]:
            # DeepSpeed 0.19.8 then uses the gradient norm of the first stage for all of them.
            raise SettingsError(
                "strategy pipeline clips wrongly at zero_optimization.stage=0; choose stage 1, or gradient_clipping=0.0"
            )
        if self.num_stages < 1 or dist.get_world_size() % self.num_stages:
            raise SettingsError(
                f"parallel.stages={self.num_stages} does not divide the number of processes, {dist.get_world_size()}"
            )

    def place(self) -> tuple[int, int]:
        replicas = dist.get_world_size() // self.num_stages
        self.stage_id, replica = divmod(dist.get_rank(), replicas)  # DeepSpeed's PipeDataParallelTopology
        return replica, replicas

    def random_stream(self) -> int:
        return dist.get_rank()  # stages must not repeat one another's dropout masks

    def start(self, model: nn.Sequential, config: dict[str, Any]) -> None:  # type: ignore[override]
        cuts = cut_layers(model, self.settings, self.batch_sizes.micro, self.device, self.broadcast_object)
        self.cuts = cuts
        self.shape: torch.Size | None = None
        self.groups_needed = max(len(self._groups(model, stage)) for stage in range(self.num_stages))
        # It uses the existing process group; Stages needs it.
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        super().start(Stages(model, cuts, loss_fn=self.loss), config)
        assert (self.engine.grid.data_parallel_id, self.engine.stage_id) == (self.data_shard[0], self.stage_id)

    def _groups(self, model: nn.Sequential, stage: int) -> list[dict[str, Any]]:
        return super().make_optimizer(model[self.cuts[stage] : self.cuts[stage + 1]]).param_groups

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(model)
        even_out(optimizer, self.groups_needed)
        return optimizer

    def layers(self) -> list[nn.Module]:
        return [layer for layer in self.engine.module.forward_funcs if isinstance(layer, nn.Module)]

    def replicas(self) -> dist.ProcessGroup | None:
        return self.engine.grid.get_data_parallel_group()

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        self.compiled.use(training=True)
        self.prepare_step(self.optimizer)
        # Every stage takes all of them, so that the readers of a replica stay synchronized.
        micro_batches = [next(batches) for _ in range(self.batch_sizes.accumulation)]
        self._expect(micro_batches[0][0])
        loss = self.engine.train_batch(
            iter([(self.to_model_input(images), labels) for images, labels in micro_batches])
        )
        self.note_norm()  # not at stage 0, where a non-finite gradient appears in the next step's loss
        self.shared_buffers.average()
        self.step += 1
        if not self.skipped:
            self.end_step()
        return loss.detach()

    def skip_bad_steps(self) -> None:
        engine.Engine.skip_bad_steps(self)

    def forward(self, images: Tensor) -> Tensor | None:  # type: ignore[override]  # as engine.Engine
        self._expect(images)
        no_labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)
        self.engine.total_loss = None  # otherwise it adds these scores to the last step's loss
        _, scores = self.engine.eval_batch(
            iter([(self.to_model_input(images), no_labels)]),
            return_logits=True,
            compute_loss=False,
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        return scores  # of the last stage; None in the others

    def _expect(self, images: Tensor) -> None:
        """Reset DeepSpeed's buffers, which have the shape of the first batch, for another shape."""
        if self.shape not in (None, images.shape):
            self.engine.reset_activation_shape()
        self.shape = images.shape

    def describe(self) -> str:
        layers = " + ".join(str(stop - start) for start, stop in zip(self.cuts, self.cuts[1:], strict=False))
        return f"{self.num_stages} stages of {layers} layers x {self.data_shard[1]} replicas, ZeRO {super().describe()}"

    # --- the state: each stage has that of its own layers -------------------------------------------------------------

    def gather_state(self) -> dict[str, Tensor] | None:
        return self._joined(gather(self.network(), self.parts, self.averages(), keep=self.data_shard[0] == 0))

    def gather_weights(self) -> dict[str, Tensor] | None:
        return zero.plain_names(self._joined(gather_weights(self.network(), self.parts, keep=self.data_shard[0] == 0)))

    def _joined(self, mine: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return the tensors of all stages of the first replica on the main process; None elsewhere. Collective."""
        states = tensor_transfer.gather_tensors(mine or {})
        return None if states is None else {key: value for state in states for key, value in state.items()}

    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        state = tensor_transfer.broadcast_tensors(state)

        def receive(key: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
            return state[key].to(self.device, dtype)

        self.load_tensors(*keys_of(state), receive)
