"""Choose and order rows of the table of runs by their columns: `model.feed_forward=geglu`, `test_accuracy>0.5`.

A condition is a column, an operator (= != > >= < <=) and a value. Text may have the wildcards * and ?; dates compare
from the left, so `date>=2026-11` means since November. A row without the column fulfills only `!=`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from common.errors import SettingsError, unknown
from config.overrides import meant_path
from reports.run_rows import Row

CONDITION = re.compile(r"([^=!<>]+?)\s*(!=|>=|<=|=|>|<)\s*(.*)", re.DOTALL)
ORDERINGS: dict[str, Callable[[Any, Any], bool]] = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}
WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Condition:
    """One `--where`."""

    column: str
    operator: str
    text: str

    def holds(self, row: Row) -> bool:
        """Whether a row fulfills the condition."""
        value = row.values.get(self.column)
        if self.operator in ("=", "!="):
            return (value is not None and self._is_equal(value)) == (self.operator == "=")
        if value is None or isinstance(value, bool):
            return False
        if isinstance(value, str):
            return ORDERINGS[self.operator](value[: len(self.text)], self.text)
        number = _number(self.text)
        return number is not None and ORDERINGS[self.operator](value, number)

    def _is_equal(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value is WORDS.get(self.text.lower())
        if isinstance(value, str):
            return fnmatchcase(value, self.text)
        return value == _number(self.text)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def condition(text: str, columns: list[str], rows: list[Row]) -> Condition:
    """Return the condition that a text such as `test_accuracy>0.5` writes.

    Raises:
        SettingsError: the text is no condition, its column is unknown, or its value is no number and the column is.
    """
    match = CONDITION.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"--where '{text}' is not a condition. Write for example --where model.feed_forward=geglu")
    name, operator, value = match.groups()
    found = Condition(column(name, columns, "--where"), operator, value.strip())
    is_numeric = all(isinstance(v, (int, float)) for row in rows if (v := row.values.get(found.column)) is not None)
    if is_numeric and _number(found.text) is None and found.text.lower() not in WORDS:
        raise SettingsError(
            f"--where '{text}': {found.column} is a number, and '{found.text}' is not. "
            f"Write for example --where '{found.column}>0.5'"
        )
    return found


def column(name: str, columns: list[str], option: str) -> str:
    """Return the column that a user means by its name or by a setting's last part (`lr`, `feed_forward`).

    Raises:
        SettingsError: no column has that name.
    """
    if name in columns:
        return name
    meant = meant_path(name, columns)
    if meant is None:
        raise SettingsError(f"{option}: {unknown('column', name, columns)}")
    return meant


def is_better_when_small(name: str) -> bool:
    """Whether the best value of a column is its smallest: losses and text; numbers and dates begin with the largest."""
    return name.endswith("loss")


def ordered(rows: list[Row], name: str, reverse: bool = False) -> list[Row]:
    """Return the rows by a column: largest number and newest date first, smallest loss first, text from A to Z.

    Rows without a value come last, also with `reverse`.
    """
    present = [row for row in rows if row.values.get(name) is not None]
    numbers = [row for row in present if not isinstance(row.values[name], str)]
    texts = [row for row in present if isinstance(row.values[name], str)]
    numbers.sort(key=lambda row: row.values[name], reverse=is_better_when_small(name) == reverse)
    texts.sort(key=lambda row: row.values[name], reverse=(name == "date") != reverse)
    return numbers + texts + [row for row in rows if row.values.get(name) is None]
