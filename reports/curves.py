"""Figures of training: loss, accuracy, learning rate and speed over the epochs of one run or of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.display import printable
from common.text import shorten
from config.settings import Settings
from optim.lr_schedule import Schedule
from records.own_part_files import kept_settings
from records.run_data import RunData
from reports.style import BLACK, BLUE, COLORS, ORANGE, SKY, SPLITS, finish, make_figure, set_epoch_axis, set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ["-", "--", ":", "-."]
MAX_MARKED_POINTS = 30  # with more, a marker on each point hides the line
LEARNING_RATE_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line of a figure. A line of one point is drawn as a dot."""

    label: str
    x: list[float]
    y: list[float]
    color: str
    style: str = "-"
    width: float = 1.6

    def draw(self, axes: Any) -> None:
        size = 3.5 if len(self.x) <= MAX_MARKED_POINTS else 2
        is_marked = len(self.x) == 1 or (len(self.x) <= 2 * MAX_MARKED_POINTS and self.width > 1)
        marker = "o" if is_marked else ""
        axes.plot(self.x, self.y, self.style, color=self.color, lw=self.width, marker=marker, ms=size, label=self.label)

    def annotate_last(self, axes: Any) -> None:
        """Write the last value next to its point."""
        at = self.x[-1], self.y[-1]
        axes.annotate(f"{at[1]:.1f}", at, (-5, 5), textcoords="offset points", ha="right", fontsize=9, color=self.color)


def loss_lines(run: RunData) -> list[Line]:
    """Return the lines of all recorded losses, in nats."""
    period = "since the last point" if any("within_epoch" in line for line in run.metrics) else "of the epoch"
    lines = [
        Line("training, by step", *run.step_losses(), SKY, width=0.8),
        Line(f"training, mean {period}", *run.series("train_loss"), BLUE),
    ]
    for split, color in SPLITS.items():
        lines += _by_weights(run, split, split, "loss", color, 1.0)
    return [line for line in lines if line.x]


def accuracy_lines(run: RunData) -> list[Line]:
    """Return the lines of all recorded accuracies, in percent; top-5 only where there are more than five classes."""
    lines = []
    for split, color in SPLITS.items():
        lines += _by_weights(run, split, f"{split}, top-1", "accuracy", color, 100.0)
        if run.has_top5:
            lines.append(Line(f"{split}, top-5", *run.series(f"{split}_top5_accuracy", 100.0), color, "--", 1.1))
    return [line for line in lines if line.x]


def _by_weights(run: RunData, split: str, name: str, what: str, color: str, factor: float) -> list[Line]:
    """Return one line, or two where the run keeps an exponential moving average: EMA weights and raw weights."""
    raw = Line(f"{name}, raw weights", *run.series(f"{split}_raw_{what}", factor), color, ":")
    label = f"{name}, EMA weights" if raw.x else name
    return [Line(label, *run.series(f"{split}_{what}", factor), color), raw]


def training(run: RunData) -> Figure:
    """Draw the losses on the left and the accuracies on the right."""
    figure, ((left, right),) = make_figure(10, 4, 1, 2)
    for axes, lines in ((left, loss_lines(run)), (right, accuracy_lines(run))):
        for line in lines:
            line.draw(axes)
        set_epoch_axis(axes, run.last_epoch)
    for line in accuracy_lines(run):
        if line.style != ":":
            line.annotate_last(right)
    if len(run.metrics) == 1:
        right.set_ylim(0, 100)
    finish(left, ylabel="cross-entropy (nats)")
    finish(right, ylabel="accuracy (%)")
    if not right.lines:
        right.text(0.5, 0.5, "not evaluated yet", transform=right.transAxes, ha="center", color="0.4")
    set_title(figure, printable(run.headline()))
    return figure


def learning_rate(run: RunData) -> Line:
    """Return the learning rate at every step so far, from the schedule; metrics.jsonl has only one per epoch."""
    settings, per_epoch = Settings.from_dict(kept_settings(run.folder, run.facts)), run.facts["steps_per_epoch"]
    schedule = Schedule(settings.schedule, run.facts["total_steps"], run.facts.get("plan"))
    done = round(run.last_epoch * per_epoch)
    steps = sorted({*range(0, done, max(1, done // LEARNING_RATE_POINTS)), *(line["step"] - 1 for line in run.metrics)})
    peak = settings.engine["optimizer"]["params"]["lr"]
    return Line(
        "learning rate", [(step + 1) / per_epoch for step in steps], [peak * schedule(step) for step in steps], BLACK
    )


def speed(run: RunData) -> Figure:
    """Draw learning rate, throughput, and the share of the training time in which a step waited for a batch."""
    figure, ((rate, images, wait),) = make_figure(10, 3, 1, 3)
    # training_seconds may be rounded to 0 in a very short epoch
    waits = [100 * line["data_wait_seconds"] / (line["training_seconds"] or 1.0) for line in run.metrics]
    epochs, throughput = run.series("images_per_second")
    learning_rate(run).draw(rate)
    Line("images", epochs, throughput, BLUE).draw(images)
    Line("wait", epochs, waits, ORANGE).draw(wait)
    for axes in (rate, images, wait):
        set_epoch_axis(axes, run.last_epoch)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    finish(rate, ylabel="learning rate", ylim=(0, None))
    finish(images, ylabel="training throughput (images/s)", ylim=(0, 1.15 * max(throughput, default=1) or 1))
    finish(wait, ylabel="data wait (% of training time)", ylim=(0, max(5.0, 1.15 * max(waits, default=0))))
    set_title(figure, f"{printable(run.name)}: learning rate and speed by epoch")
    return figure


def several(runs: list[RunData], names: list[str]) -> Figure:
    """Draw training loss and accuracy of several runs, one color per run.

    The accuracy is that on the validation split where all runs have one, and else that on the test split.
    """
    names = [shorten(printable(name), 60) for name in names]
    columns = max(1, min(len(runs), 120 // (max(map(len, names)) + 6)))  # of the legend
    figure, ((left, right),) = make_figure(11, 4.1 + 0.22 * -(-len(runs) // columns), 1, 2)
    split = "validation" if all("validation_accuracy" in run.metrics[-1] for run in runs) else "test"
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        look: dict[str, Any] = dict(color=COLORS[i % len(COLORS)], style=DASHES[i // len(COLORS) % len(DASHES)])
        Line(name, *run.series("train_loss"), **look).draw(left)
        Line(name, *run.series(f"{split}_accuracy", 100.0), **look).draw(right)
    for axes in (left, right):
        set_epoch_axis(axes, max(run.last_epoch for run in runs))
    finish(left, ylabel="training loss (nats)")
    finish(right, ylabel=f"{split} accuracy (%)")
    for axes in (left, right):
        if axes.get_legend():
            axes.get_legend().remove()
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure
