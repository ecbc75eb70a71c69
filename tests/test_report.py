"""report.py and reports/: what pictures show is what the run says; the page needs nothing from elsewhere.

Pictures are asked for their data (lines, bars, cells), never for pixels. Run: python -m pytest tests/test_report.py
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import run as run_script
from small_runs import TEST_PER_CLASS

import report
from common.files import read_lines
from common.text import duration, shorten
from config.differences import changed_settings
from config.settings import ModelSettings
from model import build_model
from models.attention import ATTENTIONS
from models.pooling import POOLINGS
from records.run_data import RunData
from records.run_folder import RunFolder
from reports import classes, curves, images
from reports import utilization as machine
from reports.cifar100_superclasses import SUPERCLASSES, groups_of
from reports.page import page
from reports.pictures import SplitAnalysis, pictures_of
from reports.predictions import Predictions, attention_maps, attention_weights
from reports.style import in_time_unit

CIFAR_100 = sorted(name for members in SUPERCLASSES.values() for name in members)


@pytest.fixture(scope="module")
def done(unbroken) -> RunData:
    return RunData.read(unbroken.folder)


@pytest.fixture(scope="module")
def copied(unbroken, tmp_path_factory) -> RunFolder:
    """The finished run, in a folder that may be written to."""
    folder = tmp_path_factory.mktemp("reported") / "mine"
    return RunFolder(
        Path(shutil.copytree(unbroken.folder, folder, ignore=shutil.ignore_patterns("state", "report.html")))
    )


@pytest.fixture(scope="module")
def seen(done, shapes) -> SplitAnalysis:
    args = SimpleNamespace(split=None, data_dir=shapes, weights="weights.safetensors", batch_size=16, source="auto")
    return report.inspect(done, args)


def drawn(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> what the line of that label shows."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def with_metrics(run: RunData, **columns: list[float]) -> RunData:
    """The run with further columns in its metrics."""
    metrics = [
        {**line, **{key: values[i] for key, values in columns.items() if values[i] is not None}}
        for i, line in enumerate(run.metrics)
    ]
    return replace(run, metrics=metrics)


# --- curves -------------------------------------------------------------------------------------------------------


def test_curves_show_the_metrics(done):
    loss, accuracy = curves.training(done).axes
    epochs = list(range(1, len(done.metrics) + 1))
    assert drawn(loss)["training (augmented)"] == (epochs, [line["train_loss"] for line in done.metrics])
    assert drawn(loss)["test"] == (epochs, [line["test_loss"] for line in done.metrics])
    assert drawn(accuracy)["test, top 1"] == (epochs, [100 * line["test_accuracy"] for line in done.metrics])
    assert drawn(accuracy)["test, top 5"] == (epochs, [100 * line["test_top5_accuracy"] for line in done.metrics])
    assert loss.get_ylabel() == "cross-entropy (nats)" and accuracy.get_ylabel() == "accuracy (%)"


def test_losses_by_step_are_those_of_the_epochs(done):
    """Every step has its loss in the picture, and an epoch's mean is the loss that metrics.jsonl has."""
    per_epoch = done.facts["steps_per_epoch"]
    assert [line["step"] for line in done.steps] == list(range(1, len(done.metrics) * per_epoch + 1))
    x, y = drawn(curves.training(done).axes[0])["training, by step"]
    assert x == [line["step"] / per_epoch for line in done.steps]
    means = np.reshape(y, (-1, per_epoch)).mean(axis=1)
    assert means == pytest.approx([line["train_loss"] for line in done.metrics], abs=1e-6)


def test_averaged_and_trained_weights_have_a_line_each(done):
    raw = [0.01 * i for i in range(len(done.metrics))]
    lines = {line.label: line for line in curves.accuracy_lines(with_metrics(done, test_raw_accuracy=raw))}
    assert lines["test, top 1, trained weights"].y == pytest.approx([100 * value for value in raw])
    assert lines["test, top 1, averaged weights (EMA)"].y == [100 * line["test_accuracy"] for line in done.metrics]
    assert not any("weights" in line.label for line in curves.accuracy_lines(done))


