"""reports/predictions.py and calibration.py: mistakes, attention maps, calibration.

Run: python -m pytest tests/reports
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_runs import TEST_PER_CLASS

import report
from config.settings import ModelSettings, Settings
from image_data.dataset import Dataset
from model import build_model
from models.attention import ATTENTIONS, Attention
from models.calibration import Calibration, CalibrationCounts
from models.classification_metrics import ClassificationCounts
from models.pooling import POOLINGS
from reports import images
from reports.calibration import reliability
from reports.page import page
from reports.pictures import pictures_of
from reports.predictions import Predictions, attention_maps, attention_weights


def test_the_analysis_agrees_with_the_metrics_of_training(analysis, done):
    last = done.metrics[-1]
    assert (np.trace(analysis.confusion), analysis.confusion.sum()) == (last["test_correct"], last["test_seen"])
    assert analysis.split == "test" and set(analysis.confusion.sum(axis=1)) == {TEST_PER_CLASS}


def test_mistakes_are_misclassified_images(analysis, shapes):
    from PIL import Image

    assert 0 < len(analysis.mistakes) <= report.NUM_MISTAKES
    for mistake in analysis.mistakes:
        assert mistake.true != mistake.predicted and 0 < mistake.probability <= 1
        of_class = [np.asarray(Image.open(path).convert("RGB")) for path in shapes.rglob(f"test/{mistake.true}/*.png")]
        assert any(np.allclose(mistake.pixels, pixels, atol=1) for pixels in of_class)
    figure = images.most_wrong(analysis.mistakes, "title")
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(captions) == len(analysis.mistakes) and all(
        m.true in text for m, text in zip(analysis.mistakes, captions, strict=True)
    )


def test_a_network_without_mistakes_has_none():
    found = Predictions(np.array([0, 1]), np.array([0, 1]), np.array([1.0, 1.0]), np.array([0.1, 0.2]))
    assert not len(found.worst(5)) and found.confusion(2).tolist() == [[1, 0], [0, 1]]
    found = replace(found, labels=np.array([1, 0]))
    assert found.worst(5).tolist() == [1, 0] and found.worst(1).tolist() == [1]
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
    class Own(Attention):
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
    sure.add(torch.tensor([[0.0, 99.0], [99.0, 0.0], [0.5, 0.5]]), torch.tensor([1, 1, -1]))
    assert sure.result().seen[-1] == 2 and sum(sure.result().seen) == 2 and sure.result().expected_error == 0.5


def test_equal_scores_have_one_winner_in_calibration_and_accuracy():
    scores = torch.randint(3, (500, 10), generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(500) % 10
    calibration, accuracy = CalibrationCounts(torch.device("cpu")), ClassificationCounts(torch.device("cpu"))
    for counts in (calibration, accuracy):
        counts.add(scores, labels)
    assert sum(calibration.result().correct) == accuracy.counts[0]


def test_the_reliability_diagram_shows_accuracy_by_confidence():
    found = Calibration(seen=[0, 10, 30], correct=[0, 5, 27], confidence_sum=[0.0, 4.0, 27.0])
    top, bottom = reliability(found, "mine").axes
    assert [bar.get_height() for bar in top.patches] == [50, 90]
    assert [bar.get_height() for bar in bottom.patches] == [0, 25, 75]
    assert reliability(found, "mine").get_suptitle() == "mine: expected calibration error 2.50 %"
