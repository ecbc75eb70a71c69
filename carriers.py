"""Who carries a plan out: the DALI graph, or whole-batch tensor operations. Both run in the thread that makes batches."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from augmentation import Plan

if TYPE_CHECKING:
    from dali_pipeline import Batches

PREFETCH = 2  # batches inside DALI at a time


@dataclass(frozen=True)
class Token:
    """One batch: which epoch, which place in it, and where the consumer will stop."""

    epoch: int
    index: int
    stop: int

    @property
    def place(self) -> tuple[int, int]:
        return self.epoch, self.index

    def next(self, training: bool) -> Token:
        """What will most likely be asked for next: the following batch, then the start of the next epoch or pass."""
        if self.index + 1 < self.stop:
            return Token(self.epoch, self.index + 1, self.stop)
        return Token(self.epoch + training, 0, self.stop)


@dataclass(frozen=True)
class Work:
    """One batch on its way: positions in the split (-1: padding), what was read, and what is to happen to it."""

    token: Token
    positions: np.ndarray
    read: Any
    plan: Plan | None
    mix: tuple[np.ndarray, np.ndarray] | None


class OnDali:
    """Carries plans out by the DALI graph, which has PREFETCH batches in the making."""

    def __init__(self, batches: Batches, num_threads: int):
        from dali_graph import Graph  # DALI takes a second to import

        self.batches, self.device = batches, batches.device
        sample = batches.augmentation.plan(0, 0, 1)
        training = batches.training
        self.graph = Graph(
            side=batches.side, source_side=batches.dataset.image_side, decode=batches.source == "files", training=training,
            corner=training and sample.corner is not None, part=training and sample.part is not None,
            num_levels=len(sample.levels) if training else 0,
            erase=training and sample.erased is not None and batches.augmentation.settings.erasing_value == "zero",
            mean=batches.dataset.mean, std=batches.dataset.std,
        )
        device_id = (self.device.index or 0) if self.device.type == "cuda" else None
        self.pipeline = self.graph.build(batches.batch_size, num_threads, device_id, prefetch=PREFETCH)
        self._inside: deque[Work] = deque()
        self._num_fed = 0

    def images(self, token: Token) -> tuple[Tensor, Work]:
        """The images of the batch of `token`, while DALI works on the ones after it."""
        while self._inside and self._inside[0].token.place != token.place:
            self._output()  # read ahead for a consumer who went elsewhere
        while len(self._inside) < PREFETCH:
            self._feed(self._inside[-1].token.next(self.batches.training) if self._inside else token)
        return self._output()

    def _feed(self, token: Token) -> None:
        work = self.batches.prepare(token, read=True)
        for name, value in self._inputs(work).items():
            self.pipeline.feed_input(name, value)
        self._inside.append(work)
        self._num_fed += 1
        if self._num_fed >= PREFETCH:  # DALI's first run consumes a whole queue of inputs, every later one a single input
            self.pipeline.schedule_run()

    def _inputs(self, work: Work) -> dict[str, Any]:
        inputs, plan = {"images": work.read}, work.plan
        if plan is not None:
            inputs["flip"] = plan.flip
            if self.graph.corner:
                inputs["corner"] = plan.corner
            if self.graph.part:
                inputs["part"] = plan.part
            for i, level in enumerate(plan.levels):
                inputs |= {f"kind{i}": level.kind, f"value{i}": level.value, f"matrix{i}": level.matrix}
            if self.graph.erase:
                box = plan.erased.astype(np.float32)
                inputs |= {"erase_at": np.ascontiguousarray(box[:, :2]), "erase_size": box[:, 2:] - box[:, :2]}
        return inputs

    def _output(self) -> tuple[Tensor, Work]:
        """The next batch out of DALI, copied to a tensor of our own: DALI reuses its buffers."""
        from nvidia.dali.plugin.pytorch import feed_ndarray

        work = self._inside.popleft()
        try:
            (output,) = self.pipeline.share_outputs()
        except RuntimeError as error:
            self.batches.blame(work, error)
        side = self.batches.side
        images = torch.empty(len(work.positions), 3, side, side, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(output.as_tensor(), images, cuda_stream=stream)
        self.pipeline.release_outputs()
        return images, work


class OnTensors:
    """Carries plans out on whole tensors."""

    def __init__(self, batches: Batches, num_threads: int):
        self.batches = batches
        # Computed on the CPU: a kernel launched here could still be at work when the thread that makes batches reads its
        # result in another stream. The copy of a few numbers is there when `to` returns.
        self.mean = (255 * torch.tensor(batches.dataset.mean).view(3, 1, 1)).to(batches.device)
        self.scale = (1 / (255 * torch.tensor(batches.dataset.std).view(3, 1, 1))).to(batches.device)

    def images(self, token: Token) -> tuple[Tensor, Work]:
        """The images of the batch of `token`."""
        from tensor_ops import augment

        work = self.batches.prepare(token, read=False)
        corner = work.plan.corner if work.plan is not None else None
        images = self.batches.reader.read_crops(np.maximum(work.positions, 0), corner)
        if work.plan is not None:
            images = augment(images, work.plan)
        return images.float().sub_(self.mean).mul_(self.scale), work
