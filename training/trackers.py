"""What watches a run from its main process, beside metrics.jsonl: TensorBoard, Weights & Biases, losses by step, pictures.

    tensorboard --logdir runs               every run, in the browser (train.py --no-tensorboard: no event files)
    python train.py --wandb ...             Weights & Biases too (WANDB_MODE=offline: on this disk only)

Every number has the name and the value that it has in metrics.jsonl, and stands at the optimiser step where it was taken. A watcher is
told of the first batch, of training losses, of each epoch's line, and of the end. What all of them cost stands in `tracking_seconds`
of the next line.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RunError, SettingsError
from common.files import read_lines, write_atomically
from records.run_data import RunData
from training.console import QUIET, Console
from training.utilization import Sampler

STEP_POINTS = 1000  # of the training loss by step, over a run: more could not be told apart in a picture
LOOKED_AT = 64  # images of the first batch that are shown
CHARTS = {  # TensorBoard's tab "custom scalars": what belongs together, by patterns of names
    "accuracy": [r".*_accuracy$"],
    "loss": [r".*_loss$"],
    "learning rate": ["learning_rate"],
    "images a second": ["images_per_second"],
    "seconds": [r".*_seconds$"],
}
REDRAW_SECONDS = 30.0  # at least, between redrawings of curves.png
REDRAW_FACTOR = 300  # and at least so many times what one takes: a third of a per cent


class Tracker:
    """Something that is told how a run goes. Each of its methods may be left out."""

    def batch(self, pixels: np.ndarray) -> None:
        """What the network sees first: uint8 (rows, columns, S, S, 3), augmented. Only in a run that begins."""

    def loss(self, step: int, mean: float, steps: int) -> None:
        """The main process's mean training loss over the last `steps` steps up to `step`."""

    def epoch(self, line: dict[str, Any]) -> None:
        """The line of metrics.jsonl that has just been written."""

    def close(self, failed: bool) -> None:
        """The run ends here: finished, stopped or, with `failed`, by an error."""


def pass_over_full_disks() -> None:
    """Print no trace of TensorBoard's writing thread when the disk is full: the run itself says so, in a sentence."""
    usual = threading.excepthook

    def hook(details: threading.ExceptHookArgs) -> None:
        if not (issubclass(details.exc_type, OSError) and type(details.thread).__name__ == "_AsyncWriterThread"):
            usual(details)

    threading.excepthook = hook


class TensorBoard(Tracker):
    """Event files in <run>/tensorboard/. Events of steps that a resumed run makes again are purged."""

    def __init__(self, folder: Path, facts: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        pass_over_full_disks()
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0, flush_secs=10)
        if not step:
            self.writer.add_custom_scalars({"this run": {title: ["Multiline", tags] for title, tags in CHARTS.items()}})
            for name in ("settings", "command", "commit", "versions", "dataset"):
                self.writer.add_text(name, as_markdown(facts[name]), 0)

    def batch(self, pixels: np.ndarray) -> None:
        from reports.images import tile

        self.writer.add_image("first_batch", tile(pixels), 0, dataformats="HWC")

    def loss(self, step: int, mean: float, steps: int) -> None:
        self.writer.add_scalar("step_loss", mean, step)

    def epoch(self, line: dict[str, Any]) -> None:
        for name, value in numbers_of(line).items():
            self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases; a resumed run goes on with the same one, and what it was told already is not told again."""

    def __init__(self, folder: Path, facts: dict[str, Any], step: int, project: str | None, silent: bool):
        """Raises RunError when it cannot be reached or does not know who this is."""
        import wandb

        name = folder / "wandb_run.txt"  # its id there: a run that starts over has a new folder, and becomes a new run
        identity = name.read_text().strip() if step and name.is_file() else secrets.token_hex(4)
        write_atomically(name, identity + "\n")
        config = {
            key: facts[key]
            for key in ("settings", "preset", "seed", "command", "commit", "versions", "dataset", "device")
        }
        try:
            self.run = wandb.init(
                project=project,
                name=folder.name,
                id=identity,
                resume="allow",
                dir=str(folder),
                config=config,
                settings=wandb.Settings(silent=silent, quiet=True),
            )
        except wandb.errors.Error as error:
            raise RunError(
                f"Weights & Biases says '{str(error).splitlines()[0]}'; WANDB_MODE=offline keeps the numbers on this disk"
            ) from error
        self.image = wandb.Image

    def _notify(self, step: int, numbers: dict[str, Any]) -> None:
        if step >= self.run.step:  # it refuses to go back; a step that is made again has the numbers that it had
            self.run.log(numbers, step=step)

    def batch(self, pixels: np.ndarray) -> None:
        from reports.images import tile

        self._notify(0, {"first_batch": self.image(tile(pixels))})

    def loss(self, step: int, mean: float, steps: int) -> None:
        self._notify(step, {"step_loss": mean})

    def epoch(self, line: dict[str, Any]) -> None:
        self._notify(line["step"], numbers_of(line))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class StepLosses(Tracker):
    """steps.jsonl: {"step": 40, "steps": 12, "step_loss": 4.21}, for a picture of training inside an epoch."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "steps.jsonl"
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def loss(self, step: int, mean: float, steps: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "steps": steps, "step_loss": mean}) + "\n")


