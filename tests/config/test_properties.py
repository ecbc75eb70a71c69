"""Overrides of every setting and names of runs, over all texts that a user could type (Hypothesis)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from properties import some_examples

from common.errors import SettingsError
from config.catalog import setting_paths
from config.command_line import run_name
from config.overrides import SEVERAL_TYPES
from config.schema import INTERVAL, Declared
from config.settings import Settings, declared_settings, resolve

DEFAULTS = resolve(None, [])
DECLARED = declared_settings()
PATHS = [path for path in setting_paths(DEFAULTS) if not path.endswith("_options")]


def value_of(settings: Settings, path: str) -> Any:
    value: Any = settings.as_dict() | settings.engine
    for key in path.split("."):
        value = value[key]
    return value


def bounds(declared: Declared) -> tuple[float, float, bool, bool]:
    """Lowest and highest number of a declared interval, and whether each belongs to it."""
    interval = INTERVAL.fullmatch(declared.within or "(-inf, inf)")
    assert interval is not None
    opening, low, high, closing = interval.groups()
    return float(low), float(high), opening == "[", closing == "]"


def inside(declared: Declared, value: float) -> bool:
    low, high, has_low, has_high = bounds(declared)
    return (low < value < high) or (has_low and value == low) or (has_high and value == high)


def numbers(declared: Declared, whole: bool) -> st.SearchStrategy:
    """Numbers of the declared interval; a side without a bound ends at a million."""
    least, most = max(bounds(declared)[0], -1e6), min(bounds(declared)[1], 1e6)
    found = st.integers(int(least), int(most)) if whole else st.floats(least, most, allow_subnormal=False)
    return found.filter(lambda value: inside(declared, value))


def valid(path: str) -> st.SearchStrategy:
    """Values that a setting can have, of the type of its default."""
    default, declared = value_of(DEFAULTS, path), DECLARED[path]
    if path in SEVERAL_TYPES:
        return st.sampled_from(SEVERAL_TYPES[path])
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int | float):
        return numbers(declared, isinstance(default, int))
    if isinstance(default, list):
        return st.lists(numbers(declared, False), min_size=len(default), max_size=len(default))
    return st.sampled_from(declared.choices or [default])


@pytest.mark.parametrize("path", PATHS)
def test_every_default_survives_as_text(path):
    default = value_of(DEFAULTS, path)
    text = default if isinstance(default, str) else json.dumps(default)
    assert resolve(None, [f"{path}={text}"]) == DEFAULTS


@some_examples(80)
@given(st.data())
def test_a_valid_value_survives_as_text_and_in_the_record_of_a_run(data):
    path = data.draw(st.sampled_from(PATHS))
    value = data.draw(valid(path))
    settings = resolve(None, [f"{path}={json.dumps(value)}"])
    assert value_of(settings, path) == value
    assert path in SEVERAL_TYPES or type(value_of(settings, path)) is type(value_of(DEFAULTS, path))
    assert Settings.from_dict(json.loads(json.dumps(settings.as_dict()))) == settings


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
SEGMENTS = st.sampled_from(sorted({part for path in PATHS for part in path.split(".")})) | st.text(max_size=5)


@some_examples(150)
@given(
    st.sampled_from(setting_paths()) | st.lists(SEGMENTS, min_size=1, max_size=4).map(".".join),
    JSON_VALUES.map(json.dumps) | st.sampled_from(["-1", "-0.1", "0", "1", "1.1", "2"]) | st.text(max_size=8),
)
def test_any_other_override_is_an_error_of_settings_and_nothing_else(path, text):
    try:
        settings = resolve(None, [f"{path}={text}"])
    except SettingsError as error:
        assert "\n" not in str(error).replace(text, "").replace(path, "")
        return
    name = path.strip().removeprefix("engine.")
    found = value_of(settings, name) if name in PATHS else None
    if isinstance(found, int | float) and not isinstance(found, bool):
        assert inside(DECLARED[name], found)


@some_examples(200)
@given(st.text(max_size=12) | st.lists(st.sampled_from([".", "/", "\\", "a", "\0", " ", "~"]), max_size=4).map("".join))
def test_a_run_name_is_a_folder_in_the_runs_folder_or_an_error(text):
    try:
        name = run_name(text)
    except argparse.ArgumentTypeError as error:
        assert "must" in str(error)
        return
    assert name == text and (Path("runs") / name).parent == Path("runs") and (Path("runs") / name).name == text
