"""tools/describe_model.py: the network that `python model.py` describes is the one that a run would train."""

from __future__ import annotations

import pytest

from tools.describe_model import describe_model

SMALL = [f"--set=model.{change}" for change in ("width=16", "depth=1", "heads=2", "head_size=8", "patch=8")]


def total(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["model.py", *SMALL, *words])
    describe_model()
    return capsys.readouterr().out.splitlines()[-1]


def test_the_image_side_is_that_of_the_option_or_else_of_the_settings(monkeypatch, capsys):
    at_64 = total(monkeypatch, capsys, "--image-side=64")
    assert total(monkeypatch, capsys, "--set=image_side=64") == at_64 != total(monkeypatch, capsys)
    assert total(monkeypatch, capsys, "--set=image_side=128", "--image-side=64") == at_64
