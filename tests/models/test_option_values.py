"""Options with values that no network can have are named. Run: python -m pytest tests/models/test_option_values.py"""

from __future__ import annotations

import pytest
import torch

import model
from common.errors import SettingsError
from config.settings import resolve
from model import build_model
from models.option_values import blame_options

NETWORK = ["model.width=32", "model.depth=1", "model.heads=2", "model.head_size=16"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["feed_forward_options.hidden=-5"], "cannot be built with model.feed_forward_options.hidden=-5: "),
        (
            ["feed_forward_options.hidden=1" + "0" * 20],
            "cannot be built with model.feed_forward_options.hidden=1000000",
        ),
        (
            ["feed_forward=pair", "feed_forward_options.hidden=-5"],
            "model.feed_forward_options.hidden must be >= 0, got -5",
        ),
        (["attention_options.qkv_std=NaN"], "model.attention_options.qkv_std must be a finite number, got nan"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_option_that_no_network_can_have_is_named(options, sentence):
    with pytest.raises(SettingsError) as error, torch.device("meta"):
        build_model(resolve("cpu", [*NETWORK, *(f"model.{option}" for option in options)]).model, 10, 32)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_division_by_zero_blames_an_option_of_zero():
    usual = resolve("cpu-quick", []).model  # its hidden=0 means the usual size
    with pytest.raises(SettingsError, match="built with model.feed_forward_options.hidden=0: division by zero"):
        blame_options(usual, ZeroDivisionError("division by zero"))
    blame_options(usual, ValueError("a defect"))  # raises nothing


def test_an_error_of_a_part_with_usual_options_keeps_its_traceback(monkeypatch):
    def broken(*_: object) -> list:
        raise RuntimeError("a defect")

    monkeypatch.setattr(model, "build_layers", broken)
    with pytest.raises(RuntimeError, match="^a defect$"):
        build_model(resolve("cpu-quick", []).model, 10, 32)  # its hidden=0 means the usual size
