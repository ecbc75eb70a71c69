"""Pictures of training: loss and accuracy, learning rate and speed, over the epochs of one run or of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.text import shorten
from config.settings import Settings
from optim.lr_schedule import Schedule
from records.run_data import RunData
from reports.style import BLACK, BLUE, COLOURS, ORANGE, SKY, SPLITS, finish, make_figure, set_title, whole_epochs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ["-", "--", ":", "-."]
DOTTED_UP_TO = 30  # points: with more, a marker on each hides the line
LEARNING_RATE_POINTS = 400


@dataclass(frozen=True)
class Line:
    """What one line of a picture shows."""

    label: str
    x: list[float]
    y: list[float]
    colour: str
    style: str = "-"
    width: float = 1.6

    def draw(self, axes: Any) -> None:
        size = 3.5 if len(self.x) <= DOTTED_UP_TO else 2
        marker = "o" if len(self.x) <= 2 * DOTTED_UP_TO and self.width > 1 else ""
        axes.plot(
            self.x, self.y, self.style, color=self.colour, lw=self.width, marker=marker, ms=size, label=self.label
        )

    def tell_last(self, axes: Any) -> None:
        """Write the last value beside its point."""
        at = self.x[-1], self.y[-1]
        axes.annotate(
            f"{at[1]:.1f}", at, (-5, 5), textcoords="offset points", ha="right", fontsize=9, color=self.colour
        )


def loss_lines(run: RunData) -> list[Line]:
    """The losses that there are, in nats."""
    lines = [
        Line("training, by step", *run.step_losses(), SKY, width=0.8),
        Line("training (augmented)", *run.series("train_loss"), BLUE),
    ]
    for split, (name, colour) in SPLITS.items():
        lines += _of_weights(run, split, name, "loss", colour, 1.0)
    return [line for line in lines if line.x]


def accuracy_lines(run: RunData) -> list[Line]:
    """The accuracies that there are, in per cent; top 5 only where there are more than five classes."""
    lines = []
    for split, (name, colour) in SPLITS.items():
        lines += _of_weights(run, split, f"{name}, top 1", "accuracy", colour, 100.0)
        if run.num_classes > 5:
            lines.append(Line(f"{name}, top 5", *run.series(f"{split}_top5_accuracy", 100.0), colour, "--", 1.1))
    return [line for line in lines if line.x]


def _of_weights(run: RunData, split: str, name: str, what: str, colour: str, factor: float) -> list[Line]:
    """One line, or two where the weights were averaged: of the average, and of the weights that are trained."""
    trained = Line(f"{name}, trained weights", *run.series(f"{split}_raw_{what}", factor), colour, ":")
    label = f"{name}, averaged weights (EMA)" if trained.x else name
    return [Line(label, *run.series(f"{split}_{what}", factor), colour), trained]


def training(run: RunData) -> Figure:
    """Loss on the left, accuracy on the right."""
    figure, ((left, right),) = make_figure(10, 4, 1, 2)
    for axes, lines in ((left, loss_lines(run)), (right, accuracy_lines(run))):
        for line in lines:
            line.draw(axes)
        whole_epochs(axes, run.last_epoch)
    for line in accuracy_lines(run):
        if line.style != ":":
            line.tell_last(right)
    if len(run.metrics) == 1:
        right.set_ylim(0, 100)
    finish(left, ylabel="cross-entropy (nats)")
    finish(right, ylabel="accuracy (%)")
    if not right.lines:
        right.text(0.5, 0.5, "nothing evaluated yet", transform=right.transAxes, ha="center", color="0.4")
    set_title(figure, run.headline())
    return figure


def learning_rate(run: RunData) -> Line:
    """The rate at every step so far, from the schedule; metrics.jsonl has it at the end of each epoch."""
    settings, per_epoch = Settings.from_dict(run.facts["settings"]), run.facts["steps_per_epoch"]
    schedule = Schedule(settings.schedule, run.facts["total_steps"])
    done = round(run.last_epoch * per_epoch)
    steps = sorted({*range(0, done, max(1, done // LEARNING_RATE_POINTS)), *(line["step"] - 1 for line in run.metrics)})
    peak = settings.engine["optimizer"]["params"]["lr"]
    return Line(
        "learning rate", [(step + 1) / per_epoch for step in steps], [peak * schedule(step) for step in steps], BLACK
    )


def speed(run: RunData) -> Figure:
    """Learning rate, throughput, and how much of the training time was spent waiting for data."""
    figure, ((rate, images, wait),) = make_figure(10, 3, 1, 3)
    waits = [100 * line["data_wait_seconds"] / line["training_seconds"] for line in run.metrics]
    epochs, throughput = run.series("images_per_second")
    learning_rate(run).draw(rate)
    Line("images", epochs, throughput, BLUE).draw(images)
    Line("wait", epochs, waits, ORANGE).draw(wait)
    for axes in (rate, images, wait):
        whole_epochs(axes, run.last_epoch)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    finish(rate, ylabel="learning rate", ylim=(0, None))
    finish(images, ylabel="training images a second", ylim=(0, 1.15 * max(throughput, default=1)))
    finish(wait, ylabel="waiting for data (% of training)", ylim=(0, max(5.0, 1.15 * max(waits, default=0))))
    set_title(figure, f"{run.name}: learning rate and speed, by epoch")
    return figure


def several(runs: list[RunData], names: list[str]) -> Figure:
    """Several runs in one picture: training loss, and accuracy on the split they are judged by; same colour, same run."""
    names = [shorten(name, 60) for name in names]
    columns = max(1, min(len(runs), 120 // (max(map(len, names)) + 6)))  # of the legend
    figure, ((left, right),) = make_figure(11, 4.1 + 0.22 * -(-len(runs) // columns), 1, 2)
    judged = ["validation" if all("validation_accuracy" in run.metrics[-1] for run in runs) else "test"] * len(runs)
    for i, (run, name, split) in enumerate(zip(runs, names, judged, strict=True)):
        look = dict(colour=COLOURS[i % len(COLOURS)], style=DASHES[i // len(COLOURS) % len(DASHES)])
        Line(name, *run.series("train_loss"), **look).draw(left)
        Line(name, *run.series(f"{split}_accuracy", 100.0), **look).draw(right)
    for axes in (left, right):
        whole_epochs(axes, max(run.last_epoch for run in runs))
    finish(left, ylabel="training loss, augmented images (nats)")
    finish(right, ylabel=f"accuracy, {SPLITS[judged[0]][0]} (%)")
    for axes in (left, right):
        if axes.get_legend():
            axes.get_legend().remove()
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )
    return figure
