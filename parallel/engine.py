"""The contract between the training loop and the ways of spreading it over processes.

An Engine owns the model, the optimiser and the communication. The loop feeds it batches of its `data_shard` and never
asks how many processes there are.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import Settings
from models.classification_metrics import ClassificationCounts
from models.cost import count_parameters
from optim.lr_schedule import Schedule
from optim.muon import Muon
from optim.optimizers import COUNTS_OWN_STEPS, check_optimizer
from parallel import precision, process_group
from parallel.batch_sizes import Batch, BatchSizes, EvalCounts
from parallel.buffers import persistent_buffers
from parallel.collectives import Collectives
from parallel.compile import CPU_IMAGES, FIRST_STEPS, Compiled, choose
from parallel.ema import WeightAveraging
from parallel.setting_checks import check_network_settings, check_unused_settings, describe_mismatch


class Engine(WeightAveraging, Collectives, ABC):
    """One strategy at work on one model.

    Attributes:
        name: what --strategy calls it.
        data_shard: (which, of how many): the part of each global batch that this process reads.
        is_main: whether this process prints and writes files.
        step: optimiser steps made so far; where other jobs take part, `begin` and `train_batch` may carry it on by more than one.
        data_seed: of the order of the images and of their augmentation.
        stopping: whether the person wants to leave; asked where an engine waits for others. The loop sets it.
        num_parameters: trainable parameters of the whole model.
        shapes: of the whole model's parameters and persistent buffers.
        grad_norm: of the last step, before clipping, on the device; None where the strategy does not know it.
        skipped: whether the last step's update was left out (see `skip_bad_steps`).
        used_settings: the settings of the group `parallel` that this strategy uses; others are refused.
        uses_full_ds_config: whether every key of `ds_config.json` reaches DeepSpeed, or only those of `checks.PLAIN_KEYS` count.
        checkpoint_kind: states of one kind go on under every strategy of that kind.
        fits_one_device: whether a process holds the whole network, so that a trial of it on one GPU says what fits.
        precision: how `forward` computes, for those who evaluate the weights elsewhere: fp32, bf16 (weights and all) or autocast.
        average: the moving average of the weights that is evaluated and handed over, None where `ema.decay` is 0.
        bf16_enabled: what the setting of that name comes to here: false, true or autocast.
        first_steps: steps after a start that compile or warm up, and say nothing of the speed.
    """

    name: str
    used_settings: frozenset[str] = frozenset()
    uses_full_ds_config = False
    checkpoint_kind = "one model"
    precision = "fp32"
    fits_one_device = True
    autocast_refusal: str | None = None  # why this strategy cannot compute by torch.autocast
    compile_refusal: str | None = None  # why this strategy cannot use torch.compile
    cuda_graph_refusal: str | None = "this strategy cannot record CUDA graphs; ddp can"
    channels_last_refusal: str | None = None
    ema_refusal: str | None = None  # why ema.decay would not do what it says
    own_average_refusal: str | None = None  # nor an optimiser that averages the weights itself

    data_shard: tuple[int, int]
    is_main: bool
    device: torch.device
    batch_sizes: BatchSizes
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, settings: Settings, schedule: Schedule, seed: int):
        """Raises SettingsError for a setting that this strategy would not use."""
        check_unused_settings(self.name, settings, self.used_settings, self.uses_full_ds_config)
        check_optimizer(settings, self.name, self.own_average_refusal)
        for is_set, refusal in (
            (settings.channels_last, self.channels_last_refusal),
            (settings.ema.decay, self.ema_refusal),
        ):
            if is_set and refusal:
                raise SettingsError(
                    f"strategy {self.name} would not use {'ema.decay' if refusal is self.ema_refusal else 'channels_last'}: {refusal}"
                )
        device, enabled = process_group.pick_device(), settings.engine["bf16"]["enabled"]
        self.bf16_enabled, _ = precision.choose(enabled, self.autocast_refusal, device)
        self.settings, self.schedule, self.seed = settings, schedule, seed
        self.step = 0
        self.grad_norm: Tensor | None = None
        self.skipped = False
        self.data_seed = seed
        self.stopping: Callable[[], bool] = lambda: False

    def begin(self, facts: dict[str, Any]) -> None:  # noqa: B027 (most strategies have nothing to begin with)
        """Called once before the first step, when a saved state has been loaded; `facts` are those of `run.json`. Collective."""

    @classmethod
    def num_shards(cls, settings: Settings, world_size: int) -> int:
        """Parts that a global batch is cut into when `world_size` processes train."""
        return world_size

    def record_shapes(self, model: nn.Module) -> None:
        """Note the size and the shapes of the whole model, before it is spread over processes."""
        self.num_parameters = count_parameters(model)
        tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @abstractmethod
    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        """One optimiser step on the next `gradient_accumulation_steps` micro-batches; this process's detached mean loss."""

    def skip_bad_steps(self) -> None:
        """From now on leave out the update of a step whose loss or gradient is not finite, in all processes alike.

        Raises:
            SettingsError: this strategy cannot.
        """
        raise SettingsError(
            f"--skip-bad-steps: strategy {self.name} updates parts of the network before it knows all of the gradient; "
            "leave the flag out, or take zero, ddp or fsdp"
        )

    def refuse_own_count(self) -> None:
        """Raises SettingsError for an optimiser whose count of its steps a skipped one would put out."""
        name = self.settings.engine["optimizer"]["type"]
        if name in COUNTS_OWN_STEPS:
            raise SettingsError(
                f"--skip-bad-steps: optimizer.type={name} counts its steps itself, and a skipped one would put that out; "
                "leave the flag out, or take another optimiser"
            )

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor | None:
        """Class scores (B, K) in evaluation mode, without gradients; None in a process that another one counts for."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the screen: precision, stage, whatever this strategy has."""

    @abstractmethod
    def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimiser, and the fp32 tensors that it updates in this process: parameters, or what this process holds of them."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network of this process, whose parameters and buffers bear their plain names."""

    def layers(self) -> list[nn.Module]:
        """The network's layers, as many as this process has."""
        network = self.network()
        return list(network) if isinstance(network, nn.Sequential) else [network]

    @abstractmethod
    def sync_from_masters(self) -> None:
        """Let the network's parameters follow `master_weights`, which were changed. Collective."""

    @abstractmethod
    def gather_state(self) -> dict[str, Tensor] | None:
        """Everything a resumed run needs, as full fp32 CPU tensors on the main process (None elsewhere).

        Keys: `weights/<parameter or buffer>`, `optimizer/<state>/<parameter>`, `ema/<parameter or buffer>`, `scalars/<state>`;
        the same for every number of processes. Collective: every process must call it.
        """

    @abstractmethod
    def gather_weights(self) -> dict[str, Tensor] | None:
        """The network's tensors as they are now, as full fp32 CPU tensors on the main process (None elsewhere). Collective."""

    @abstractmethod
    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        """The inverse of `gather_state`; `state` on the main process only. Collective."""

    def epoch_facts(self) -> dict[str, float]:
        """What this strategy has to tell of an epoch, for its line in `metrics.jsonl`. Collective."""
        return {}

    def weights(self, raw: bool = False) -> dict[str, Tensor] | None:
        """The plain fp32 state_dict on the main process, None elsewhere; of the average if there is one. Collective.

        `raw`: of the weights that are trained, whether or not there is an average of them.
        """
        with self.evaluation_weights(raw):
            return self.gather_weights()

    # --- what every strategy does alike -----------------------------------------------------------------------------

    def finish_setup(self) -> None:
        """Called once, when network and optimiser stand: what averages and compiles. Raises SettingsError."""
        network, settings = self.network(), self.settings
        check_network_settings(network, settings)
        self.start_average(settings.ema)
        optimizer, images = self.master_weights()[0], self.schedule.total * self.batch_sizes.total
        if isinstance(optimizer, Muon) and self.precision != "fp32" and precision.fast_bf16(self.device):
            optimizer.working_dtype = torch.bfloat16
        pays_on_cpu = self.precision != "fp32" and images >= CPU_IMAGES
        mode = choose(settings.compile, self.device, self.compile_refusal, self.cuda_graph_refusal, pays_on_cpu)
        or_plain = settings.compile == "auto" and self.device.type == "cpu"
        self.compiled = Compiled(network, self.layers(), mode, or_plain)
        if isinstance(optimizer, Muon):
            optimizer.compiled = mode != "off"
        self.first_steps = FIRST_STEPS[mode] if self.device.type == "cuda" or mode != "off" else 0

    def features(self) -> str:
        """What of compiling, memory format and averaging is on, for `describe`."""
        settings, mode = self.settings, self.compiled.mode
        features = {
            f"compile {mode}": mode != "off",
            "channels last": settings.channels_last,
            f"ema {settings.ema.decay}": settings.ema.decay,
        }
        return "".join(f", {feature}" for feature, is_on in features.items() if is_on)

    def to_model_input(self, images: Tensor) -> Tensor:
        """Images as the network takes them."""
        return images.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else images

    def state_values(self) -> int:
        """At most how many numbers `gather_state` gives: the weights, two moments of Adam, an average of the weights."""
        return 4 * self.num_parameters

    def state_facts(self) -> dict[str, Any]:
        """What `load` has to know of a state; the content of `engine.json`."""
        return {"step": self.step, "kind": self.checkpoint_kind, "processes": dist.get_world_size()}

    def save(self, folder: Path) -> None:
        """Write what `load` reads into an existing folder, with nothing around it; a run has `training/checkpoint_writer.py` for that. Collective."""
        state = self.gather_state()
        if state is not None:
            save_file(state, folder / "state.safetensors")
            (folder / "engine.json").write_text(json.dumps(self.state_facts()))

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint, made by any number of processes unless the strategy says otherwise. Collective.

        Raises:
            SettingsError: a state that this strategy cannot go on from, or one of another network.
        """
        facts, state, problem = {}, None, None
        if self.is_main:
            facts = json.loads((folder / "engine.json").read_text())
        facts = self.broadcast_object(facts)
        self.check_state(facts)
        if self.is_main:
            state = load_file(folder / "state.safetensors")
            problem = describe_mismatch(state, self.shapes)
        if problem := self.broadcast_object(problem):
            raise SettingsError(problem)
        self.step = facts["step"]
        self.scatter_state(state)

    def check_state(self, facts: dict[str, Any]) -> None:
        """Refuse a state that was not made for this strategy; `facts` is what `engine.json` holds. Raises SettingsError."""
        kind = facts.get("kind", self.checkpoint_kind)
        if kind != self.checkpoint_kind:
            raise SettingsError(
                f"the checkpoint holds the state of {kind}, strategy {self.name} has that of {self.checkpoint_kind}; "
                "start from its weights.safetensors instead, with --init-weights"
            )

    def evaluate(self, batches: Iterator[Batch], raw: bool = False) -> EvalCounts:
        """Correct, top-5 correct, seen images and summed loss over the batches of all processes; padding is left out.

        Evaluates the average if there is one, or with `raw` the weights that are trained all the same.
        """
        self.compiled.use(training=False)
        with self.evaluation_weights(raw):
            return self._count(batches)

    @torch.no_grad()
    def _count(self, batches: Iterator[Batch]) -> EvalCounts:
        counts = ClassificationCounts(self.device)
        for images, labels in batches:
            scores = self.forward(images)
            if scores is not None:
                counts.add(scores, labels)
        counts.reduce()
        return EvalCounts(*counts.counts.tolist(), counts.loss_sum.item())

    def close(self, failed: bool = False) -> None:
        """Leave the process group: wait for the others, unless this process `failed` and they may never come."""
        if dist.is_initialized() and not failed:
            process_group.destroy_process_group()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a micro-batch, in fp32."""
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.loss.label_smoothing)

    def prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and the random state that optimiser step `self.step` must have."""
        factor = self.schedule(self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        # Dropout is a function of (seed, process, step), so a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(((self.seed * 1_000_003 + self.random_stream()) * 1_000_000_007 + self.step) % 2**63)

    def random_stream(self) -> int:
        """Processes with different numbers draw different dropout masks."""
        return self.data_shard[0]


def build_seeded(build: Any, seed: int) -> nn.Module:
    """Call `build()` with the random state that every process shares, so that all start from the same weights."""
    torch.manual_seed(seed)
    return build()
