"""common/text.py: texts for sentences. Run: python -m pytest tests/common/test_text.py"""

from __future__ import annotations

import pytest

from common.text import duration, epochs_text


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (195, "1 epoch"),
        (390, "2 epochs"),
        (1271, "6.5 epochs"),
        (40, "0.21 epochs"),
        (1, "0.0051 epochs"),
        (0, "0 epochs"),
    ],
)
def test_a_run_that_ends_within_an_epoch_has_a_fraction_of_one(steps, text):
    assert epochs_text(steps, 195) == text


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (99, "99 s"), (100, "2 min"), (7200, "2 h 00 min")])
def test_durations_have_the_unit_that_is_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
