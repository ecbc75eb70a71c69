"""reports/curves.py and utilization.py: figures show the numbers of the run.

Figures are checked by their data (lines, bars, cells), not by their pixels. Run: python -m pytest tests/reports
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_data import drawn, with_metrics

from common.text import duration
from reports import curves
from reports.page import page
from reports.pictures import pictures_of
from reports.style import in_time_unit
from reports.utilization import binned, utilization


def test_curves_show_the_metrics(done):
    loss, accuracy = curves.training(done).axes
    epochs = list(range(1, len(done.metrics) + 1))
    assert drawn(loss)["training, mean of the epoch"] == (epochs, [line["train_loss"] for line in done.metrics])
    assert drawn(loss)["test"] == (epochs, [line["test_loss"] for line in done.metrics])
    assert drawn(accuracy)["test, top-1"] == (epochs, [100 * line["test_accuracy"] for line in done.metrics])
    assert drawn(accuracy)["test, top-5"] == (epochs, [100 * line["test_top5_accuracy"] for line in done.metrics])
    assert loss.get_ylabel() == "cross-entropy (nats)" and accuracy.get_ylabel() == "accuracy (%)"


def test_losses_by_step_are_those_of_the_epochs(done):
    """Every step has its loss in the picture, and an epoch's mean is the loss that metrics.jsonl has."""
    per_epoch = done.facts["steps_per_epoch"]
    assert [line["step"] for line in done.steps] == list(range(1, len(done.metrics) * per_epoch + 1))
    x, y = drawn(curves.training(done).axes[0])["training, by step"]
    assert x == [line["step"] / per_epoch for line in done.steps]
    means = np.reshape(y, (-1, per_epoch)).mean(axis=1)
    assert means == pytest.approx([line["train_loss"] for line in done.metrics], abs=1e-6)


def test_ema_and_raw_weights_have_one_line_each(done):
    raw = [0.01 * i for i in range(len(done.metrics))]
    lines = {line.label: line for line in curves.accuracy_lines(with_metrics(done, test_raw_accuracy=raw))}
    assert lines["test, top-1, raw weights"].y == pytest.approx([100 * value for value in raw])
    assert lines["test, top-1, EMA weights"].y == [100 * line["test_accuracy"] for line in done.metrics]
    assert not any("weights" in line.label for line in curves.accuracy_lines(done))


def test_the_validation_split_has_a_curve_and_the_test_split_a_point(done):
    count = len(done.metrics)
    once = [
        {key: value for key, value in line.items() if i == count - 1 or not key.startswith("test_")}
        for i, line in enumerate(done.metrics)
    ]
    run = with_metrics(
        replace(done, metrics=once), validation_accuracy=[0.3] * count, validation_top5_accuracy=[0.6] * count
    )
    lines = {line.label: line for line in curves.accuracy_lines(run)}
    assert lines["validation, top-1"].y == [30.0] * count
    assert (lines["test, top-1"].x, lines["test, top-1"].y) == ([count], [100 * done.metrics[-1]["test_accuracy"]])


def test_a_run_of_half_an_epoch_has_a_point_there(done):
    step = done.facts["steps_per_epoch"] // 2
    short = replace(done, metrics=[{**done.metrics[0], "step": step}], steps=[])
    assert short.last_epoch == pytest.approx(0.5) and drawn(curves.training(short).axes[1])["test, top-1"][0] == [0.5]
    assert short.headline().endswith("after 0.5 epochs")


def test_the_learning_rate_agrees_with_the_metrics(done):
    line = curves.learning_rate(done)
    at = dict(zip(line.x, line.y, strict=True))
    assert [at[entry["epoch"]] for entry in done.metrics] == pytest.approx(
        [entry["learning_rate"] for entry in done.metrics]
    )