def test_a_held_out_part_has_a_curve_and_the_test_split_a_point(done):
    count = len(done.metrics)
    once = [
        {key: value for key, value in line.items() if i == count - 1 or not key.startswith("test_")}
        for i, line in enumerate(done.metrics)
    ]
    run = with_metrics(
        replace(done, metrics=once), validation_accuracy=[0.3] * count, validation_top5_accuracy=[0.6] * count
    )
    lines = {line.label: line for line in curves.accuracy_lines(run)}
    assert lines["held-out part, top 1"].y == [30.0] * count
    assert (lines["test, top 1"].x, lines["test, top 1"].y) == ([count], [100 * done.metrics[-1]["test_accuracy"]])


def test_a_run_of_part_of_an_epoch_ends_where_it_ended(done):
    step = done.facts["steps_per_epoch"] // 2
    short = replace(done, metrics=[{**done.metrics[0], "step": step}], steps=[])
    assert short.last_epoch == pytest.approx(0.5) and drawn(curves.training(short).axes[1])["test, top 1"][0] == [0.5]
    assert "after 1 epoch" in short.headline() and not short.headline().endswith("epochs")


def test_the_learning_rate_goes_through_what_was_measured(done):
    line = curves.learning_rate(done)
    at = dict(zip(line.x, line.y, strict=True))
    assert [at[entry["epoch"]] for entry in done.metrics] == pytest.approx(
        [entry["learning_rate"] for entry in done.metrics]
    )


def test_speed_shows_throughput_and_waiting(done):
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


# --- the machine --------------------------------------------------------------------------------------------------


def sample(seconds: float, cpu: float, gpus: list[float | None]) -> dict:
    return {
        "seconds": seconds,
        "cpu_percent": cpu,
        "ram_gib": 8.0,
        "process_ram_gib": 2.0,
        "gpu_percent": gpus,
        "gpu_memory_gib": [3.0] * len(gpus),
    }


def test_utilisation_shows_every_sample_of_a_short_run():
    busy, memory = machine.utilisation([sample(2.0 * i, 10.0 * i, [50.0 + i, None]) for i in range(1, 6)], "title").axes
    assert drawn(busy)["CPU, all cores"] == ([2, 4, 6, 8, 10], [10, 20, 30, 40, 50])
    assert drawn(busy)["GPU 0"][1] == [51, 52, 53, 54, 55] and "GPU 1" not in drawn(busy)
    assert (
        drawn(memory)["GPU 1"][1] == [3.0] * 5
        and memory.get_xlabel() == "seconds of running"
        and memory.get_ylabel() == "memory used (GiB)"
    )


def test_many_samples_and_many_gpus_are_drawn_as_mean_and_range():
    x, mean, low, high = machine.binned(np.arange(10.0), np.array([[i, i + 2.0] for i in range(10)]), most=5)
    assert (list(x), list(mean)) == ([0.5, 2.5, 4.5, 6.5, 8.5], [1.5, 3.5, 5.5, 7.5, 9.5])
    assert (list(low), list(high)) == ([0, 2, 4, 6, 8], [3, 5, 7, 9, 11])
    assert np.isnan(machine.binned(np.arange(2.0), np.full((2, 1), np.nan))[1]).all()
    busy = machine.utilisation([sample(1.0, 1.0, [10.0] * 4 + [30.0] * 4)] * 2, "title").axes[0]
    assert drawn(busy)["8 GPUs, mean and range"][1] == [20.0, 20.0]


def test_times_have_a_unit_that_suits_them():
    assert in_time_unit([0, 120]) == ([0, 120], "seconds")
    assert in_time_unit([0, 600]) == ([0, 10], "minutes") and in_time_unit([0, 36000]) == ([0, 10], "hours")
    assert [duration(seconds) for seconds in (7.4, 99, 120, 5000, 11_100)] == [
        "7 s",
        "99 s",
        "2 min",
        "83 min",
        "3 h 05 min",
    ]


# --- classes ------------------------------------------------------------------------------------------------------


def some_confusion(num_classes: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).integers(0, 4, (num_classes, num_classes))
    return matrix + 20 * np.eye(num_classes, dtype=matrix.dtype)


