"""The console output of a run: a summary at the start, one line per epoch, a progress bar on a terminal, the result.

    epoch  3/10  train loss 3.348  test accuracy  25.60% (2560/10000)  563 images/s   89 s  data wait  0.5%  ETA  11 min

A terminal shows colors (unless NO_COLOR is set, https://no-color.org) and a progress bar. A log file gets plain lines,
one every two minutes during a long epoch. Only the main process writes. Everything except the bar goes to stdout.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, TextIO

from common.display import protect_streams
from common.paths import PROJECT, near_path
from common.text import duration, epochs_text
from config.differences import changed_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from parallel.engine import Engine

QUIET, NORMAL, VERBOSE = range(3)
HEARTBEAT_LINE_SECONDS = 120.0  # minimum time between lines of a long epoch in a log file
BOLD, DIM, GREEN, YELLOW = "1", "2", "32", "33"


class Console:
    """Prints the lines of one run; silent in all processes except the main one.

    It never raises: output whose reader is gone (`train.py | head`, a closed terminal) is dropped.
    """

    def __init__(
        self, level: int = NORMAL, is_main: bool = True, out: TextIO | None = None, bars: TextIO | None = None
    ):
        self.level = level if is_main else QUIET
        self.is_main = is_main
        if out is None:
            protect_streams()  # before DeepSpeed is imported, whose logger keeps the stream that it finds
        self.out, self.bars = out or sys.stdout, bars or sys.stderr
        self.has_colors = use_colors(self.out)
        self.clock = Clock()
        self.active_bar: Any = None  # tqdm
        logger = logging.getLogger("engine")
        logger.handlers, logger.propagate = [ConsoleHandler(self)], False
        logger.setLevel(logging.INFO)

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.has_colors else text

    def say(self, text: str, level: int = NORMAL) -> None:
        """Print a line, unless the console's level is lower than `level`."""
        if self.is_main and self.level >= level:
            bar = self.active_bar  # a line may come from the checkpoint's thread while the next epoch is trained
            if bar is not None:
                bar.clear()
            print(text, file=self.out, flush=True)
            if bar is not None:
                bar.refresh()

    def print_field(self, label: str, text: str, level: int = NORMAL) -> None:
        """Print a labeled line: `model     vit, ...`."""
        self.say(f"{self.paint(f'{label:9}', DIM)} {text}", level)

    def print_run(self, run: str, facts: dict[str, Any], side: int, engine: Engine) -> None:
        """Print the summary of a run: folder, dataset, model, batch size, engine; with --verbose changed settings."""
        dataset, model, sizes = facts["dataset"], facts["settings"]["model"], engine.batch_sizes
        parts = (
            f", {model['attention']} attention, {model['feed_forward']} feed-forward"
            if model["architecture"] == "vit"
            else ""
        )
        folder = near_path(PROJECT / dataset["folder"])
        images = ", ".join(f"{count:,} {name}" for name, count in dataset["num_images"].items())
        is_planned = not facts.get("max_minutes") or "plan" in facts
        total, steps = facts["total_steps"], facts["steps_per_epoch"]
        most = f"at most {total:,}, and " if facts.get("only_shortens") else ""
        goal = f"{total:,} in total" if is_planned else f"{most}as many as take {facts['max_minutes']:g} min"
        accumulation = plural(sizes.accumulation, "accumulation step")
        self.print_field("run", run)
        self.print_field(
            "data",
            f"{folder}: {len(dataset['classes'])} classes, {side} x {side} pixels, {images}; {facts['source']} source",
        )
        self.print_field("model", f"{model['architecture']}{parts}: {engine.num_parameters:,} parameters")
        self.print_field(
            "batch",
            f"global batch {sizes.total} = {sizes.micro} per process x {accumulation} x "
            f"{plural(sizes.shards, 'process')}; {steps} steps per epoch, {goal}",
        )
        self.print_field("engine", f"{facts['settings']['strategy']} on {facts['device']}, {engine.describe()}")
        for path, value, default in changed_settings(facts["settings"]):
            self.print_field("setting", f"{path} = {value} (default: {default})", VERBOSE)
        if engine.step:
            self.print_field("resuming", f"after step {engine.step:,}" + f" of {total:,}" * is_planned)

    def bar(self, epoch: int, done: int, total: int, batch: int) -> Bar | LogHeartbeat:
        """Return the progress display of an epoch of `total` steps of `batch` images, of which `done` are trained."""
        shown = self.level > QUIET
        if shown and is_terminal(self.bars):
            return Bar(self, epoch, done, total, batch)
        return LogHeartbeat(self, epoch, done, total, shown)

    def epoch(self, line: dict[str, Any], splits: list[str], last_epoch: int) -> None:
        """Print the line of an epoch, from its line in metrics.jsonl, and with --verbose a second one."""
        left = self.clock.seconds_left()
        fields = [
            self.paint(f"epoch {line['epoch']:>{len(str(last_epoch))}}/{last_epoch}", BOLD),
            *([f"step {line['step']:,}"] if line.get("within_epoch") else []),
            f"train loss {line['train_loss']:.3f}" if "train_loss" in line else "all steps skipped",
            *(self._accuracy(line, split) for split in splits),
            f"{line['images_per_second']:>7,.0f} images/s",
            f"{duration(line['training_seconds']):>6}",
            self._wait(100 * line["data_wait_seconds"] / (line["training_seconds"] or 1.0)),
            *([f"ETA {duration(left):>7}"] if left else []),
        ]
        self.say("  ".join(fields))
        details = [f"learning rate {line['learning_rate']:.3g}"]
        for split in splits:
            top5, seconds = 100 * line[f"{split}_top5_accuracy"], line[f"{split}_seconds"]
            details.append(f"{split} loss {line[f'{split}_loss']:.3f}, top-5 {top5:.2f}%, evaluated in {seconds:.1f} s")
        details.append(f"memory {line['memory_gib']:.2f} GiB")
        details.append(f"logging overhead {line['tracking_seconds']:.2f} s")
        self.say(self.paint("      " + "  ".join(details), DIM), VERBOSE)

    def _accuracy(self, line: dict[str, Any], split: str) -> str:
        """Return the accuracy of a split; where the run keeps an EMA, of the EMA weights and of the raw weights."""
        seen = str(line[f"{split}_seen"])
        counts = f"({line[f'{split}_correct']}/{seen})".rjust(2 * len(seen) + 3)
        ema, raw = "", ""
        if f"{split}_raw_accuracy" in line:
            ema, raw = "EMA ", f", raw {100 * line[f'{split}_raw_accuracy']:6.2f}%"
        accuracy = self.paint(f"{100 * line[f'{split}_accuracy']:6.2f}%", BOLD)
        return f"{split} accuracy {ema}{accuracy} {counts}{raw}"

    def _wait(self, percent: float) -> str:
        text = f"data wait {percent:4.1f}%"
        return self.paint(text, YELLOW) if percent >= 10 else text

    def result(self, line: dict[str, Any], steps_per_epoch: int, where: str) -> None:
        """Print the last line of a finished run, with the path to look at; with --quiet, the only one.

        Args:
            line: the last of metrics.jsonl.
        """
        split = "test" if "test_accuracy" in line else "validation"
        accuracy = self.paint(f"{100 * line[f'{split}_accuracy']:.2f}%", BOLD)
        counts = f"({line[f'{split}_correct']}/{line[f'{split}_seen']})"
        self.say(
            f"{self.paint('done     ', GREEN)} {split} accuracy {accuracy} {counts} "
            f"after {epochs_text(line['step'], steps_per_epoch)}; see {where}",
            QUIET,
        )


