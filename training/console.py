"""What a person sees of a run: a few lines at the start, a line an epoch, a progress bar on a terminal, the result.

    epoch  3/10  train loss 3.348  test accuracy  25.60% (2560/10000)     563 images/s    89 s  data wait  0.5%  left  11 min

On a terminal there are colours (unless NO_COLOR is set, https://no-color.org) and a bar; in a log file there are plain lines, and
during a long epoch one every two minutes. Only the main process writes. Everything but the bar goes to stdout.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any, TextIO

from common.text import duration
from config.differences import changed_settings

if TYPE_CHECKING:
    from parallel.engine import Engine

QUIET, NORMAL, VERBOSE = range(3)
HEARTBEAT_LINE_SECONDS = 120.0  # between lines of a long epoch in a log file
BOLD, DIM, GREEN, YELLOW = "1", "2", "32", "33"


class Console:
    """The lines of one run. In a process that is not the main one it says nothing."""

    def __init__(
        self, level: int = NORMAL, is_main: bool = True, out: TextIO | None = None, bars: TextIO | None = None
    ):
        self.level = level if is_main else QUIET
        self.is_main = is_main
        self.out, self.bars = out or sys.stdout, bars or sys.stderr
        self.colours = use_colours(self.out)
        self.clock = Clock()
        logger = logging.getLogger("engine")
        logger.handlers, logger.propagate = [ConsoleHandler(self)], False
        logger.setLevel(logging.INFO)

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colours else text

    def say(self, text: str, level: int = NORMAL) -> None:
        """A line for those who want that much."""
        if self.is_main and self.level >= level:
            print(text, file=self.out, flush=True)

    def print_field(self, label: str, text: str, level: int = NORMAL) -> None:
        """A line of the head: `model     vit, ...`."""
        self.say(f"{self.paint(f'{label:9}', DIM)} {text}", level)

    def print_run(self, folder: str, facts: dict[str, Any], side: int, engine: Engine) -> None:
        """The head of a run: where it writes, what it trains, on what, and what differs from the defaults."""
        dataset, model, sizes = facts["dataset"], facts["settings"]["model"], engine.batch_sizes
        parts = (
            f", {model['attention']} attention, {model['feed_forward']} feed-forward"
            if model["architecture"] == "vit"
            else ""
        )
        images = ", ".join(f"{count:,} {name}" for name, count in dataset["num_images"].items())
        self.print_field("run", folder)
        self.print_field(
            "data",
            f"{dataset['folder']}: {len(dataset['classes'])} classes, {side} x {side} pixels, {images}; {facts['source']} source",
        )
        self.print_field("model", f"{model['architecture']}{parts}: {engine.num_parameters:,} parameters")
        self.print_field(
            "batch",
            f"{sizes.total} = {sizes.micro} x {sizes.accumulation} accumulated x {sizes.shards} processes; "
            f"{facts['steps_per_epoch']} steps an epoch, {facts['total_steps']:,} in all",
        )
        self.print_field("engine", f"{facts['settings']['strategy']} on {facts['device']}, {engine.describe()}")
        for path, value, default in changed_settings(facts["settings"]):
            self.print_field("setting", f"{path} = {value} (default: {default})", VERBOSE)
        if engine.step:
            self.print_field("resuming", f"after step {engine.step:,} of {facts['total_steps']:,}")

    def bar(self, epoch: int, done: int, total: int, batch: int) -> Bar | LogHeartbeat:
        """What shows the way through an epoch of `total` steps of `batch` images, `done` of them made already."""
        shown = self.level > QUIET
        if shown and is_terminal(self.bars):
            return Bar(self, epoch, done, total, batch)
        return LogHeartbeat(self, epoch, done, total, shown)

    def epoch(self, line: dict[str, Any], splits: list[str], last_epoch: int) -> None:
        """The line of an epoch, from its numbers in metrics.jsonl."""
        left = self.clock.seconds_left()
        self.say(
            "  ".join(
                [
                    self.paint(f"epoch {line['epoch']:>{len(str(last_epoch))}}/{last_epoch}", BOLD),
                    f"train loss {line['train_loss']:.3f}",
                    *(self._accuracy(line, split) for split in splits),
                    f"{line['images_per_second']:>7,.0f} images/s",
                    f"{duration(line['training_seconds']):>6}",
                    self._wait(100 * line["data_wait_seconds"] / (line["training_seconds"] or 1.0)),
                    *([f"left {duration(left):>7}"] if left else []),
                ]
            )
        )
        self.say(
            self.paint(
                "      "
                + "  ".join(
                    [
                        f"learning rate {line['learning_rate']:.3g}",
                        *(
                            f"{split} loss {line[f'{split}_loss']:.3f}, top 5 {100 * line[f'{split}_top5_accuracy']:.2f}%, "
                            f"counted in {line[f'{split}_seconds']:.1f} s"
                            for split in splits
                        ),
                        f"memory {line['memory_gib']:.2f} GiB",
                        f"watching cost {line['tracking_seconds']:.2f} s",
                    ]
                ),
                DIM,
            ),
            VERBOSE,
        )

    def _accuracy(self, line: dict[str, Any], split: str) -> str:
        seen = str(line[f"{split}_seen"])
        counts = f"({line[f'{split}_correct']}/{seen})".rjust(2 * len(seen) + 3)
        raw = (
            f", trained weights {100 * line[f'{split}_raw_accuracy']:6.2f}%" if f"{split}_raw_accuracy" in line else ""
        )
        return f"{split} accuracy " + self.paint(f"{100 * line[f'{split}_accuracy']:6.2f}%", BOLD) + f" {counts}{raw}"

    def _wait(self, percent: float) -> str:
        text = f"data wait {percent:4.1f}%"
        return self.paint(text, YELLOW) if percent >= 10 else text

    def result(self, line: dict[str, Any], folder: str) -> None:
        """The last line of a finished run; with --quiet the only one."""
        split = "test" if "test_accuracy" in line else "validation"
        accuracy = self.paint(f"{100 * line[f'{split}_accuracy']:.2f}%", BOLD)
        epochs = f"{line['epoch']} epoch{'s' * (line['epoch'] > 1)}"
        self.say(
            f"{self.paint('done     ', GREEN)} {split} accuracy {accuracy} ({line[f'{split}_correct']}/{line[f'{split}_seen']}) "
            f"after {epochs}; see {folder}/report.html",
            QUIET,
        )


class ConsoleHandler(logging.Handler):
    """Shows what engines log as lines of the console, so that --quiet silences them too."""

    def __init__(self, console: Console):
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(record.getMessage())


class Clock:
    """How long the rest of a run takes, from how long its steps took so far in this process, evaluation and all."""

    def __init__(self) -> None:
        self.start(0, 0)

    def start(self, step: int, total_steps: int) -> None:
        self.first, self.step, self.total, self.began = step, step, total_steps, time.monotonic()

    def seconds_left(self) -> float:
        """0 where nothing is left or nothing is known."""
        done = self.step - self.first
        return (time.monotonic() - self.began) / done * (self.total - self.step) if done else 0.0


class Bar:
    """A progress bar over the images of an epoch, with the time that is left of the epoch and of the run."""

    def __init__(self, console: Console, epoch: int, done: int, total: int, batch: int):
        from tqdm import tqdm

        self.clock, self.batch = console.clock, batch
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
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def loss(self, value: float) -> None:
        left = self.clock.seconds_left()
        self.bar.set_postfix_str(
            f"loss {value:.3f}" + (f", run done in {duration(left)}" if left else ""), refresh=False
        )

    def advance(self) -> None:
        self.clock.step += 1
        self.bar.update(self.batch)


class LogHeartbeat:
    """In place of a bar where there is no terminal: a line every two minutes, so that a log file shows that the run is alive."""

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
                f"left {duration(self.console.clock.seconds_left())}"
            )

    def advance(self) -> None:
        self.console.clock.step += 1
        self.done += 1


def is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def use_colours(stream: TextIO) -> bool:
    """Colours belong on a terminal, of a person who has not asked for none."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR")


def show_library_logs() -> None:
    """For --verbose: let libraries tell their story too. To be called when they are imported, which sets their own levels."""
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.INFO)
    warnings.simplefilter("default")
