"""The interface between the training loop and the parallelism strategies.

An Engine owns the model, the optimizer and the communication. The loop feeds it batches of its `data_shard` and need
not know the number of processes.
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
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import SettingsError
from common.packages import check_torch
from config.settings import Settings
from models.classification_metrics import ClassificationCounts
from models.cost import count_parameters
from optim.lr_schedule import Plan, Schedule
from optim.muon import Muon
from optim.optimizers import COUNTS_OWN_STEPS, check_optimizer
from parallel import precision, process_group
from parallel.batch_sizes import Batch, BatchSizes, EvalCounts
from parallel.buffers import persistent_buffers
from parallel.collectives import Collectives
from parallel.compile import FIRST_STEPS, Compiled, choose, is_long
from parallel.ema import WeightAveraging
from parallel.gradient_log import GradientLog
from parallel.progressive_resizing import ProgressiveResizing
from parallel.setting_checks import check_network_settings, check_unused_settings, describe_mismatch


class Engine(WeightAveraging, Collectives, ABC):
    """One strategy that trains one model.

    Attributes:
        name: the name that --strategy takes.
        data_shard: (index, count): the part of each global batch that this process reads.
        is_main: whether this process prints and writes files.
        step: optimizer steps made so far; with peers, `begin` and `train_batch` may advance it by more than one.
        data_seed: random seed of the order of the images and of their augmentation.
        stopping: whether the user asked to stop; engines that wait for others call it. The loop sets it.
        num_parameters: number of trainable parameters of the whole model.
        shapes: shapes of the whole model's parameters and persistent buffers.
        grad_norm: gradient norm of the last step, before clipping, on the device; None where it is unknown.
        norms: gradient norms and update ratios of the last step, where `log_gradients` was asked to measure it.
        skipped: whether the update of the last step was skipped (see `skip_bad_steps`).
        used_settings: settings of the group `parallel` that this strategy uses; it rejects the others.
        uses_full_ds_config: whether every key of `ds_config.json` reaches DeepSpeed, or only PLAIN_KEYS are used.
        checkpoint_kind: a state can be resumed under every strategy of its kind.
        fits_one_device: whether a process holds the whole network, so that a trial on one GPU shows what fits.
        precision: arithmetic of `forward`: fp32, bf16 (weights too) or autocast.
        ema: the EMA of the weights that evaluation and the saved weights use; None where `ema.decay` is 0.
        cuts: first layers of the pipeline's stages, and the number of layers; None for other strategies.
        bf16_enabled: value of the setting `bf16.enabled` here: false, true, autocast or masters.
        first_steps: first steps after a start that compile or warm up and are not timed.
    """

    name: str
    used_settings: frozenset[str] = frozenset()
    uses_full_ds_config = False
    checkpoint_kind = "one model"
    precision = "fp32"
    cuts: list[int] | None = None
    fits_one_device = True
    autocast_refusal: str | None = None  # why this strategy cannot compute by torch.autocast
    masters_refusal: str | None = "only ddp has it; zero and pipeline have bf16 weights and fp32 masters with true"
    compile_refusal: str | None = None  # why this strategy cannot use torch.compile
    cuda_graph_refusal: str | None = "this strategy cannot record CUDA graphs; ddp can"
    channels_last_refusal: str | None = None
    ema_refusal: str | None = None  # why this strategy cannot use ema.decay
    resizing_refusal: str | None = None  # why this strategy cannot use progressive resizing
    gradient_log_refusal: str | None = None  # why this strategy cannot use --log-gradients
    own_average_refusal: str | None = None  # why this strategy cannot use an optimizer that averages the weights

    data_shard: tuple[int, int]
    is_main: bool
    device: torch.device
    batch_sizes: BatchSizes
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, settings: Settings, schedule: Schedule, seed: int):
        """Check the settings. Raises SettingsError for one that this strategy would not use."""
        self.resizing = ProgressiveResizing(settings.resizing, settings.model.patch)
        self.check_settings(settings)
        if self.resizing.is_on:
            self.refuse("resizing.initial_scale", "1", self.resizing_refusal)
        device, enabled = process_group.pick_device(), settings.engine["bf16"]["enabled"]
        self.bf16_enabled, _ = precision.choose(enabled, self.autocast_refusal, self.masters_refusal, device)
        self.settings, self.schedule, self.seed = settings, schedule, seed
        self.step = 0
        self.grad_norm: Tensor | None = None
        self.gradient_log: GradientLog | None = None
        self.is_measured_step = False
        self.norms: dict[str, Tensor] | None = None
        self.skipped = False
        self.data_seed = seed
        self.stopping: Callable[[], bool] = lambda: False

    @classmethod
    def check_settings(cls, settings: Settings) -> None:
        """Raise SettingsError for a setting that this strategy would not use, before there is a network."""
        check_unused_settings(cls.name, settings, cls.used_settings, cls.uses_full_ds_config)
        check_optimizer(settings, cls.name, cls.own_average_refusal)
        if settings.channels_last:
            cls.refuse("channels_last", "false", cls.channels_last_refusal)
        if settings.ema.decay:
            cls.refuse("ema.decay", "0", cls.ema_refusal)

    @classmethod
    def refuse(cls, setting: str, off: str, reason: str | None) -> None:
        """Raise SettingsError for a setting, unless there is no `reason`; `off` is its value that turns it off."""
        if reason:
            raise SettingsError(f"strategy {cls.name} would not use {setting}: {reason}. Add --set {setting}={off}")

    def begin(self, facts: dict[str, Any]) -> None:  # noqa: B027 (most strategies need no preparation)
        """Prepare the first step, after a saved state was loaded; `facts` is the content of run.json. Collective."""

    def is_exchange_pending(self) -> bool:
        """Return whether the last step still lacks its exchange with other peers: the run was stopped before it."""
        return False

    @classmethod
    def num_shards(cls, settings: Settings, world_size: int) -> int:
        """Return the number of parts of a global batch when `world_size` processes train."""
        return world_size

    def record_shapes(self, model: nn.Module) -> None:
        """Record size and shapes of the whole model, before it is distributed."""
        self.num_parameters = count_parameters(model)
        tensors = {**dict(model.named_parameters()), **persistent_buffers(model)}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    @abstractmethod
    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        """Make one optimizer step on the next `gradient_accumulation_steps` micro-batches.

        Returns:
            This process's detached mean loss, a scalar on the device.
        """

    def skip_bad_steps(self) -> None:
        """Skip the update of every step whose loss or gradient is not finite, on all processes.

        Raises:
            SettingsError: this strategy cannot.
        """
        raise SettingsError(
            f"--skip-bad-steps: strategy {self.name} updates parts of the network before the whole gradient is known; "
            "leave the flag out, or choose --strategy zero, ddp or fsdp"
        )

    def log_gradients(self) -> None:
        """Prepare to measure gradients and updates in the steps where `is_measured_step` is set.

        Raises:
            SettingsError: this strategy cannot.
        """
        if self.gradient_log_refusal:
            raise SettingsError(f"--log-gradients: {self.gradient_log_refusal}; choose --strategy zero, ddp or fsdp")
        check_torch("--log-gradients", (2, 6))  # torch.nn.utils.get_total_norm
        self.gradient_log = self.make_gradient_log()

    def make_gradient_log(self) -> GradientLog:
        return GradientLog(self.network())

    def measure_gradients(self) -> None:
        """Measure before the update of a step, where the step is to be measured."""
        self.norms = None
        if self.gradient_log and self.is_measured_step:
            self.gradient_log.before_update()

    def measure_update(self) -> None:
        """Measure after the update of a step, where the step is to be measured."""
        if self.gradient_log and self.is_measured_step:
            self.norms = self.gradient_log.after_update()

    def refuse_own_count(self) -> None:
        """Raise SettingsError for an optimizer that counts its steps, which a skipped step would falsify."""
        name = self.settings.engine["optimizer"]["type"]
        if name in COUNTS_OWN_STEPS:
            raise SettingsError(
                f"--skip-bad-steps: optimizer.type={name} counts its steps itself, and a skipped step would "
                "falsify the count; "
                "leave the flag out, or choose another optimizer"
            )

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor | None:
        """Return class scores (B, K) in evaluation mode, without gradients; None where another process counts."""

    @abstractmethod
    def describe(self) -> str:
        """Return a short description for the screen: precision, ZeRO stage and the like."""

    @abstractmethod
    def master_weights(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """Return the optimizer, and the fp32 tensors that it updates in this process: parameters or their shards."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Return the network of this process, whose parameters and buffers have their plain names."""

    def layers(self) -> list[nn.Module]:
        """Return the layers of the network that this process has."""
        network = self.network()
        return list(network) if isinstance(network, nn.Sequential) else [network]

    @abstractmethod
    def sync_from_masters(self) -> None:
        """Copy the changed `master_weights` to the network's parameters. Collective."""

    @abstractmethod
    def gather_state(self) -> dict[str, Tensor] | None:
        """Return everything that a resumed run needs, as full fp32 CPU tensors on the main process (None elsewhere).

        Keys: `weights/<parameter or buffer>`, `optimizer/<state>/<parameter>`, `ema/<parameter or buffer>` and
        `scalars/<state>`; they do not depend on the number of processes. Collective: every process must call it.
        """

    @abstractmethod
    def gather_weights(self) -> dict[str, Tensor] | None:
        """Return the network's present tensors as full fp32 CPU tensors on the main process (None elsewhere).

        Collective.
        """

    @abstractmethod
    def scatter_state(self, state: dict[str, Tensor] | None) -> None:
        """Inverse of `gather_state`; `state` on the main process only. Collective."""

    def epoch_facts(self) -> dict[str, float]:
        """Return entries of this strategy for an epoch's line of `metrics.jsonl`. Collective."""
        return {}

    def weights(self, raw: bool = False) -> dict[str, Tensor] | None:
        """Return the plain fp32 state_dict on the main process, None elsewhere; of the EMA if there is one. Collective.

        Args:
            raw: return the trained weights even if there is an EMA.
        """
        with self.evaluation_weights(raw):
            return self.gather_weights()

    # --- common to all strategies -----------------------------------------------------------------------------

    def finish_setup(self) -> None:
        """Start averaging and compiling, once network and optimizer exist. Raises SettingsError."""
        network, settings = self.network(), self.settings
        check_network_settings(network, settings)
        self.start_average(settings.ema)
        optimizer, images = self.master_weights()[0], self.schedule.total * self.batch_sizes.total
        if isinstance(optimizer, Muon) and self.precision != "fp32" and precision.fast_bf16(self.device):
            optimizer.working_dtype = torch.bfloat16
        pays_on_cpu = self.precision != "fp32" and is_long(images, self.schedule.minutes)
        mode = choose(settings.compile, self.device, self.compile_refusal, self.cuda_graph_refusal, pays_on_cpu)
        or_plain = settings.compile == "auto" and self.device.type == "cpu"
        self.compiled = Compiled(network, self.layers(), mode, or_plain, settings.compile_evaluation)
        if isinstance(optimizer, Muon):
            optimizer.compiled = mode != "off"
        self.first_steps = FIRST_STEPS[mode] if self.device.type == "cuda" or mode != "off" else 0

    def features(self) -> str:
        """Return which of compiling, memory format and EMA are on, for `describe`."""
        settings, mode, resizing = self.settings, self.compiled.mode, self.settings.resizing
        features = {
            f"compile {mode}": mode != "off",
            "channels last": settings.channels_last,
            f"ema {settings.ema.decay}": settings.ema.decay,
            f"images of {resizing.initial_scale:g} x the side in the first {resizing.fraction:.0%} of the steps": (
                self.resizing.is_on
            ),
        }
        return "".join(f", {feature}" for feature, is_on in features.items() if is_on)

    def to_training_input(self, images: Tensor) -> Tensor:
        """Convert images (B, 3, S, S) of a training step to the input of the network, (B, 3, s, s) with s <= S."""
        return self.to_model_input(self.resizing.resize(images, self.step, self.schedule.total))

    def to_model_input(self, images: Tensor) -> Tensor:
        """Convert images (B, 3, S, S) to the memory format and type of the network."""
        return images.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else images

    def state_values(self) -> int:
        """Return the largest number of values in `gather_state`: weights, two moments of Adam and the EMA."""
        return 4 * self.num_parameters

    def state_facts(self) -> dict[str, Any]:
        """Return the content of `engine.json`, which `load` needs."""
        facts = {"step": self.step, "kind": self.checkpoint_kind, "processes": dist.get_world_size()}
        return {**facts, "plan": self.schedule.plan_facts()} if self.schedule.plan else facts

    def load(self, folder: Path) -> None:
        """Load a checkpoint, made by any number of processes unless the strategy rejects that. Collective.

        Raises:
            SettingsError: a state of another kind of strategy, or of another network.
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
        if plan := facts.get("plan"):  # before the state, whose counters may follow from the learning rates
            self.schedule.set_plan(Plan(**plan))
        self.scatter_state(state)

    def check_state(self, facts: dict[str, Any]) -> None:
        """Check whether this strategy can load a state; `facts` is the content of engine.json. Raises SettingsError."""
        kind = facts.get("kind", self.checkpoint_kind)
        if kind != self.checkpoint_kind:
            raise SettingsError(
                f"the checkpoint holds the state of {kind}, but strategy {self.name} needs that of "
                f"{self.checkpoint_kind}; start from its weights.safetensors instead, with --init-weights"
            )

    def evaluate(self, batches: Iterator[Batch], raw: bool = False) -> EvalCounts:
        """Count correct, top-5 correct and seen images and sum the loss, over all processes, without padding.

        Args:
            raw: evaluate the trained weights even if there is an EMA.
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
        correct, correct_top5, seen = counts.counts.tolist()
        return EvalCounts(correct, correct_top5, seen, counts.loss_sum.item())

    def close(self, failed: bool = False) -> None:
        """Leave the process group, after waiting for the others unless this process `failed`."""
        if dist.is_initialized() and not failed:
            process_group.destroy_process_group()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of a micro-batch, in fp32."""
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.loss.label_smoothing)

    def prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and the random state of optimizer step `self.step`."""
        factor = self.schedule(self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        # Dropout is a function of (seed, process, step), so a resumed run draws the masks of an uninterrupted one.
        torch.manual_seed(((self.seed * 1_000_003 + self.random_stream()) * 1_000_000_007 + self.step) % 2**63)

    def random_stream(self) -> int:
        """Return the number of this process's random stream; different numbers draw different dropout masks."""
        return self.data_shard[0]


def build_seeded(build: Any, seed: int) -> nn.Module:
    """Call `build()` with the same random state on every process, so that all start from the same weights."""
    torch.manual_seed(seed)
    return build()