def test_the_superclasses_part_the_classes_of_cifar_100():
    assert (
        len(SUPERCLASSES) == 20
        and all(len(members) == 5 for members in SUPERCLASSES.values())
        and len(set(CIFAR_100)) == 100
    )
    groups = groups_of(CIFAR_100)
    assert sorted(label for members in groups.values() for label in members) == list(range(100))
    assert [CIFAR_100[label] for label in groups["trees"]] == [
        "maple_tree",
        "oak_tree",
        "palm_tree",
        "pine_tree",
        "willow_tree",
    ]
    assert groups_of(CIFAR_100[:99]) is None and groups_of(["a", "b"]) is None


def test_confusion_cells_are_shares_of_the_true_class():
    matrix = some_confusion(10)
    axes = classes.confusion(matrix, list("abcdefghij"), "title").axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown, 100 * matrix / matrix.sum(axis=1, keepdims=True))
    assert [text.get_text() for text in axes.get_yticklabels()] == list(
        "abcdefghij"
    ) and axes.get_ylabel() == "true class"
    assert f"{shown[3, 3]:.0f}" in {text.get_text() for text in axes.texts}


def test_confusion_of_cifar_100_is_ordered_by_superclass():
    matrix = some_confusion(100)
    axes = classes.confusion(matrix, CIFAR_100, "title").axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == [name for members in SUPERCLASSES.values() for name in members]
    order = [CIFAR_100.index(name) for name in names]
    np.testing.assert_allclose(
        axes.images[0].get_array(), (100 * matrix / matrix.sum(axis=1, keepdims=True))[np.ix_(order, order)]
    )
    by_group = classes.superclass_confusion(matrix, CIFAR_100, "title").axes[0].images[0].get_array()
    fish, flowers = (groups_of(CIFAR_100)[name] for name in ("fish", "flowers"))
    assert by_group[1, 2] == pytest.approx(100 * matrix[np.ix_(fish, flowers)].sum() / matrix[fish].sum())
    assert classes.superclass_confusion(some_confusion(10), list("abcdefghij"), "title") is None


@pytest.mark.parametrize(
    "names", [list("abcdefghij"), CIFAR_100, [f"c{i}" for i in range(80)], [f"c{i}" for i in range(150)]], ids=len
)
def test_bars_are_the_accuracies_of_their_labels(names):
    matrix = some_confusion(len(names))
    accuracy = dict(zip(names, 100 * np.diag(matrix) / matrix.sum(axis=1), strict=True))
    shown = {}
    for axes in classes.accuracies(matrix, names, "title").axes:
        labels = [text.get_text() for text in axes.get_yticklabels()]
        shown |= {labels[round(bar.get_y() + bar.get_height() / 2)]: bar.get_width() for bar in axes.patches}
    assert shown == pytest.approx({name: accuracy[name] for name in shown})
    worst, best = min(accuracy, key=accuracy.get), max(accuracy, key=accuracy.get)
    assert len(shown) == min(100, len(names)) and {worst, best} <= set(shown)


def test_the_interval_of_an_accuracy():
    low, high = classes.wilson(np.array([0, 10, 50]), np.array([10, 10, 100]))
    np.testing.assert_allclose(low, [0, 0.7225, 0.4038], atol=1e-3)
    np.testing.assert_allclose(high, [0.2775, 1, 0.5962], atol=1e-3)


def test_long_names_keep_both_their_ends():
    assert shorten("short", 10) == "short"
    names = [shorten(f"a_very_long_name_of_a_class_{i}", 20) for i in range(3)]
    assert all(len(name) <= 20 and name.startswith("a_very") for name in names) and len(set(names)) == 3


# --- what the network makes of the data ---------------------------------------------------------------------------


def test_the_inspection_counts_what_training_counted(seen, done):
    last = done.metrics[-1]
    assert (np.trace(seen.confusion), seen.confusion.sum()) == (last["test_correct"], last["test_seen"])
    assert seen.loss == pytest.approx(last["test_loss"], rel=1e-5) and seen.split == "test"
    assert set(seen.confusion.sum(axis=1)) == {TEST_PER_CLASS}


