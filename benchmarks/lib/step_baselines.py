"""Loops that other people would write, on the same network and batches: what `training_step.py` compares our engines with.

bare                   a plain PyTorch loop: autocast for bf16, AdamW, clipping, a scheduler
bare, bf16 weights     the same with bf16 weights and an fp32 copy that the optimiser works on, as DeepSpeed's bf16 is
timm                   the pieces of timm's training script (task, optimiser, clipping, meter), in its order
lightning              PyTorch Lightning's Trainer without logger, checkpoints and progress bar
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.step_breakdown import Marks
from benchmarks.lib.timing import synchronise
from benchmarks.lib.workload import SEED, Feed, Spent, Subject
from models.cost import count_parameters
from optim.lr_schedule import Schedule
from parallel import process_group
from parallel.batch_sizes import BatchSizes
from parallel.engine import build_seeded

TOTAL_STEPS = 100_000  # of the learning rate's course: it hardly moves while we measure


class Unavailable(Exception):
    """A contender cannot run here, or not this; the message says why."""


class Bare:
    """A loop that knows nothing of our engines."""

    describe = "plain PyTorch loop"

    def __init__(self, subject: Subject, request: dict[str, Any]):
        self.settings = subject.settings
        config = self.settings.engine
        self.device = process_group.init_process_group()
        self.sizes = BatchSizes.derive(config, request["processes"])
        self.feed = Feed(
            subject, self.sizes, int(os.environ["RANK"]), self.device, request["source"], request["synthetic"]
        )
        self.bf16, self.clipping = bool(config["bf16"]["enabled"]), config["gradient_clipping"]
        if config["optimizer"]["type"] != "AdamW":
            raise Unavailable(f"this peer uses AdamW, not {config['optimizer']['type']}")
        self.network = build_seeded(subject.build, SEED).to(self.device)
        self.num_parameters = count_parameters(self.network)
        self.prepare()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, Schedule(self.settings.schedule, TOTAL_STEPS)
        )
        self.model = self.network
        if request["compile"]:
            self.model = torch.compile(self.model)
        if request["processes"] > 1:
            self.model = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )

    def prepare(self) -> None:
        """Make the optimiser."""
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

    def step(self) -> Tensor:
        losses = []
        for _ in range(self.sizes.accumulation):
            images, labels = next(self.feed)
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
        synchronise(self.device)
        self.feed.batches.wait_seconds = 0.0
        began = time.perf_counter()
        losses = torch.stack(self.steps(count)).tolist()
        synchronise(self.device)
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
    """bf16 throughout, but for the optimiser's fp32 copy of the weights."""

    describe = "plain PyTorch loop, bf16 weights with an fp32 copy"

    def prepare(self) -> None:
        if not self.bf16:
            raise Unavailable("it is about bf16")
        self.network.bfloat16()
        self.trained = list(self.network.parameters())
        self.copies = [p.detach().float().requires_grad_() for p in self.trained]
        self.optimizer = self.adamw(self.copies)

    def step(self) -> Tensor:
        images, labels = next(self.feed)
        if self.sizes.accumulation > 1:
            raise Unavailable("it does not accumulate gradients")
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
        raise Unavailable("its optimiser works on other tensors than its gradients")


class Timm(Bare):
    """timm's own task, optimiser factory, clipping and meter. As its script does by default, it looks at the loss in every step."""

    describe = "pieces of timm's train.py"

    def prepare(self) -> None:
        try:
            from timm.optim import create_optimizer_v2
            from timm.task import ClassificationTask
            from timm.utils import AverageMeter, dispatch_clip_grad
        except ImportError as error:
            raise Unavailable(f"timm with a training task is not installed: {error}") from error
        if int(os.environ["WORLD_SIZE"]) > 1:
            raise Unavailable("compared on one process only")
        if self.settings.augmentation.mixup or self.settings.augmentation.cutmix:
            raise Unavailable("its task here takes one label an image")
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
        self.task = self.task or self.make_task()  # the model is compiled only after `prepare`
        images, labels = next(self.feed)
        with self.autocast():
            result = self.task(images, labels)
        loss = result["loss"]
        loss.backward()
        if self.clipping:
            self.clip(self.network.parameters(), value=self.clipping, mode="norm")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.meter.update(loss.item(), len(images))
        self.scheduler.step()
        return loss.detach()

    def parts(self, count: int) -> dict[str, float]:
        raise Unavailable("its loss is inside its task")


class Lightning(Bare):
    """A LightningModule in a Trainer."""

    describe = "PyTorch Lightning's Trainer"

    def __init__(self, subject: Subject, request: dict[str, Any]):
        self.library = lightning_library()
        if request["processes"] > 1:
            raise Unavailable("compared on one process only")
        super().__init__(subject, request)

    def turn(self, count: int) -> tuple[Spent, list[float]]:
        """A fit of its own; the clock leaves out its beginning and its first step."""
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
        raise Unavailable("its loop is its own")


def lightning_library() -> Any:
    """Either of the names that Lightning is published under."""
    import importlib
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"(pytorch_)?lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        logging.getLogger(name).setLevel(logging.ERROR)
        return library
    raise Unavailable("Lightning is not installed (pip install lightning, in an environment that may have it)")


def lightning_module(library: Any, peer: Bare) -> Any:
    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = peer.model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return peer.loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            scheduler = torch.optim.lr_scheduler.LambdaLR(peer.optimizer, Schedule(peer.settings.schedule, TOTAL_STEPS))
            return {"optimizer": peer.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return Module()


def lightning_clock(library: Any, device: torch.device, count: int) -> Any:
    class Clock(library.Callback):
        def __init__(self) -> None:
            self.seconds, self.losses, self.seen = 0.0, [], []

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            if not self.seen:
                synchronise(device)
                self.began = time.perf_counter()
            self.seen.append(outputs["loss"].detach())
            if trainer.global_step == count + 1:
                self.losses = torch.stack(self.seen[1:]).tolist()
                synchronise(device)
                self.seconds = time.perf_counter() - self.began

    return Clock()


PEERS: dict[str, Callable[[Subject, dict[str, Any]], Bare]] = {
    "bare": Bare,
    "bare, bf16 weights": BareWeights,
    "timm": Timm,
    "lightning": Lightning,
}
