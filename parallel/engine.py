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

from model import count_parameters
from muon import Muon
from optimizers import COUNT_STEPS, check_optimizer
from parallel import precision, processes
from parallel.average import Averaging
from parallel.buffers import persistent_buffers
from parallel.checks import misfit, refuse_network, refuse_unused
from parallel.compiling import CPU_IMAGES, FIRST_STEPS, Compiled, choose
from parallel.counts import Batch, BatchSizes, Counts
from parallel.messages import Messages
from schedule import Schedule
from settings import Settings, SettingsError


class Engine(Averaging, Messages, ABC):
    """One strategy at work on one model.

    Attributes:
        data_shard: (which, of how many): the part of each global batch that this process reads.
        is_main: whether this process prints and writes files.
        step: optimiser steps made so far; where other jobs take part, `begin` and `train_batch` may carry it on by more than one.
        data_seed: of the order of the images and of their augmentation.
        stopping: whether the person wants to leave; asked where an engine waits for others. The loop sets it.
        num_parameters: trainable parameters of the whole model.
        shapes: of the whole model's parameters and persistent buffers.
        grad_norm: of the last step, before clipping, on the device; None where the strategy does not know it.
        skipped: whether the last step's update was left out (see `skip_bad_steps`).
        honours: the settings of the group `parallel` that this strategy uses; others are refused.
        honours_deepspeed: whether every key of `ds_config.json` reaches DeepSpeed, or only those of `checks.PLAIN_KEYS` count.
        state_kind: states of one kind go on under every strategy of that kind.
        tries_whole: whether a process holds the whole network, so that a trial of it on one GPU says what fits.
        precision: how `forward` computes, for those who evaluate the weights elsewhere: fp32, bf16 (weights and all) or autocast.
        average: the moving average of the weights that is evaluated and handed over, None where `ema.decay` is 0.
        bf16_enabled: what the setting of that name comes to here: false, true or autocast.
        first_steps: steps after a start that compile or warm up, and say nothing of the speed.
    """

    honours: frozenset[str] = frozenset()
    honours_deepspeed = False
    state_kind = "one model"
    precision = "fp32"
    tries_whole = True
    no_autocast: str | None = None  # why this strategy cannot compute by torch.autocast
    no_compile: str | None = None  # why this strategy cannot use torch.compile
    no_graphs: str | None = "this strategy cannot record CUDA graphs; ddp can"
    no_channels_last: str | None = None
    no_average: str | None = None  # why ema.decay would not do what it says
    no_own_average: str | None = None  # nor an optimiser that averages the weights itself

    data_shard: tuple[int, int]
    is_main: bool
    device: torch.device
    batch_sizes: BatchSizes
    num_parameters: int
    shapes: dict[str, tuple[int, ...]]

    def __init__(self, settings: Settings, schedule: Schedule, seed: int):
        """Raises SettingsError for a setting that this strategy would not use."""
        self.name = type(self).__module__.rpartition(".")[2]
        refuse_unused(self.name, settings, self.honours, self.honours_deepspeed)
        check_optimizer(settings, self.name, self.no_own_average)
        for is_set, refusal in ((settings.channels_last, self.no_channels_last), (settings.ema.decay, self.no_average)):
            if is_set and refusal:
                raise SettingsError(f"strategy {self.name} would not use {'ema.decay' if refusal is self.no_average else 'channels_last'}: {refusal}")
        device, enabled = processes.pick_device(), settings.engine["bf16"]["enabled"]
        self.bf16_enabled, _ = precision.choose(enabled, self.no_autocast, device)
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

    def count_up(self, model: nn.Module) -> None:
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
        raise SettingsError(f"--skip-bad-steps: strategy {self.name} updates parts of the network before it knows all of the gradient; "
                            "leave the flag out, or take zero, ddp or fsdp")

    def refuse_own_count(self) -> None:
        """Raises SettingsError for an optimiser whose count of its steps a skipped one would put out."""
        name = self.settings.engine["optimizer"]["type"]
        if name in COUNT_STEPS:
            raise SettingsError(f"--skip-bad-steps: optimizer.type={name} counts its steps itself, and a skipped one would put that out; "
                                "leave the flag out, or take another optimiser")

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor | None:
        """Class scores (B, K) in evaluation mode, without gradients; None in a process that another one counts for."""

    @abstractmethod
    def describe(self) -> str:
        """A few words for the screen: precision, stage, whatever this strategy has."""

    @abstractmethod
    def masters(self) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        """The optimiser, and the fp32 tensors that it updates in this process: parameters, or what this process holds of them."""

    @abstractmethod
    def network(self) -> nn.Module:
        """The network of this process, whose parameters and buffers bear their plain names."""

    def layers(self) -> list[nn.Module]:
        """The network's layers, as many as this process has."""
        network = self.network()
        return list(network) if isinstance(network, nn.Sequential) else [network]

    @abstractmethod
    def refresh(self) -> None:
        """Let the network's parameters follow `masters`, which were changed. Collective."""

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
        with self.evaluated(raw):
            return self.gather_weights()

    # --- what every strategy does alike -----------------------------------------------------------------------------

    def ready(self) -> None:
        """Called once, when network and optimiser stand: what averages and compiles. Raises SettingsError."""
        network, settings = self.network(), self.settings
        refuse_network(network, settings)
        self.start_average(settings.ema)
        optimizer, images = self.masters()[0], self.schedule.total * self.batch_sizes.total
        if isinstance(optimizer, Muon) and self.precision != "fp32" and precision.fast_bf16(self.device):
            optimizer.working_dtype = torch.bfloat16
        pays_on_cpu = self.precision != "fp32" and images >= CPU_IMAGES
        mode = choose(settings.compile, self.device, self.no_compile, self.no_graphs, pays_on_cpu)
        or_plain = settings.compile == "auto" and self.device.type == "cpu"
        self.compiled = Compiled(network, self.layers(), mode, or_plain)
        self.first_steps = FIRST_STEPS[mode] if self.device.type == "cuda" or mode != "off" else 0

    def features(self) -> str:
        """What of compiling, memory format and averaging is on, for `describe`."""
        settings, mode = self.settings, self.compiled.mode
        features = {f"compile {mode}": mode != "off", "channels last": settings.channels_last, f"ema {settings.ema.decay}": settings.ema.decay}
        return "".join(f", {feature}" for feature, is_on in features.items() if is_on)

    def feed(self, images: Tensor) -> Tensor:
        """Images as the network takes them."""
        return images.contiguous(memory_format=torch.channels_last) if self.settings.channels_last else images

    def state_values(self) -> int:
        """At most how many numbers `gather_state` gives: the weights, two moments of Adam, an average of the weights."""
        return 4 * self.num_parameters

    def state_facts(self) -> dict[str, Any]:
        """What `load` has to know of a state; the content of `engine.json`."""
        return {"step": self.step, "kind": self.state_kind, "processes": dist.get_world_size()}

    def save(self, folder: Path) -> None:
        """Write what `load` reads into an existing folder, with nothing around it; a run has `saving.py` for that. Collective."""
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
        facts = self.from_main(facts)
        self.check_state(facts)
        if self.is_main:
            state = load_file(folder / "state.safetensors")
            problem = misfit(state, self.shapes)
        if problem := self.from_main(problem):
            raise SettingsError(problem)
        self.step = facts["step"]
        self.scatter_state(state)

    def check_state(self, facts: dict[str, Any]) -> None:
        """Refuse a state that was not made for this strategy; `facts` is what `engine.json` holds. Raises SettingsError."""
        kind = facts.get("kind", self.state_kind)
        if kind != self.state_kind:
            raise SettingsError(f"the checkpoint holds the state of {kind}, strategy {self.name} has that of {self.state_kind}; "
                                "start from its weights.safetensors instead, with --init-weights")

    def count(self, batches: Iterator[Batch], raw: bool = False) -> Counts:
        """Correct, top-5 correct, seen images and summed loss over the batches of all processes; padding is left out.

        Counts the average if there is one, or with `raw` the weights that are trained all the same.
        """
        self.compiled.use(training=False)
        with self.evaluated(raw):
            return self._count(batches)

    @torch.no_grad()
    def _count(self, batches: Iterator[Batch]) -> Counts:
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

    def close(self) -> None:
        """Wait for the others and leave the process group."""
        if dist.is_initialized():
            processes.leave()

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a micro-batch, in fp32."""
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.loss.label_smoothing)

    def prepare_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the learning rate and the random state that optimiser step `self.step` must have."""
        factor = self.schedule(self.step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        # Dropout is a function of (seed, process, step), so a resumed run draws what the unbroken one would have drawn.
        torch.manual_seed(((self.seed * 1_000_003 + self.random_stream()) * 1_000_000_007 + self.step) % 2**63)

    def random_stream(self) -> int:
        """Processes with different numbers draw different dropout masks."""
        return self.data_shard[0]


def build_seeded(build: Any, seed: int) -> nn.Module:
    """Call `build()` with the random state that every process shares, so that all start from the same weights."""
    torch.manual_seed(seed)
    return build()