def test_speed_shows_throughput_and_data_wait(done):
    _, throughput, wait = curves.speed(done).axes
    assert drawn(throughput)["images"][1] == [line["images_per_second"] for line in done.metrics]
    assert drawn(wait)["wait"][1] == [
        100 * line["data_wait_seconds"] / line["training_seconds"] for line in done.metrics
    ]


def test_several_runs_have_their_own_lines(done):
    other = with_metrics(replace(done, name="other"), test_accuracy=[0.5] * len(done.metrics))
    _, accuracy = curves.several([done, other], ["this", "that"]).axes
    assert drawn(accuracy)["that"][1] == [50.0] * len(done.metrics)
    assert drawn(accuracy)["this"][1] == [100 * line["test_accuracy"] for line in done.metrics]
    assert len({(line.get_color(), line.get_linestyle()) for line in accuracy.lines}) == 2


# --- hardware utilization -----------------------------------------------------------------------------------------


def sample(seconds: float, cpu: float, gpus: list[float | None]) -> dict:
    return {
        "seconds": seconds,
        "cpu_percent": cpu,
        "ram_gib": 8.0,
        "process_ram_gib": 2.0,
        "gpu_percent": gpus,
        "gpu_memory_gib": [3.0] * len(gpus),
    }


def test_utilization_shows_every_sample_of_a_short_run():
    busy, memory = utilization([sample(2.0 * i, 10.0 * i, [50.0 + i, None]) for i in range(1, 6)], "title").axes
    assert drawn(busy)["CPU, all cores"] == ([2, 4, 6, 8, 10], [10, 20, 30, 40, 50])
    assert drawn(busy)["GPU 0"][1] == [51, 52, 53, 54, 55] and "GPU 1" not in drawn(busy)
    assert (
        drawn(memory)["GPU 1"][1] == [3.0] * 5
        and memory.get_xlabel() == "running time (seconds)"
        and memory.get_ylabel() == "memory used (GiB)"
    )


def test_many_samples_and_many_gpus_are_drawn_as_mean_and_range():
    x, mean, low, high = binned(np.arange(10.0), np.array([[i, i + 2.0] for i in range(10)]), most=5)
    assert (list(x), list(mean)) == ([0.5, 2.5, 4.5, 6.5, 8.5], [1.5, 3.5, 5.5, 7.5, 9.5])
    assert (list(low), list(high)) == ([0, 2, 4, 6, 8], [3, 5, 7, 9, 11])
    assert np.isnan(binned(np.arange(2.0), np.full((2, 1), np.nan))[1]).all()
    busy = utilization([sample(1.0, 1.0, [10.0] * 4 + [30.0] * 4)] * 2, "title").axes[0]
    assert drawn(busy)["8 GPUs, mean and range"][1] == [20.0, 20.0]


def test_times_have_a_suitable_unit():
    assert in_time_unit([0, 120]) == ([0, 120], "seconds")
    assert in_time_unit([0, 600]) == ([0, 10], "minutes") and in_time_unit([0, 36000]) == ([0, 10], "hours")
    assert [duration(seconds) for seconds in (7.4, 99, 120, 5000, 11_100)] == [
        "7 s",
        "99 s",
        "2 min",
        "83 min",
        "3 h 05 min",
    ]


def test_a_line_of_one_point_is_a_dot(done):
    short = replace(done, metrics=done.metrics[:1], steps=done.steps[:1])
    for axes in (*curves.training(short).axes, *curves.speed(short).axes):
        for line in axes.lines:
            assert len(line.get_xdata()) > 1 or line.get_marker() == "o"
    assert "training, by step" in drawn(curves.training(short).axes[0])


def test_an_epoch_of_zero_seconds_has_a_report(done):
    zero = {"training_seconds": 0.0, "images_per_second": 0.0, "data_wait_seconds": 0.0}
    run = replace(done, metrics=[{**done.metrics[0], **zero}])
    assert drawn(curves.speed(run).axes[2])["wait"][1] == [0.0]
    page(run, None, pictures_of(run, None))
