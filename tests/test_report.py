"""report.py and reports/: pictures show the numbers of the run, and the page needs no other file.

Pictures are checked by their data (lines, bars, cells), not by their pixels. Run: python -m pytest tests/test_report.py
"""

from __future__ import annotations

import base64
import json
import os
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
from matplotlib.text import Text
from programs import run as run_script
from small_runs import TEST_PER_CLASS

import report
from common import output_files
from common.errors import SettingsError
from common.files import read_lines
from common.text import duration, shorten
from config.differences import changed_settings
from config.settings import ModelSettings, Settings
from image_data.dataset import Dataset
from model import build_model
from models.attention import ATTENTIONS
from models.calibration import Calibration, CalibrationCounts
from models.pooling import POOLINGS
from records.run_data import RunData
from records.run_folder import RunFolder
from reports import classes, curves, images, style
from reports.calibration import reliability
from reports.cifar100_superclasses import SUPERCLASSES, groups_of
from reports.curves import several
from reports.page import page, write_page
from reports.pictures import SplitAnalysis, pictures_of
from reports.predictions import Predictions, attention_maps, attention_weights
from reports.style import in_time_unit, save
from reports.utilization import binned, utilization

CIFAR_100 = sorted(name for members in SUPERCLASSES.values() for name in members)


@pytest.fixture(scope="module")
def done(unbroken) -> RunData:
    return RunData.read(unbroken.folder)


@pytest.fixture(scope="module")
def copied(unbroken, tmp_path_factory) -> RunFolder:
    """A writable copy of the finished run."""
    folder = tmp_path_factory.mktemp("reported") / "mine"
    return RunFolder(
        Path(shutil.copytree(unbroken.folder, folder, ignore=shutil.ignore_patterns("state", "report.html")))
    )


@pytest.fixture(scope="module")
def analysis(done, shapes) -> SplitAnalysis:
    args = SimpleNamespace(split=None, data_dir=shapes, weights="weights.safetensors", batch_size=16, source="auto")
    return report.analyze(done, args)