class Pictures(Tracker):
    """curves.png while the run goes on, report.html at its end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.not_before = 0.0

    def epoch(self, line: dict[str, Any]) -> None:
        if time.monotonic() < self.not_before:
            return
        began = time.monotonic()
        self._draw_curves(RunData.read(self.folder))
        self.not_before = time.monotonic() + max(REDRAW_SECONDS, REDRAW_FACTOR * (time.monotonic() - began))

    def _draw_curves(self, run: RunData) -> None:
        from reports.curves import training
        from reports.style import save

        save(training(run), self.folder / "curves.png")

    def close(self, failed: bool) -> None:
        from reports.page import write_page

        run = RunData.read(self.folder)
        if run.metrics and not failed:
            self._draw_curves(run)
            write_page(run)


class Tracking:
    """All watchers of one run, and the clock of what they cost. Without watchers (in all processes but the main one) it does nothing.

    A picture is not worth a run: a watcher that cannot write (a full disk) is given up, with a note, and the run goes on.
    """

    def __init__(
        self,
        watchers: list[Tracker],
        sampler: Sampler | None = None,
        total_steps: int = 0,
        say: Callable[[str], None] = print,
        seconds: float = 0.0,
    ):
        """`seconds` is what it has cost to make the watchers."""
        self.watchers, self.sampler, self.say = watchers, sampler, say
        self.total_steps, self.every = total_steps, max(1, total_steps // STEP_POINTS)
        self._losses: list[float] = []
        self._told: int | None = None  # the step at which a mean was last told
        self._seconds = seconds
        self._sampled = 0.0  # of the sampler's seconds, those that were told

    def _notify(self, what: Callable[[Tracker], None]) -> None:
        began = time.perf_counter()
        for watcher in list(self.watchers):
            try:
                what(watcher)
            except OSError as error:
                self.watchers.remove(watcher)
                self.say(
                    f"note: {type(watcher).__name__} is given up, because {error.strerror or error}; the run goes on"
                )
        self._seconds += time.perf_counter() - began

    def first_batch(self, pixels: Callable[[], np.ndarray]) -> None:
        """Show what the network will see; `pixels` makes it, where somebody wants it."""
        if any(type(watcher).batch is not Tracker.batch for watcher in self.watchers):
            shown = pixels()
            self._notify(lambda watcher: watcher.batch(shown))

    def losses(self, losses: list[tuple[int, float]]) -> None:
        """Steps, in their order, with the training loss of each; they are told on as means, STEP_POINTS or so in a run.

        A step may be missing because it was skipped: the mean is then told at the next one.
        """
        if not self.watchers:
            return
        for step, loss in losses:
            self._losses.append(loss)
            told = step - 1 if self._told is None else self._told
            if step // self.every > told // self.every or step == self.total_steps:
                self._tell_loss(step, float(np.mean(self._losses)), len(self._losses))
                self._losses.clear()
                self._told = step

    def _tell_loss(self, step: int, mean: float, steps: int) -> None:
        self._notify(lambda watcher: watcher.loss(step, mean, steps))

    def epoch(self, line: dict[str, Any]) -> None:
        self._notify(lambda watcher: watcher.epoch(line))

    def take_seconds(self) -> float:
        """What watching has cost since the last call."""
        sampled = self.sampler.seconds if self.sampler else 0.0
        seconds, self._seconds = self._seconds + sampled - self._sampled, 0.0
        self._sampled = sampled
        return seconds

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if self.sampler:
            self.sampler.stop()
        self._notify(lambda watcher: watcher.close(failed=error is not None))


def start_tracking(
    folder: Path, facts: dict[str, Any], step: int, tensorboard: bool, wandb: str | None, screen: Console
) -> Tracking:
    """The watchers of a run that goes on after `step`; in the main process.

    Args:
        wandb: the project at Weights & Biases, "" for its default; None for none.

    Raises:
        RunError: Weights & Biases cannot be used.
    """
    began = time.perf_counter()
    watchers: list[Tracker] = [StepLosses(folder, step)]
    if tensorboard:
        watchers.append(TensorBoard(folder, facts, step))
    if wandb is not None:
        watchers.append(WeightsAndBiases(folder, facts, step, wandb or None, silent=screen.level == QUIET))
    sampler = Sampler(folder)
    sampler.start()
    return Tracking(
        [*watchers, Pictures(folder)], sampler, facts["total_steps"], screen.say, time.perf_counter() - began
    )


def check_trackers(tensorboard: bool, wandb: str | None) -> None:
    """Before anything else is done: are the packages there? Raises SettingsError."""
    if wandb is not None and find_spec("wandb") is None:
        raise SettingsError("--wandb needs the package wandb, which is not installed: pip install wandb")
    if tensorboard and find_spec("tensorboard") is None:
        raise SettingsError(
            "the package tensorboard is not installed: pip install tensorboard, or give --no-tensorboard"
        )


def numbers_of(line: dict[str, Any]) -> dict[str, float]:
    """What of a line of metrics.jsonl is a number; the step is where it stands, not a number of its own."""
    return {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}


def first_images(images: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The first images of a batch (B, 3, S, S), as they look, in eight columns: uint8 (rows, columns, S, S, 3)."""
    from image_data.pixels import denormalize

    pixels = denormalize(images[:LOOKED_AT], mean, std)
    columns = min(8, len(pixels))
    rows = len(pixels) // columns
    return pixels[: rows * columns].reshape(rows, columns, *pixels.shape[1:])


def as_markdown(value: Any) -> str:
    """A text for TensorBoard: an indented block, which it shows as it is."""
    text = (
        value if isinstance(value, str) else " ".join(value) if isinstance(value, list) else json.dumps(value, indent=2)
    )
    return "\n".join("    " + row for row in text.splitlines())
