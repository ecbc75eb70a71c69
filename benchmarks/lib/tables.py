"""Tables of cells as text for the screen and as Markdown; the first row is the header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.lib.timing import Spread
from records.provenance import commit_text

Rows = Sequence[Sequence[str]]


def as_text(rows: Rows) -> str:
    """Return aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def as_markdown(rows: Rows) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
    return "\n".join(lines)


def made_by(report: dict[str, Any]) -> str:
    """Return the commit and the versions of a report."""
    versions = ", ".join(f"{name} {version}" for name, version in report["machine"]["versions"].items())
    return f"Commit {commit_text(report, 10)}; {versions}."


def cell(values: Spread, form: str = ".2f") -> str:
    """Return "median (min .. max)", or the median alone if all values are equal."""
    median = format(values.median, form)
    return (
        median if values.minimum == values.maximum else f"{median} ({values.minimum:{form}} .. {values.maximum:{form}})"
    )
