"""The table of runs as text: the columns that a reader needs first, as many as the terminal is wide."""

from __future__ import annotations

import shutil
import unicodedata
from collections import Counter
from typing import Any

from common.display import printable
from common.text import shorten
from reports.run_query import Condition, column, condition, ordered
from reports.run_rows import COMPARISON, OTHER, RUN, Row
from reports.run_table import columns_of, varied_columns

SHOWN = (
    "name",
    "state",
    "date",
    "validation_accuracy",
    "test_accuracy",
    "train_loss",
    "epoch",
    "seeds_mean",
    "seeds_sd",
)
MAX_NAME = 48
MAX_CELL = 24
WIDE = 200  # columns of characters where the output is not a terminal


def list_text(rows: list[Row], sort: str | None, where: list[str], reverse: bool = False) -> str:
    """Return the table of the chosen rows in their order, and a line with their number.

    Raises:
        SettingsError: an unknown column, or a text that is no condition.
    """
    columns = columns_of(rows)
    key = column(sort, columns, "--sort") if sort else "date"
    conditions = [condition(text, columns, rows) for text in where]
    chosen = ordered([row for row in rows if all(one.holds(row) for one in conditions)], key, reverse)
    lines = _table(chosen, _shown(chosen, key, conditions))
    total = f", of {len(rows):,} rows" if len(chosen) < len(rows) else ""
    return "\n".join([*lines, f"{summary(chosen)}{total}"])


def summary(rows: list[Row]) -> str:
    """Return the numbers of runs, comparisons and other folders in words."""
    words, counts = {RUN: "run", COMPARISON: "comparison", OTHER: "other folder"}, Counter(row.kind for row in rows)
    shown = [f"{counts[kind]:,} {word}{'s' * (counts[kind] != 1)}" for kind, word in words.items() if counts[kind]]
    return ", ".join(shown) or "no run"


def _shown(rows: list[Row], sort: str, conditions: list[Condition]) -> list[str]:
    """Return the columns to show: those of the request, the results, then settings that differ between these rows."""
    present = {key for row in rows for key in row.values}
    asked = [*(one.column for one in conditions if one.operator != "="), sort]
    kind = ["kind"] if any(row.kind != RUN for row in rows) else []
    differing = [key for key in varied_columns(rows) if key.startswith("model.") or key == "preset"]
    others = [key for key in varied_columns(rows) if "." in key and not key.startswith(("model.", "versions."))]
    return [key for key in dict.fromkeys([SHOWN[0], *kind, *asked, *SHOWN[1:], *differing, *others]) if key in present]


def _table(rows: list[Row], columns: list[str]) -> list[str]:
    """Return aligned lines, with as many columns as fit; a note stands at the end of its row."""
    width = shutil.get_terminal_size((WIDE, 24)).columns
    shown: list[list[str]] = []
    used = 0
    for name in columns:
        cells = [_cell(row.values.get(name), name) for row in rows]
        size = max(map(_width, [name, *cells]))
        if shown and used + size > width:
            break
        is_number = any(isinstance(row.values.get(name), (int, float)) for row in rows)
        shown.append([_padded(cell, size, is_number) for cell in [name, *cells]])
        used += size + 2
    lines = ["  ".join(cells).rstrip() for cells in zip(*shown, strict=True)]
    return lines[:1] + [
        line + (f"  ({printable(row.note)})" if row.note else "") for line, row in zip(lines[1:], rows, strict=True)
    ]


def _cell(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.4f}" if name.endswith(("accuracy", "loss", "_mean", "_sd")) else f"{value:.6g}"
    return shorten(printable(str(value)), MAX_NAME if name == "name" else MAX_CELL)


def _width(text: str) -> int:
    """Return the columns that a text takes on a terminal, where Chinese characters take two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _padded(text: str, size: int, is_number: bool) -> str:
    space = " " * (size - _width(text))
    return space + text if is_number else text + space
