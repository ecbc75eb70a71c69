"""Training loops of other projects on the same network and batches: the baselines of `training_step.py`.

bare                   a plain PyTorch loop: autocast for bf16, AdamW, gradient clipping, a learning-rate schedule
bare, bf16 weights     the same with bf16 weights and an fp32 copy for the optimizer, as in DeepSpeed's bf16
timm                   the components of timm's training script (task, optimizer, clipping, meter), in its order
lightning              PyTorch Lightning's Trainer without logger, checkpoints and progress bar

All of them use channels_last and a torch.compile mode where the settings ask for it, as our engines do.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.step_breakdown import Marks
from benchmarks.lib.timing import synchronize
from benchmarks.lib.workload import SEED, Feed, Spent, Subject
from models.cost import count_parameters
from optim.lr_schedule import Schedule
from parallel import process_group
from parallel.batch_sizes import BatchSizes
from parallel.compile import GRAPHS
from parallel.engine import build_seeded

TOTAL_STEPS = 100_000  # of the learning-rate schedule: the rate is nearly constant during the measurement


class Unavailable(Exception):
    """A baseline cannot run here, or not with these settings; the message says why."""


class Bare:
    """A plain PyTorch loop that uses none of our engines."""

    describe = "plain PyTorch loop"

    def __init__(self, subject: Subject, request: dict[str, Any]):
        self.settings = subject.settings
        config = self.settings.engine
        self.device = process_group.init_process_group()
        self.sizes = BatchSizes.derive(config, request["processes"])
        self.feed = Feed(
            subject, self.sizes, int(os.environ["RANK"]), self.device, request["source"], request["synthetic"]
        )
        self.memory_format = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        self.bf16, self.clipping = bool(config["bf16"]["enabled"]), config["gradient_clipping"]
        if config["optimizer"]["type"] != "AdamW":
            raise Unavailable(f"this baseline uses AdamW, not {config['optimizer']['type']}")
        self.network = build_seeded(subject.build, SEED).to(self.device)
        self.num_parameters = count_parameters(self.network)
        self.prepare()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, Schedule(self.settings.schedule, TOTAL_STEPS)
        )
        self.model, self.compile = self.network, request["compile"]
        if self.compile != "off":
            self.model = torch.compile(self.model, mode=None if self.compile == "on" else self.compile)
        if request["processes"] > 1:
            self.model = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def prepare(self) -> None:
        """Create the optimizer."""
        self.optimizer = self.adamw(list(self.network.parameters()))

    def adamw(self, parameters: list[Tensor]) -> torch.optim.AdamW:
        params = dict(self.settings.engine["optimizer"]["params"])
        decay = params.pop("weight_decay")
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        params["betas"] = tuple(params["betas"])
        return torch.optim.AdamW(groups, **params, fused=self.device.type == "cuda")

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def loss(self, scores: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(scores.float(), labels, label_smoothing=self.settings.loss.label_smoothing)

    def steps(self, count: int) -> list[Tensor]:
        self.model.train()
        return [self.step() for _ in range(count)]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return images and labels of the next micro-batch, in the memory format of the settings."""
        if self.compile in GRAPHS:
            torch.compiler.cudagraph_mark_step_begin()
        images, labels = next(self.feed)
        return images.contiguous(memory_format=self.memory_format), labels

    def step(self) -> Tensor:
        """Train one step, with accumulation, and return its loss."""
        losses = []
        for _ in range(self.sizes.accumulation):
            images, labels = self.batch()
            with self.autocast():
                scores = self.model(images)
            loss = self.loss(scores, labels)
            (loss / self.sizes.accumulation).backward()
            losses.append(loss.detach())
        self.update()
        return torch.stack(losses).mean()

    def update(self) -> None:
        if self.clipping:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()

    def turn(self, count: int) -> tuple[Spent, list[float]]:
        synchronize(self.device)
        self.feed.batches.wait_seconds = 0.0
        began = time.perf_counter()
        losses = torch.stack(self.steps(count)).tolist()
        synchronize(self.device)
        return Spent(time.perf_counter() - began, self.feed.batches.wait_seconds), losses

    def parts(self, count: int) -> dict[str, float]:
        marks, feed = Marks(self.device), self.feed
        handles = marks.on(self.network, self.optimizer)
        self.loss, self.feed = marks.around_loss(self.loss), marks.around_batches(feed)
        try:
            self.steps(count)
            marks("rest")
            return marks.seconds()
        finally:
            del self.loss
            self.feed = feed
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        self.feed.batches.close()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class BareWeights(Bare):
    """The plain loop with bf16 weights, except for the optimizer's fp32 copy."""

    describe = "plain PyTorch loop, bf16 weights with an fp32 copy"

    def prepare(self) -> None:
        if not self.bf16:
            raise Unavailable("this baseline exists in bf16 only")
        self.network.bfloat16()
        self.trained = list(self.network.parameters())
        self.copies = [p.detach().float().requires_grad_() for p in self.trained]
        self.optimizer = self.adamw(self.copies)

    def step(self) -> Tensor:
        if self.sizes.accumulation > 1:
            raise Unavailable("this baseline does not accumulate gradients")
        images, labels = self.batch()
        loss = self.loss(self.model(images.bfloat16()), labels)
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        for copy, parameter in zip(self.copies, self.trained, strict=True):
            copy.grad, parameter.grad = parameter.grad.float(), None
        if self.clipping:
            nn.utils.clip_grad_norm_(self.copies, self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        with torch.no_grad():
            torch._foreach_copy_(self.trained, self.copies)

    def parts(self, count: int) -> dict[str, float]:
        raise Unavailable("the optimizer works on other tensors than the gradients")


class Timm(Bare):
    """timm's task, optimizer factory, clipping and meter; like its script, it reads the loss in every step."""

    describe = "pieces of timm's train.py"

    def prepare(self) -> None:
        try:
            from timm.optim import create_optimizer_v2
            from timm.task import ClassificationTask
            from timm.utils import AverageMeter, dispatch_clip_grad
        except ImportError as error:
            raise Unavailable(f"timm with a training task is not installed: {error}") from error
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise Unavailable("measured with one process only")
        if self.settings.augmentation.mixup or self.settings.augmentation.cutmix:
            raise Unavailable("timm's task takes one label per image here, so no MixUp or CutMix")
        params = self.settings.engine["optimizer"]["params"]
        self.optimizer = create_optimizer_v2(
            self.network,
            "adamw",
            lr=params["lr"],
            weight_decay=params["weight_decay"],
            betas=tuple(params["betas"]),
            eps=params["eps"],
            fused=self.device.type == "cuda",
        )
        self.make_task = lambda: ClassificationTask(
            self.model,
            criterion_kwargs={"smoothing": self.settings.loss.label_smoothing},
            device=self.device,
            verbose=False,
        )
        self.clip, self.meter, self.task = dispatch_clip_grad, AverageMeter(), None

    def step(self) -> Tensor:
        self.task = self.task or self.make_task()  # created late: the model is compiled after `prepare`
        losses = []
        for _ in range(self.sizes.accumulation):
            images, labels = self.batch()
            with self.autocast():
                loss = self.task(images, labels)["loss"]
            (loss / self.sizes.accumulation).backward()
            losses.append(loss.detach())
        if self.clipping:
            self.clip(self.network.parameters(), value=self.clipping, mode="norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        mean = torch.stack(losses).mean()
        self.meter.update(mean.item(), self.sizes.accumulation * len(images))
        self.scheduler.step()
        return mean

    def parts(self, count: int) -> dict[str, float]:
        raise Unavailable("the loss is inside timm's task")


class Lightning(Bare):
    """A LightningModule in a Trainer."""

    describe = "PyTorch Lightning's Trainer"

    def __init__(self, subject: Subject, request: dict[str, Any]):
        self.library = lightning_library()
        if request["processes"] > 1:
            raise Unavailable("measured with one process only")
        super().__init__(subject, request)

    def turn(self, count: int) -> tuple[Spent, list[float]]:
        """Run one `fit`; the clock excludes its start and its first step."""
        clock = lightning_clock(self.library, self.device, count)
        self.fit(count + 1, [clock])
        return Spent(clock.seconds, self.feed.batches.wait_seconds * count / (count + 1)), clock.losses

    def steps(self, count: int) -> list[Tensor]:
        self.fit(count, [])
        return []

    def fit(self, count: int, callbacks: list[Any]) -> None:
        self.feed.batches.wait_seconds = 0.0
        trainer = self.library.Trainer(
            max_steps=count,
            accelerator="gpu" if self.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if self.bf16 else "32-true",
            accumulate_grad_batches=self.sizes.accumulation,
            gradient_clip_val=self.clipping or None,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(lightning_module(self.library, self), itertools.islice(self.feed, count * self.sizes.accumulation))

    def parts(self, count: int) -> dict[str, float]:
        raise Unavailable("Lightning runs its own loop")


def lightning_library() -> Any:
    """Return Lightning under either of the names that it is published under."""
    warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        logging.getLogger(name).setLevel(logging.ERROR)
        return library
    raise Unavailable("Lightning is not installed; pip install lightning")


def lightning_module(library: Any, loop: Bare) -> Any:
    """Return a LightningModule around the network, loss and optimizer of `loop`."""

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = loop.model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images = batch[0].contiguous(memory_format=loop.memory_format)
            return loop.loss(self.network(images), batch[1])

        def configure_optimizers(self) -> Any:
            scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, Schedule(loop.settings.schedule, TOTAL_STEPS))
            return {"optimizer": loop.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def lightning_clock(library: Any, device: torch.device, count: int) -> Any:
    """Return a callback that times `count` steps after the first."""

    class Clock(library.Callback):
        def __init__(self) -> None:
            self.seconds, self.losses, self.seen = 0.0, [], []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if not self.seen:
                synchronize(device)
                self.began = time.perf_counter()
            self.seen.append(outputs["loss"].detach())
            if trainer.global_step == count + 1:
                self.losses = torch.stack(self.seen[1:]).tolist()
                synchronize(device)
                self.seconds = time.perf_counter() - self.began

    return Clock()


BASELINES: dict[str, Callable[[Subject, dict[str, Any]], Bare]] = {
    "bare": Bare,
    "bare, bf16 weights": BareWeights,
    "timm": Timm,
    "lightning": Lightning,
}