class ConsoleHandler(logging.Handler):
    """Prints the log messages of engines through the console, so that --quiet silences them."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(record.getMessage())


class Clock:
    """Estimates the remaining time of a run from the time per step in this process, evaluation included."""

    def __init__(self) -> None:
        self.start(0, 0)

    def start(
        self, step: int, total_steps: int, work: Callable[[int, int], float] = lambda step, total_steps: step
    ) -> None:
        """Start before the step after `step`.

        Args:
            work: returns what the first `step` of `total_steps` steps cost (default: all steps cost the same).
        """
        self.first, self.step, self.total, self.began, self.work = step, step, total_steps, time.monotonic(), work

    def seconds_left(self) -> float:
        """Return the estimated remaining time, or 0 before the first step and after the last."""
        first, now, last = (self.work(step, self.total) for step in (self.first, self.step, self.total))
        return (time.monotonic() - self.began) * (last - now) / (now - first) if now > first else 0.0


class Bar:
    """A progress bar over the images of an epoch, with the ETA of the epoch and of the run."""

    def __init__(self, console: Console, epoch: int, done: int, total: int, batch: int):
        from tqdm import tqdm

        self.console, self.clock, self.batch = console, console.clock, batch
        self.bar = tqdm(
            total=total * batch,
            initial=done * batch,
            desc=f"epoch {epoch}",
            unit=" images",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            file=console.bars,
        )

    def __enter__(self) -> Bar:
        self.console.active_bar = self.bar
        return self

    def __exit__(self, *error: Any) -> None:
        self.console.active_bar = None
        self.bar.close()

    def loss(self, value: float) -> None:
        left = self.clock.seconds_left()
        self.bar.set_postfix_str(f"loss {value:.3f}" + (f", run ETA {duration(left)}" if left else ""), refresh=False)

    def advance(self) -> None:
        self.clock.step += 1
        self.bar.update(self.batch)


class LogHeartbeat:
    """Replaces the bar where there is no terminal: one line every two minutes shows that the run is alive."""

    def __init__(self, console: Console, epoch: int, done: int, total: int, shown: bool):
        self.console, self.epoch, self.done, self.total, self.shown = console, epoch, done, total, shown
        self.said = time.monotonic()

    def __enter__(self) -> LogHeartbeat:
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    def loss(self, value: float) -> None:
        if self.shown and time.monotonic() - self.said > HEARTBEAT_LINE_SECONDS:
            self.said = time.monotonic()
            self.console.say(
                f"  in epoch {self.epoch}: step {self.done} of {self.total}, train loss {value:.3f}, "
                f"ETA {duration(self.console.clock.seconds_left())}"
            )

    def advance(self) -> None:
        self.console.clock.step += 1
        self.done += 1


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def use_colors(stream: TextIO) -> bool:
    """Return whether to print colors: on a terminal, unless NO_COLOR is set."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def plural(count: int, noun: str) -> str:
    """Return a count with its noun: 1 process, 2 processes."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}{'es' if noun.endswith('s') else 's'}"


def show_library_logs() -> None:
    """Show the log messages and warnings of libraries (--verbose). Call it before they are imported and log."""
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.INFO)
    warnings.simplefilter("default")