def drawn(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Return label -> x and y values of each line."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def with_metrics(run: RunData, **columns: list[float]) -> RunData:
    """Return the run with further columns in its metrics."""
    metrics = [
        {**line, **{key: values[i] for key, values in columns.items() if values[i] is not None}}
        for i, line in enumerate(run.metrics)
    ]
    return replace(run, metrics=metrics)


# --- curves -------------------------------------------------------------------------------------------------------


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
    assert "after 1 epoch" in short.headline() and not short.headline().endswith("epochs")


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


# --- classes ------------------------------------------------------------------------------------------------------


def some_confusion(num_classes: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).integers(0, 4, (num_classes, num_classes))
    return matrix + 20 * np.eye(num_classes, dtype=matrix.dtype)


def test_the_superclasses_partition_the_classes_of_cifar_100():
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


# --- predictions --------------------------------------------------------------------------------------------------


def test_the_analysis_agrees_with_the_metrics_of_training(analysis, done):
    last = done.metrics[-1]
    assert (np.trace(analysis.confusion), analysis.confusion.sum()) == (last["test_correct"], last["test_seen"])
    assert analysis.loss == pytest.approx(last["test_loss"], rel=1e-5) and analysis.split == "test"
    assert set(analysis.confusion.sum(axis=1)) == {TEST_PER_CLASS}


def test_mistakes_are_misclassified_images_by_falling_loss(analysis, shapes):
    from PIL import Image

    losses = [mistake.loss for mistake in analysis.mistakes]
    assert losses == sorted(losses, reverse=True) and 0 < len(losses) <= report.NUM_MISTAKES
    for mistake in analysis.mistakes:
        assert (
            mistake.true != mistake.predicted
            and Path(mistake.path).parent.name == mistake.true
            and 0 < mistake.probability <= 1
        )
        np.testing.assert_allclose(
            mistake.pixels, np.asarray(Image.open(next(shapes.rglob(mistake.path))).convert("RGB")), atol=1
        )
    figure = images.most_wrong(analysis.mistakes, "title")
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(captions) == len(analysis.mistakes) and all(
        m.true in text for m, text in zip(analysis.mistakes, captions, strict=True)
    )


def test_a_network_without_mistakes_has_none():
    found = Predictions(np.array([0, 1]), np.array([0, 1]), np.array([1.0, 1.0]), np.array([0.1, 0.2]))
    assert not len(found.worst(5)) and found.confusion(2).tolist() == [[1, 0], [0, 1]]
    found = replace(found, labels=np.array([1, 1]))
    assert found.worst(5).tolist() == [0]


def test_recorded_attention_weights_are_those_of_the_forward_pass():
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


def test_other_architectures_have_no_attention_map(done, analysis):
    facts = json.loads(json.dumps(done.facts))
    facts["settings"]["model"] = vars(ModelSettings(architecture="resnet18-cifar"))
    run = replace(done, facts=facts)
    reason = report.attention_of(
        run, torch.nn.Identity(), SimpleNamespace(splits={"test": SimpleNamespace(labels=np.zeros(3))}), "test", {}
    )
    assert reason == "Attention maps exist for the architecture vit only; this run uses resnet18-cifar."
    analysis = replace(analysis, attention=reason)
    assert "attention" not in [picture.name for picture in pictures_of(run, analysis)] and reason in page(
        run, analysis, []
    )


@pytest.mark.parametrize("kind", ["no call", "other tokens"])
def test_an_attention_that_cannot_be_recorded_is_one_sentence(kind, done, shapes, monkeypatch):
    class Own(ATTENTIONS["mhsa" if "mhsa" in ATTENTIONS else next(iter(ATTENTIONS))]):
        def attend(self, q, k, v, mask=None):
            if kind == "no call":
                return (10 * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(dim=-1) @ v
            return F.scaled_dot_product_attention(q, k[:, :, ::4], v[:, :, ::4])

    monkeypatch.setitem(ATTENTIONS, "own", Own)
    facts = json.loads(json.dumps(done.facts))
    facts["settings"]["model"]["attention"] = "own"
    run, dataset = replace(done, facts=facts), Dataset.open(shapes)
    model = build_model(Settings.from_dict(facts["settings"]).model, 10, 32).eval()
    reason = report.attention_of(run, model, dataset, "test", {"device": torch.device("cpu"), "source": "auto"})
    assert isinstance(reason, str) and reason.startswith("No attention map: the attention 'own' ")
    assert ("0 calls of" in reason) == (kind == "no call")


def test_the_calibration_is_that_of_the_predictions(analysis, done):
    found = analysis.calibration
    assert (sum(found.seen), sum(found.correct)) == (done.metrics[-1]["test_seen"], done.metrics[-1]["test_correct"])


def test_the_expected_calibration_error_is_the_weighted_mean_gap():
    generator = np.random.default_rng(0)
    confidence, correct = generator.uniform(0, 1, 1000), generator.random(1000) < 0.4
    counts = CalibrationCounts(torch.device("cpu"), num_bins=10)
    for part in np.array_split(np.arange(1000), 7):
        columns = (torch.tensor(confidence[part]), torch.tensor(correct[part]), torch.ones(len(part), dtype=torch.bool))
        counts.add_confidences(*columns)
    found, expected = counts.result(), 0.0
    for i in range(10):
        inside = (confidence > i / 10) & (confidence <= (i + 1) / 10)
        assert found.seen[i] == inside.sum() and found.correct[i] == correct[inside].sum()
        expected += abs(correct[inside].sum() - confidence[inside].sum()) / 1000
    assert found.expected_error == pytest.approx(expected)
    sure = CalibrationCounts(torch.device("cpu"))
    sure.add(torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1, -1]))
    assert sure.result().seen[-1] == 2 and sum(sure.result().seen) == 2 and sure.result().expected_error == 0.5


def test_the_reliability_diagram_shows_accuracy_by_confidence():
    found = Calibration(seen=[0, 10, 30], correct=[0, 5, 27], confidence_sum=[0.0, 4.0, 27.0])
    top, bottom = reliability(found, "mine").axes
    assert [bar.get_height() for bar in top.patches] == [50, 90]
    assert [bar.get_height() for bar in bottom.patches] == [0, 25, 75]
    assert reliability(found, "mine").get_suptitle() == "mine: expected calibration error 2.50 %"


# --- names and captions of pictures ---------------------------------------------------------------------------------


ODD_NAMES = ["a_$x_{$", "$5 to $10", "猫", "a\x1b[31mb\nc", os.fsdecode(b"caf\xe9"), "|`*", "<b>", "", "é", "x" * 90]


def test_odd_names_are_drawn_as_they_are(done, analysis, tmp_path, capsys):
    facts = json.loads(json.dumps(done.facts))
    facts["dataset"]["classes"] = ODD_NAMES
    wrong = [replace(mistake, true=ODD_NAMES[0], predicted=ODD_NAMES[4]) for mistake in analysis.mistakes[:2]]
    pixels, maps, names = analysis.attention
    analysis = replace(analysis, mistakes=wrong, attention=(pixels, maps, ODD_NAMES[: len(names)]))
    run = replace(done, name="$\\frac{$ \udce9", facts=facts, folder=tmp_path)
    pictures = pictures_of(run, analysis)
    for picture in pictures:
        save(picture.figure, tmp_path / f"{picture.name}.png")
    texts = {text.get_text() for picture in pictures for text in picture.figure.findobj(Text)}
    assert "$5 to $10" in texts and "a\ufffd[31mb\ufffdc" in texts
    write_page(run, analysis, pictures).read_text()
    several([run, run], [run.name, "$x$"])
    assert capsys.readouterr().err.count("no installed font has the characters") <= 1


