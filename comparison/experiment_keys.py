"""The keys of an experiment file that are not settings: defaults, the budget, and checks of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from records.checkpoint_store import Interval

BUDGETS = ("epochs", "steps", "seconds")
DEFAULTS: dict[str, Any] = {
    "preset": "cpu",
    "dataset": "cifar100",
    "seeds": 3,
    "hold_out": 0.1,
    "match": "none",
    "margin": None,
    "until": "seeds",
    "max_seeds": None,
    "max_runs": None,
    "max_hours": None,
    "tune": None,
    "evaluate_every": None,
}
OWN = ("question", "sizes", "variants", *DEFAULTS, *BUDGETS)  # every other key is a setting
MATCHES = ("none", "parameters", "flops")
MOST_SEEDS = 1000  # against a typing mistake; the statistics have no limit


def read_budget(path: Path, tree: dict[str, Any], at_size: dict[str, Any]) -> tuple[str, float]:
    """Return kind and amount of the budget; the budget of a size replaces that of the file."""
    for table in (at_size, tree):
        named = [key for key in BUDGETS if key in table]
        if named:
            break
    if len(named) != 1:
        raise SettingsError(
            f"{path.name}: give exactly one budget ({', '.join(BUDGETS)}), not {' and '.join(named) or 'none'}"
        )
    kind, amount = named[0], table[named[0]]
    number = (int, float) if kind == "seconds" else int
    if isinstance(amount, bool) or not isinstance(amount, number) or not 0 < amount < 1e12:
        expected = "number" if kind == "seconds" else "whole number"
        raise SettingsError(f"{path.name}: {kind} must be a {expected} above 0{_unquoted(amount)}, not {amount!r}")
    return kind, amount


def _unquoted(value: Any) -> str:
    """Return how to write a number that was written as a text."""
    return " without quotes" if isinstance(value, str) else ""


def check_facts(path: Path, facts: dict[str, Any], final: bool) -> None:
    """Raise SettingsError for a value that cannot be used; the message names the file and the key."""
    for key, kinds in (
        ("question", (str,)),
        ("preset", (str,)),
        ("dataset", (str,)),
        ("seeds", (int,)),
        ("hold_out", (int, float)),
        ("match", (str,)),
        ("margin", (int, float, type(None))),
        ("until", (str,)),
        ("max_seeds", (int, type(None))),
        ("max_runs", (int, type(None))),
        ("max_hours", (int, float, type(None))),
        ("evaluate_every", (str, type(None))),
    ):
        if key not in facts:
            raise SettingsError(f'{path.name}: {key} is missing; add {key} = "..."')
        value = facts[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            number = "a number" if float in kinds else "a whole number"
            expected = "a text in quotes" if str in kinds else number + _unquoted(value)
            raise SettingsError(f"{path.name}: {key} must be {expected}, not {value!r}")
    if not 1 <= facts["seeds"] <= MOST_SEEDS:
        raise SettingsError(f"{path.name}: seeds must lie between 1 and {MOST_SEEDS}, not {facts['seeds']}")
    if not 0 <= facts["hold_out"] < 1 or (facts["hold_out"] == 0 and not final):
        raise SettingsError(
            f"{path.name}: hold_out={facts['hold_out']:g} leaves no validation split to compare variants on; "
            "it must lie between 0 and 1 (0 only with --final, which reports the test split)"
        )
    _check_match(path.name, facts["match"])
    _check_rounds(path.name, facts["until"], facts["seeds"], facts["max_seeds"])
    for key in ("max_runs", "max_hours"):
        if facts[key] is not None and not 0 < facts[key] < 1e12:
            raise SettingsError(f"{path.name}: {key} must be a number above 0, not {facts[key]!r}")
    if facts["evaluate_every"] is not None:
        try:
            Interval.parse_evaluations(facts["evaluate_every"])
        except ValueError as error:
            raise SettingsError(f"{path.name}: evaluate_every: {error}") from None
    margin = facts["margin"]
    if margin is not None and not 0 < margin < 100:
        raise SettingsError(f"{path.name}: margin must be a number of points between 0 and 100, not {margin!r}")


def _check_rounds(where: str, until: str, seeds: int, max_seeds: int | None) -> None:
    if until not in ("seeds", "decided"):
        raise SettingsError(f"{where}: " + unknown("until", until, ["seeds", "decided"]))
    if (until == "decided") != (max_seeds is not None):
        raise SettingsError(f'{where}: until = "decided" and max_seeds = N belong together; give both or none')
    if max_seeds is not None and not seeds < max_seeds <= MOST_SEEDS:
        raise SettingsError(
            f"{where}: max_seeds must lie between seeds + 1 = {seeds + 1} and {MOST_SEEDS}, not {max_seeds}"
        )


def _check_match(where: str, match: Any) -> None:
    if match == "seconds":
        raise SettingsError(f'{where}: match = "seconds" is a budget; use seconds = N instead of epochs or steps')
    if match not in MATCHES:
        raise SettingsError(f"{where}: " + unknown("match", str(match), list(MATCHES)))