def test_mistakes_are_wrong_and_the_worst_come_first(seen, shapes):
    from PIL import Image

    losses = [mistake.loss for mistake in seen.mistakes]
    assert losses == sorted(losses, reverse=True) and 0 < len(losses) <= report.NUM_MISTAKES
    for mistake in seen.mistakes:
        assert (
            mistake.true != mistake.predicted
            and Path(mistake.path).parent.name == mistake.true
            and 0 < mistake.probability <= 1
        )
        np.testing.assert_allclose(
            mistake.pixels, np.asarray(Image.open(next(shapes.rglob(mistake.path))).convert("RGB")), atol=1
        )
    figure = images.most_wrong(seen.mistakes, "title")
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(captions) == len(seen.mistakes) and all(
        m.true in text for m, text in zip(seen.mistakes, captions, strict=True)
    )


def test_a_network_without_mistakes_has_none():
    found = Predictions(np.array([0, 1]), np.array([0, 1]), np.array([1.0, 1.0]), np.array([0.1, 0.2]))
    assert not len(found.worst(5)) and found.confusion(2).tolist() == [[1, 0], [0, 1]]
    found = replace(found, labels=np.array([1, 1]))
    assert found.worst(5).tolist() == [0]


def test_the_attention_that_is_drawn_is_the_one_that_is_used():
    q, k, v = (torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = ~torch.eye(5, dtype=torch.bool)
    weights = attention_weights(q, k, v, attn_mask=mask)
    torch.testing.assert_close(weights @ v, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    assert torch.all(weights.diagonal(dim1=-2, dim2=-1) == 0)
    torch.testing.assert_close(attention_weights(q, k, v) @ v, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_has_a_map_for_each_block(attention, pooling):
    settings = ModelSettings(attention=attention, pooling=pooling, patch=8, width=32, depth=3, heads=2, head_size=16)
    maps = attention_maps(build_model(settings, 10, 32).eval(), settings, torch.randn(2, 3, 32, 32), autocast=False)
    assert maps.shape == (3, 2, 4, 4) and (maps >= 0).all()
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), 1, rtol=1e-5)


def test_other_architectures_have_no_map(done, seen):
    facts = json.loads(json.dumps(done.facts))
    facts["settings"]["model"] = vars(ModelSettings(architecture="resnet18-cifar"))
    run = replace(done, facts=facts)
    told = report.attention_of(
        run, torch.nn.Identity(), SimpleNamespace(splits={"test": SimpleNamespace(labels=np.zeros(3))}), "test", {}
    )
    assert told == "Attention is drawn for the architecture vit only; this run is a resnet18-cifar."
    seen = replace(seen, attention=told)
    assert "attention" not in [picture.name for picture in pictures_of(run, seen)] and told in page(run, seen, [])


# --- the page -----------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """Everything that a browser would fetch or follow."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")
        ]


def assert_stands_alone(text: str, folder: Path) -> None:
    found = References(text)
    assert not found.tags & {"script", "link", "iframe", "object", "embed"}
    for reference in found.found:
        assert reference.startswith(("data:image/svg+xml;base64,", "#")) or (folder / reference).exists(), reference
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    for encoded in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text):
        svg = base64.b64decode(encoded).decode()
        assert not re.findall(r'(?:href|src)="(?!#|data:)', svg) and "<script" not in svg and "url(http" not in svg
    anchors = {reference[1:] for reference in found.found if reference.startswith("#")}
    assert anchors and all(f'id="{anchor}"' in text for anchor in anchors)


def test_training_leaves_a_page(unbroken, done):
    text = (unbroken.folder / "report.html").read_text()
    assert_stands_alone(text, unbroken.folder)
    last = done.metrics[-1]
    assert (
        f"{100 * last['test_accuracy']:.2f}%" in text and f"{last['test_correct']:,} of {last['test_seen']:,}" in text
    )
    assert done.facts["commit"] in text and done.facts["dataset"]["fingerprint"] in text and "python train.py" in text
    assert len(re.findall("<img ", text)) == len(pictures_of(done, None))