def test_a_character_without_font_is_reported_once_and_another_font_is_used(monkeypatch, capsys):
    monkeypatch.setattr(style, "_reported", set())
    monkeypatch.setattr(style, "_fonts_for", lambda missing: (["Some Font"], missing - {ord("猫")}))
    figure, ((axes,),) = style.make_figure(2, 2)
    axes.set_title("猫 \U0001f9ff")
    for _ in range(2):
        style.use_installed_fonts(figure)
    assert axes.title.get_fontfamily() == [style.FONT, "Some Font"]
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "characters '\U0001f9ff'; pictures show boxes" in error


def test_embedded_pictures_follow_dark_mode_and_have_no_background(done):
    svg = base64.b64decode(style.embed(curves.training(done)).split(",", 1)[1]).decode()
    assert "prefers-color-scheme: dark" in svg and "fill: #ffffff" not in svg
    assert style.INK in svg and f'[style*="stroke: {style.INK}"]{{stroke:' in svg


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


def test_the_caption_names_the_regularization_that_was_used(done):
    facts = json.loads(json.dumps(done.facts))
    model, augmentation = facts["settings"]["model"], facts["settings"]["augmentation"]
    model["dropout"], facts["settings"]["loss"]["label_smoothing"] = 0.0, 0.1
    caption = pictures_of(replace(done, facts=facts), None)[0].caption
    assert "augmented images, label smoothing, so" in caption and "dropout" not in caption
    facts["settings"]["loss"]["label_smoothing"], model["dropout"] = 0.0, 0.1
    for key in ("flip", "crop_padding"):
        augmentation[key] = 0
    assert "with dropout, so" in pictures_of(replace(done, facts=facts), None)[0].caption


# --- the page -----------------------------------------------------------------------------------------------------


class References(HTMLParser):
    """The tags and every reference that a browser would fetch or follow."""

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


def test_report_adds_the_pictures_that_need_the_dataset(copied, shapes, done):
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
    assert "warning: only the pictures that need no dataset are drawn: " in said.err and "nowhere" in said.err
    assert {path.stem for path in (folder / "pictures").iterdir()} <= {"curves", "speed", "utilisation"} and (
        folder / "report.html"
    ).is_file()
    refused = run_script("report.py", folder, "--data-dir", tmp_path / "nowhere", code=1)
    assert refused.err.startswith("error: ") and refused.err.count("\n") == 1


def test_a_report_can_go_into_another_folder(copied, tmp_path, monkeypatch):
    out = run_script(
        "report.py", copied.folder.name, "--runs-dir", copied.folder.parent, "--quick", "--out", tmp_path / "new"
    )
    assert "report.html" in out.out and (tmp_path / "new" / "pictures" / "curves.svg").is_file()
    assert_stands_alone((tmp_path / "new" / "report.html").read_text(), tmp_path / "new")
    run = RunData.read(copied.folder)
    monkeypatch.setattr(output_files.os, "access", lambda path, mode: False)
    with pytest.raises(SettingsError, match=r"another one: --out FOLDER\): the folder .* is not writable"):
        report.output_folder(run, None)
    with pytest.raises(SettingsError, match="does not exist. Create it: mkdir -p "):
        report.output_folder(run, tmp_path / "no" / "folder")


def test_several_runs_in_one_picture(copied, tmp_path):
    other = shutil.copytree(copied.folder, tmp_path / "other", ignore=shutil.ignore_patterns("pictures"))
    for name in ("compare.svg", "compare.png"):
        out = run_script("report.py", copied.folder, other, "--out", tmp_path / name).out
        assert (tmp_path / name).stat().st_size > 5000
    accuracy = f"{100 * copied.metrics()[-1]['test_accuracy']:.2f}% test accuracy after 12 epochs"
    assert f"mine : {accuracy}" in out and f"other: {accuracy}" in out
    refused = run_script("report.py", copied.folder, other, "--out", tmp_path / "compare.doc", code=1)
    assert refused.err == "error: --out of several runs ends in .png or .svg, not '.doc'\n"


def test_what_cannot_be_reported_is_rejected_by_name(copied, tmp_path):
    assert "is not a run folder" in run_script("report.py", tmp_path, code=1).err
    empty = RunFolder(tmp_path / "empty")
    empty.create(copied.facts())
    assert run_script("report.py", empty.folder, code=1).err == f"error: {empty.folder} has no finished epoch yet\n"
    assert (
        "--out of one run is a folder, not 'a.png'"
        in run_script("report.py", copied.folder, "--out", "a.png", code=1).err
    )
    assert (
        "has no validation split. Use --split test"
        in run_script("report.py", copied.folder, "--split", "validation", code=1).err
    )


def test_a_truncated_line_is_left_out(tmp_path):
    (tmp_path / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert (
        read_lines(tmp_path / "steps.jsonl") == [{"step": 1}, {"step": 2}] and read_lines(tmp_path / "none.jsonl") == []
    )
