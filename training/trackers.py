"""Trackers of a run, called by its main process: losses by step, pictures, the index, TensorBoard, W&B, MLflow.

    tensorboard --logdir runs               every run, in the browser (train.py --no-tensorboard: no event files)
    python train.py --wandb ...             also log to Weights & Biases (WANDB_MODE=offline: to this disk only)
    python train.py --mlflow ...            also log to MLflow (without a server: to runs/mlflow.db)

Every number has the value that it has in metrics.jsonl, at the optimizer step where it was measured. A
tracker receives the first batch, training losses, the line of each epoch, and the end of the run. The time that all
trackers take is in `tracking_seconds` of the next line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import SettingsError, reason_of
from common.files import read_lines, write_atomically
from common.packages import is_installed, require
from records.run_data import RunData
from training.console import QUIET, Console
from training.experiment_trackers import MLflow, WeightsAndBiases
from training.tensorboard_tracker import TensorBoard
from training.tracker import Tracker
from training.utilization import Sampler

STEP_POINTS = 1000  # logged training losses per run: more are not distinguishable in a picture
GRADIENT_FACTOR = 5  # logged losses per measured gradient
SHOWN_IMAGES = 64  # of the first batch
REDRAW_SECONDS = 30.0  # minimum time between redraws of curves.png
REDRAW_FACTOR = 300  # and at least this multiple of the time of one redraw: at most 1/300 of the run


class StepLosses(Tracker):
    """steps.jsonl: {"step": 40, "steps": 12, "step_loss": 4.21}, for a picture of training inside an epoch.

    With --log-gradients, some lines also have the numbers of parallel/gradient_log.py for their step.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / "steps.jsonl"
        self._norms: dict[int, dict[str, float]] = {}
        kept = [line for line in read_lines(self.path) if line["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def loss(self, step: int, mean: float, steps: int) -> None:
        with self.path.open("a") as file:
            line = {"step": step, "steps": steps, "step_loss": mean, **self._norms.get(step, {})}
            file.write(json.dumps(line) + "\n")
        self._norms = {later: norms for later, norms in self._norms.items() if later > step}

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        self._norms[step] = norms


class Pictures(Tracker):
    """curves.png during the run, report.html at its end."""

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


class RunIndex(Tracker):
    """index.html of the folder of runs, at the end of the run, also of one that failed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def close(self, failed: bool) -> None:
        from reports.index import index_of, write_index

        write_index(index_of(self.folder))


class Tracking:
    """All trackers of one run, and the time that they take. Without trackers, as outside the main process, it is idle.

    A tracker never ends a run: one that fails (a full disk, a name that cannot be drawn) is disabled with a warning.
    """

    def __init__(
        self,
        trackers: list[Tracker],
        sampler: Sampler | None = None,
        total_steps: int = 0,
        say: Callable[[str], None] = print,
        seconds: float = 0.0,
    ):
        """`seconds` is the time that it took to create the trackers."""
        self.trackers, self.sampler, self.say = trackers, sampler, say
        self.set_total(total_steps)
        self._losses: list[float] = []
        self._last_logged: int | None = None  # the step of the last mean loss
        self._seconds = seconds
        self._sampled = 0.0  # part of the sampler's seconds that take_seconds has returned

    @property
    def reports(self) -> bool:
        """Whether the end of the run writes report.html."""
        return any(isinstance(tracker, Pictures) for tracker in self.trackers)

    def set_total(self, total_steps: int) -> None:
        """Set the number of steps of the run, which decides how many losses each logged mean has."""
        self.total_steps, self.every = total_steps, max(1, total_steps // STEP_POINTS)

    def _notify(self, event: Callable[[Tracker], None]) -> None:
        began = time.perf_counter()
        for tracker in list(self.trackers):
            try:
                event(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                self.say(disabled(type(tracker).__name__, error))
        self._seconds += time.perf_counter() - began

    def first_batch(self, pixels: Callable[[], np.ndarray]) -> None:
        """Log the first images; `pixels` makes them, and is called only where a tracker shows images."""
        if any(type(tracker).batch is not Tracker.batch for tracker in self.trackers):
            shown = pixels()
            self._notify(lambda tracker: tracker.batch(shown))

    def gradients(self, step: int, norms: dict[str, float]) -> None:
        """Receive the norms of a step; call it before `losses` has that step."""
        self._notify(lambda tracker: tracker.gradients(step, norms))

    def losses(self, losses: list[tuple[int, float]]) -> None:
        """Receive steps in order with their training losses; log means of them, about STEP_POINTS per run.

        A step may be missing because it was skipped: the mean is then logged at the next one.
        """
        if not self.trackers:
            return
        for step, loss in losses:
            self._losses.append(loss)
            logged = step - 1 if self._last_logged is None else self._last_logged
            if step // self.every > logged // self.every or step == self.total_steps:
                self._log_loss(step, float(np.mean(self._losses)), len(self._losses))
                self._losses.clear()
                self._last_logged = step

    def _log_loss(self, step: int, mean: float, steps: int) -> None:
        self._notify(lambda tracker: tracker.loss(step, mean, steps))

    def epoch(self, line: dict[str, Any]) -> None:
        self._notify(lambda tracker: tracker.epoch(line))

    def take_seconds(self) -> float:
        """Return the time that tracking has taken since the last call."""
        sampled = self.sampler.seconds if self.sampler else 0.0
        seconds, self._seconds = self._seconds + sampled - self._sampled, 0.0
        self._sampled = sampled
        return seconds

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if self.sampler:
            self.sampler.stop()
        self._notify(lambda tracker: tracker.close(failed=error is not None))


def disabled(name: str, error: Exception) -> str:
    """Return the warning about a tracker that failed."""
    return f"warning: {name} is disabled ({reason_of(error)}); training continues"


def start_tracking(
    folder: Path,
    facts: dict[str, Any],
    step: int,
    screen: Console,
    *,
    tensorboard: bool,
    wandb: str | None,
    mlflow: str | None,
    group: str | None,
    report: bool,
) -> Tracking:
    """Return the trackers of a run that continues after `step`; for the main process.

    Args:
        wandb: project at Weights & Biases, "" for the default project; None for no logging there.
        mlflow: experiment of MLflow; None for no logging there.
        group: of the run at both.
        report: whether to draw curves.png and report.html.

    Raises:
        RunError: Weights & Biases or MLflow cannot be used.
    """
    began = time.perf_counter()
    trackers: list[Tracker] = [StepLosses(folder, step)]
    if tensorboard:
        try:
            trackers.append(TensorBoard(folder, facts, step))
        except Exception as error:  # event files are never worth the run
            screen.say(disabled("TensorBoard", error))
    if wandb is not None:
        trackers.append(WeightsAndBiases(folder, facts, step, wandb or None, screen.level == QUIET, group))
    if mlflow is not None:
        trackers.append(MLflow(folder, facts, step, mlflow, group))
    if report:
        trackers += [Pictures(folder), RunIndex(folder)]
    sampler = Sampler(folder)
    sampler.start()
    return Tracking(trackers, sampler, facts["total_steps"], screen.say, time.perf_counter() - began)


def check_trackers(tensorboard: bool, wandb: str | None, mlflow: str | None = None) -> None:
    """Check before anything else that the needed packages are installed. Raises SettingsError."""
    for package, is_needed in (("wandb", wandb is not None), ("mlflow", mlflow is not None)):
        if is_needed:
            require(package, f"--{package}")
    if tensorboard and not is_installed("tensorboard"):
        raise SettingsError(
            "the package tensorboard is not installed: pip install tensorboard, or add --no-tensorboard"
        )


def gradient_interval(total_steps: int) -> int:
    """Return the number of steps between two measured gradients: about 200 per run, where losses are logged too."""
    return GRADIENT_FACTOR * max(1, total_steps // STEP_POINTS)


def first_images(images: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Return the first images of a normalized batch (B, 3, S, S) as pixels: uint8 (rows, 8, S, S, 3)."""
    from image_data.pixels import denormalize

    pixels = denormalize(images[:SHOWN_IMAGES], mean, std)
    columns = min(8, len(pixels))
    rows = len(pixels) // columns
    return pixels[: rows * columns].reshape(rows, columns, *pixels.shape[1:])