def test_report_adds_what_needs_the_data(copied, shapes, done):
    out = run_script("report.py", copied.folder, "--data-dir", shapes).out
    text = (copied.folder / "report.html").read_text()
    assert_stands_alone(text, copied.folder)
    names = [name for name in ("curves", "speed", "classes", "confusion", "mistakes", "attention") if name in out]
    assert len(names) == 6
    for name in names:
        assert (copied.folder / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (copied.folder / "pictures" / f"{name}.svg").read_text()
    rows = dict(re.findall(r"<tr><td>(\w+)</td><td class=\"number\">([\d.]+)</td>", text))
    assert set(rows) == set(done.facts["dataset"]["classes"])
    assert sum(float(value) for value in rows.values()) / 10 == pytest.approx(
        100 * done.metrics[-1]["test_accuracy"], abs=0.01
    )


def test_names_cannot_break_the_page(done):
    facts = json.loads(json.dumps(done.facts))
    facts["dataset"]["classes"] = ["<script>alert(1)</script>", "a & b", *facts["dataset"]["classes"][2:]]
    run = replace(done, name="<img src=x>", facts=facts)
    found = SplitAnalysis("test", some_confusion(10), 1.0, [], "none")
    text = page(run, found, pictures_of(run, found))
    assert_stands_alone(text, run.folder)
    assert "&lt;script&gt;" in text and "a &amp; b" in text and "<title>&lt;img" in text


def test_the_page_shows_every_setting_and_which_are_not_the_defaults(done):
    text = page(done, None, [])
    assert {path: (value, default) for path, value, default in changed_settings(done.facts["settings"])}[
        "model.width"
    ] == (32, 512)
    assert "<td>model.width</td><td>32</td><td>512</td>" in text
    assert (
        "<td>augmentation.flip</td><td>0.5</td>" in text
        and "<td>engine.optimizer.params.betas</td><td>[0.9, 0.999]</td>" in text
    )


# --- the command --------------------------------------------------------------------------------------------------


def test_without_the_dataset_there_is_still_a_page(copied, tmp_path):
    folder = Path(
        shutil.copytree(copied.folder, tmp_path / "moved", ignore=shutil.ignore_patterns("pictures", "report.html"))
    )
    facts = json.loads((folder / "run.json").read_text())
    facts["dataset"]["folder"] = str(tmp_path / "nowhere")
    (folder / "run.json").write_text(json.dumps(facts))
    said = run_script("report.py", folder)
    assert "note: only the pictures that need no data, because" in said.err and "nowhere" in said.err
    assert {path.stem for path in (folder / "pictures").iterdir()} <= {"curves", "speed", "utilisation"} and (
        folder / "report.html"
    ).is_file()
    refused = run_script("report.py", folder, "--data-dir", tmp_path / "nowhere", code=1)
    assert refused.err.startswith("error: ") and refused.err.count("\n") == 1


def test_several_runs_in_one_picture(copied, tmp_path):
    other = shutil.copytree(copied.folder, tmp_path / "other", ignore=shutil.ignore_patterns("pictures"))
    for name in ("compare.svg", "compare.png"):
        out = run_script("report.py", copied.folder, other, "--out", tmp_path / name).out
        assert (tmp_path / name).stat().st_size > 5000
    accuracy = f"{100 * copied.metrics()[-1]['test_accuracy']:.2f}% test accuracy after 12 epochs"
    assert f"mine : {accuracy}" in out and f"other: {accuracy}" in out
    refused = run_script("report.py", copied.folder, other, "--out", tmp_path / "compare.doc", code=1)
    assert refused.err == "error: --out ends in .png or .svg, not '.doc'\n"


def test_what_cannot_be_reported_is_refused_by_name(copied, tmp_path):
    assert "is not a run folder" in run_script("report.py", tmp_path, code=1).err
    empty = RunFolder(tmp_path / "empty")
    empty.create(copied.facts())
    assert run_script("report.py", empty.folder, code=1).err == f"error: {empty.folder} has no finished epoch yet\n"
    assert "--out is for several runs" in run_script("report.py", copied.folder, "--out", "a.png", code=1).err
    assert "held out no part" in run_script("report.py", copied.folder, "--split", "validation", code=1).err


def test_a_torn_line_is_left_out(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert (
        read_lines(tmp_path / "steps.jsonl") == [{"step": 1}, {"step": 2}] and read_lines(tmp_path / "none.jsonl") == []
    )
