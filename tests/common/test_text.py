"""common/text.py: texts for sentences. Run: python -m pytest tests/common/test_text.py"""

from __future__ import annotations

import pytest

from common.text import duration, epochs_text, first_line, last_error, precision_text, type_and_first_line


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


@pytest.mark.parametrize(
    ("message", "line", "with_type"),
    [
        ("wrong\nmore", "wrong", "ValueError: wrong"),
        ("\n  wrong", "wrong", "ValueError: wrong"),
        ("", "ValueError", "ValueError"),
        (" \n", "ValueError", "ValueError"),
    ],
)
def test_an_error_is_told_by_its_first_line_or_by_its_type(message, line, with_type):
    error = ValueError(message)
    assert first_line(error) == line and type_and_first_line(error) == with_type


def test_a_precision_is_told_as_on_the_screen_and_one_without_words_as_it_is():
    assert [precision_text(name) for name in ("autocast", "bf16", "fp32")] == ["bf16", "bf16 incl. weights", "fp32"]


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("a\nerror: no\nTraining failed (exit code 1).\n", "error: no"),
        ("Traceback\n  File /a/b/c.py\ntorch.OutOfMemoryError: 3 GiB\nbye\n", "torch.OutOfMemoryError: 3 GiB"),
        ("[rank0]:   File a.py\n[rank0]: OSError: no\n[rank0]:[W1 A.cpp:1] Warning: not called\n", "OSError: no"),
        ("hello\nKilled\n", "Killed"),
        ("", None),
    ],
)
def test_the_last_error_of_a_log(log, line):
    assert last_error(log) == line
