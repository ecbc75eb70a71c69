"""The values that a search varies a setting over: a range of numbers, or a list of choices."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from common.errors import SettingsError, unknown
from config.settings import declared_settings

Number = int | float
OTHER_NAMES = {"min": "low", "max": "high"}  # what other projects call the ends of a range


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included; whole numbers where both are."""

    low: Number
    high: Number
    step: Number | None = None
    log: bool = False

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def suggest(self, trial: Any, name: str) -> Number:
        """Ask an Optuna trial for a value."""
        if self.is_whole:
            return trial.suggest_int(name, self.low, self.high, step=self.step or 1, log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)

    def extremes(self) -> list[Number]:
        return [self.low, self.high]

    def draw(self, generator: random.Random) -> Number:
        """Return a random value, for the checks before the first run."""
        if self.step:
            return self.low + self.step * generator.randint(0, int((self.high - self.low) / self.step + 1e-9))
        if self.is_whole:
            return generator.randint(int(self.low), int(self.high))
        return generator.uniform(self.low, self.high)

    def __str__(self) -> str:
        text = f"{self.low:g} to {self.high:g}"
        return text + (", logarithmic" if self.log else "") + (f", in steps of {self.step:g}" if self.step else "")


@dataclass(frozen=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Any, name: str) -> Any:
        """Ask an Optuna trial for a value."""
        return trial.suggest_categorical(name, self.values)

    def extremes(self) -> list[Any]:
        return list(self.values)

    def draw(self, generator: random.Random) -> Any:
        """Return a random value, for the checks before the first run."""
        return generator.choice(self.values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


def read_space(where: str, tree: dict[str, Any]) -> dict[str, Range | Choice]:
    """Return path -> possible values. Raises SettingsError, which begins with `where` and names the path."""
    single = {path for path in declared_settings() if not path.endswith("_options")}
    return {path: _values(f"{where} {path}", value) for path, value in _flat_space(tree, single).items()}


def _flat_space(tree: dict[str, Any], single: set[str], prefix: str = "") -> dict[str, Any]:
    """Return path -> what stands there: a list of values, or a table with `low` and `high`.

    Args:
        single: paths of settings that are no groups: a table there is a range, whatever its keys are.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        is_range = path.removeprefix("engine.") in single
        if isinstance(value, dict) and not (is_range or "low" in value or "high" in value):
            found |= _flat_space(value, single, f"{path}.")
        else:
            found[path] = value
    return found


def _values(where: str, value: Any) -> Range | Choice:
    """Read the possible values of one setting. Raises SettingsError."""
    if isinstance(value, list):
        if len(value) < 2 or any(value.index(one) < i for i, one in enumerate(value)):
            raise SettingsError(f"{where} needs at least two different values, not {value}")
        if not all(isinstance(one, (str, bool, int, float)) for one in value):
            raise SettingsError(f"{where} must be a list of texts, numbers or booleans, not {value}")
        return Choice(tuple(value))
    if not isinstance(value, dict):
        raise SettingsError(f"{where} must be a list of values or {{ low = ..., high = ... }}, not {value!r}")
    for key in value:
        if key in OTHER_NAMES:
            raise SettingsError(f"{where}: unknown key '{key}'; did you mean '{OTHER_NAMES[key]}'?")
        if key not in ("low", "high", "step", "log"):
            raise SettingsError(f"{where}: " + unknown("key", key, ["low", "high", "step", "log"]))
    numbers = [value.get("low"), value.get("high")] + ([value["step"]] if "step" in value else [])
    if not all(is_number(one) for one in numbers) or not isinstance(value.get("log", False), bool):
        raise SettingsError(f"{where}: low, high and step must be numbers, log true or false, not {value}")
    low, high, step, log = value["low"], value["high"], value.get("step"), value.get("log", False)
    if not low < high:
        raise SettingsError(f"{where}: low = {low} must be less than high = {high}")
    if log and (low <= 0 or step is not None):
        raise SettingsError(f"{where}: log = true needs low above 0 and no step, not {value}")
    if step is not None and not 0 < step <= high - low:
        raise SettingsError(f"{where}: step must lie between 0 and high - low = {high - low:g}, not {step}")
    if isinstance(low, int) != isinstance(high, int) or (isinstance(low, int) and isinstance(step, float)):
        raise SettingsError(f"{where}: write low, high and step all as whole numbers or all with a decimal point")
    return Range(low, high, step, log)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
