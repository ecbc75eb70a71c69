"""Milliseconds of a training step by part, from marks set where a step passes from one part to the next.

On a GPU a mark is an event in the stream, so the parts are device time: while the device waits for the host, the time
counts toward the last part. On a CPU a mark reads the clock. The measured code does not change: the marks are in the
iterator of batches, around the loss, on the gradients of the parameters and on the optimizer's step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

PARTS = ("data", "forward", "loss", "backward", "clip and exchange", "optimizer", "rest")


class Marks:
    """Seconds by part, from a sequence of marks."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        """Begin `part` now."""
        self.marks.append((part, self._now()))

    def again(self, part: str) -> None:
        """Begin `part` now, even if it is the current part: its time so far counts toward the part before it."""
        if self.marks and self.marks[-1][0] == part:
            self.marks.pop()
        self(part)

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Return seconds by part; time after the last mark does not count."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        total = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            total[part] += begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
        return total

    # --- placement of the marks -------------------------------------------------------------------------------------

    def around_batches(self, batches: Iterator) -> Iterator:
        """Mark the wait for each batch as data, and what follows as forward."""
        while True:
            self("data")
            batch = next(batches)
            self("forward")
            yield batch

    def around_loss(self, loss: Any) -> Any:
        """Mark the loss, and what follows as backward."""

        def marked(*arguments: Any) -> Any:
            self("loss")
            value = loss(*arguments)
            self("backward")
            return value

        return marked

    def on(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
        """Register the hooks of the later parts and return their handles."""
        ready = [
            p.register_post_accumulate_grad_hook(lambda _: self.again("clip and exchange"))
            for p in model.parameters()
            if p.requires_grad
        ]
        return [
            *ready,
            optimizer.register_step_pre_hook(lambda *_: self("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self("rest")),
        ]
