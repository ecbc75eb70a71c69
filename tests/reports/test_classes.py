"""reports/classes.py: accuracy by class and confusion matrices. Run: python -m pytest tests/reports"""

from __future__ import annotations

import numpy as np
import pytest
from report_data import CIFAR_100, some_confusion

from common.text import shorten
from reports import classes
from reports.cifar100_superclasses import SUPERCLASSES, groups_of


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
