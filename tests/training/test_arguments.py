"""training/arguments.py: switches and their defaults; invalid options are in tests/config/test_command_line.py."""

from __future__ import annotations

import sys

import pytest

from training.arguments import parse_arguments

SWITCHES = (
    *("skip_broken", "evaluate_ema_only", "fresh", "allow_inexact_resume", "skip_bad_steps", "deterministic"),
    "log_gradients",
)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_off_by_default_and_takes_no_value(monkeypatch, name):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert getattr(parse_arguments(), name) is False
    monkeypatch.setattr(sys, "argv", ["train.py", f"--{name.replace('_', '-')}", "--name", "mine"])
    args = parse_arguments()
    assert getattr(args, name) is True and args.name == "mine"
