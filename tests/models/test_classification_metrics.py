"""Counts and single results of a classification agree on the predicted class, ties included."""

from __future__ import annotations

import torch

from models.classification_metrics import ClassificationCounts, image_results


def test_counts_and_single_results_agree_where_scores_are_equal():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (500, 10), generator=generator).float()  # nearly every image has equal best scores
    labels = torch.randint(0, 10, (500,), generator=generator)
    labels[::50] = -1  # padding
    counts = ClassificationCounts(torch.device("cpu"), num_classes=10)
    counts.add(scores, labels)
    found = image_results(scores, labels)
    assert counts.confusion is not None
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    confusion.index_put_((found.labels, found.predicted), torch.ones_like(found.labels), accumulate=True)
    assert torch.equal(confusion, counts.confusion.view(10, 10))
    assert int((found.predicted == found.labels).sum()) == counts.counts[0]
    shares = scores[labels >= 0].softmax(dim=1)
    assert torch.equal(found.probability, shares.max(dim=1).values)
