"""The contract between the training loop and the ways of spreading it over processes.

An Engine owns the model, the optimiser and the communication. The loop feeds it batches of its `data_shard` and never
asks how many processes there are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parallel import processes
from parallel.checks import refuse_unused
from schedule import Schedule
from settings import Settings, SettingsError

Batch = tuple[Tensor, Tensor]  # images (B, 3, S, S) float32, labels (B,) int64 with -1 for padding


@dataclass(frozen=True)
class Counts:
    """Exact sums over a split, over all processes."""

    correct: int
    correct_top5: int
    seen: int
    loss_sum: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.seen

    @property
    def top5_accuracy(self) -> float:
        return self.correct_top5 / self.seen

    @property
    def loss(self) -> float:
        return self.loss_sum / self.seen


@dataclass(frozen=True)
class BatchSizes:
    """One global batch and how it is cut: total = micro * accumulation * shards."""

    total: int
    micro: int
    accumulation: int
    shards: int

    @classmethod
    def derive(cls, config: dict[str, Any], shards: int) -> BatchSizes:
        """From `train_batch_size` and `gradient_accumulation_steps`. Raises SettingsError when they do not divide."""
        total, accumulation = config["train_batch_size"], config["gradient_accumulation_steps"]
        if min(total, accumulation) < 1 or total % (accumulation * shards):
            raise SettingsError(f"train_batch_size={total} cannot be cut into {shards} data-parallel processes times "
                                f"gradient_accumulation_steps={accumulation}; choose a multiple of {max(1, accumulation) * shards}")
        return cls(total, total // (accumulation * shards), accumulation, shards)


class Engine(ABC):
    """One strategy at work on one model.

    Attributes:
        data_shard: (which, of how many): the part of each global batch that this process reads.
        is_main: whether this process prints and writes files.
        step: optimiser steps made so far.
        num_parameters: trainable parameters of the whole model.
        honours: the settings of the group `parallel` that this strategy uses; others are refused.
        honours_deepspeed: whether every key of `ds_config.json` reaches DeepSpeed, or only those of `checks.PLAIN_KEYS` count.
        state_kind: states of one kind go on under every strategy of that kind.
        precision: how `forward` computes, for those who evaluate the weights elsewhere: fp32, bf16 (weights and all) or autocast.
    """

    honours: frozenset[str] = frozenset()
    honours_deepspeed = False
    state_kind = "one model"
    precision = "fp32"

    data_shard: tuple[int, int]
    is_main: bool
    device: torch.device
    batch_sizes: BatchSizes
    num_parameters: int

    def __init__(self, settings: Settings, schedule: Schedule, seed: int):
        """Raises SettingsError for a setting that this strategy would not use."""
        self.name = type(self).__module__.rpartition(".")[2]
        refuse_unused(self.name, settings, self.honours, self.honours_deepspeed)
        self.settings, self.schedule, self.seed = settings, schedule, seed
        self.step = 0

    @abstractmethod
    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        """One optimiser step on the next `gradient_accumulation_steps` micro-batches; this process's detached mean loss."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor | None:
        """Class scores (B, K) in evaluation mode, without gradients; None in a process that another one counts for."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the screen: precision, stage, whatever this strategy has."""

    @abstractmethod
    def gather_state(self) -> dict[str, Tensor] | None:
        """Everything a resumed run needs, as full fp32 CPU tensors on the main process (None elsewhere).

        Keys: `weights/<parameter or buffer>`, `optimizer/<state>/<parameter>`; the same for every number of processes.
        Collective: every process must call it.
        """

    @abstractmethod
    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        """The inverse of `gather_state`; `state` on the main process only. Collective."""

    def epoch_facts(self) -> dict[str, float]:
        """What this strategy has to tell of an epoch, for its line in `metrics.jsonl`. Collective."""
        return {}

    def weights(self) -> dict[str, Tensor] | None:
        """The plain fp32 state_dict on the main process, None elsewhere. Collective."""
        state = self.gather_state()
        return None if state is None else {key.removeprefix("weights/"): t for key, t in state.items() if key.startswith("weights/")}

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` and `engine.json` into an existing folder. Collective."""
        state = self.gather_state()
        if state is not None:
            save_file(state, folder / "state.safetensors")
            facts = {"step": self.step, "kind": self.state_kind, "processes": dist.get_world_size()}
            (folder / "engine.json").write_text(json.dumps(facts))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of processes unless the strategy says otherwise. Collective.

        Raises:
            SettingsError: a state that this strategy cannot go on from.
        """
        facts, state = {}, None
        if self.is_main:
            facts = json.loads((folder / "engine.json").read_text())
        facts = self.from_main(facts)
        self.check_state(facts)
        if self.is_main:
            state = load_file(folder / "state.safetensors")
        self.step = facts["step"]
        self.scatter_state(state)

    def check_state(self, facts: dict[str, Any]) -> None:
        """Refuse a state that was not made for this strategy; `facts` is what `engine.json` holds. Raises SettingsError."""
        kind = facts.get("kind", self.state_kind)
        if kind != self.state_kind:
            raise SettingsError(f"the checkpoint holds the state of {kind}, strategy {self.name} has that of {self.state_kind}; "
                                "start from its weights.safetensors instead, with --init-weights")

    @torch.no_grad()
    def count(self, batches: Iterator[Batch]) -> Counts:
        """Correct, top-5 correct, seen images and summed loss over the batches of all processes; padding is left out."""
        counts = torch.zeros(3, dtype=torch.int64, device=self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for images, labels in batches:
            scores = self.forward(images)
            if scores is None:
                continue
            real, scores = labels >= 0, scores.float()
            top5 = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
            counts += torch.stack([top5[:, 0].sum(), top5.any(dim=1).sum(), real.sum()])
            loss_sum += F.cross_entropy(scores, labels, ignore_index=-1, reduction="sum").double()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
            dist.all_reduce(loss_sum)
        return Counts(*counts.tolist(), loss_sum.item())

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on any process. Collective."""
        return self.mean(torch.tensor(float(flag))) > 0

    def mean(self, value: Tensor) -> float:
        """The mean of a CPU scalar over all processes. Collective."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            value = value.double()
            dist.all_reduce(value, group=processes.control_group())  # on the CPU: the GPUs are not made to wait
            return value.item() / dist.get_world_size()
        return value.item()

    def from_main(self, value: Any) -> Any:
        """The main process's value, on every process. Collective."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=processes.control_group())
        return box[0]

    def close(self) -> None:
        """Wait for the others and leave the process group."""
        if dist.is_initialized():
            dist.barrier()  # without it, a process that leaves early can abort the ones that are still leaving
            dist.destroy_process_group()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a micro-batch, in fp32."""
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.loss.label_smoothing)

    def prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and the random state that optimiser step `self.step` must have."""
        factor = self.schedule(self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        # Dropout is a function of (seed, process, step), so a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed((self.seed * 1_000_003 + self.random_stream()) * 1_000_000_007 + self.step)

    def random_stream(self) -> int:
        """Processes with different numbers draw different dropout masks."""
        return self.data_shard[0]


def build_seeded(build: Any, seed: int) -> nn.Module:
    """Call `build()` with the random state that every process shares, so that all start from the same weights."""
    torch.manual_seed(seed)
    return build()
