"""What is declared of a setting: its description, its range and its choices; and the check of a value against them.

    depth: int = setting(4, "number of transformer blocks", "[1, inf)")

Nothing here imports PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import unknown
from config.own_parts import is_own_part

INTERVAL = re.compile(r"([\[(])(-?[\d.]+|-inf), (-?[\d.]+|inf)([\])])")


@dataclass(frozen=True)
class Declared:
    """The declaration of one setting.

    Attributes:
        description: a text that stands alone, with the unit.
        within: the interval of a number or of every number of a list, such as "[0, 1)"; empty for any finite number.
        choices: the names that a text may have; empty for a text that a table of the project checks.
        aliases: other names for a choice, which become that choice.
        length: the number of items of a list; 0 for any.
        table: file and dictionary that hold the names, such as ("models/feed_forward.py", "FEED_FORWARDS"). Such a
            setting also takes a user-defined part, `path/to/file.py:NAME` (config/own_parts.py).
    """

    description: str
    within: str = ""
    choices: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    length: int = 0
    table: tuple[str, str] | None = None

    def condition(self) -> str:
        """The range in words, such as ">= 1" or "in [0, 1)"; empty where every value is allowed."""
        if not self.within:
            return ""
        interval = INTERVAL.fullmatch(self.within)
        assert interval is not None, f"{self.within} is no interval"
        opening, low, high, _ = interval.groups()
        if high == "inf":
            return f"{'>=' if opening == '[' else '>'} {low}"
        return f"in {self.within}"

    def problem(self, path: str, value: Any) -> str | None:
        """The sentence for a value that this setting cannot have; None for a valid one."""
        if self.table is not None and is_own_part(value):
            return None
        if self.choices and isinstance(value, str) and value not in self.choices:
            return unknown(path, value, list(self.choices))
        if isinstance(value, list):
            return self._problem_of_list(path, value)
        if isinstance(value, dict):  # options of a part, whose ranges the part knows
            odd = [name for name, number in value.items() if isinstance(number, float) and not math.isfinite(number)]
            return f"{path}.{odd[0]} must be a finite number, got {value[odd[0]]}" if odd else None
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not self._contains(value):
            return f"{path} must be {self.condition() or 'a finite number'}, got {value}"
        return None

    def _problem_of_list(self, path: str, values: list[Any]) -> str | None:
        numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
        if not numbers or (self.length and len(values) != self.length):
            return f"{path} must be a list of {self.length or 'some'} numbers, got {values}"
        if not all(map(self._contains, values)):
            return f"{path} must have numbers {self.condition() or 'that are finite'}, got {values}"
        return None

    def _contains(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if not self.within:
            return True
        interval = INTERVAL.fullmatch(self.within)
        assert interval is not None, f"{self.within} is no interval"
        opening, low, high, closing = interval.groups()
        above = float(low) <= value if opening == "[" else float(low) < value
        below = value <= float(high) if closing == "]" else value < float(high)
        return above and below


def setting(
    default: Any,
    description: str,
    within: str = "",
    choices: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    length: int = 0,
    table: tuple[str, str] | None = None,
) -> Any:
    """Return the dataclass field of a setting; a list or dictionary as `default` is copied for every instance."""
    metadata = {"declared": Declared(description, within, choices, aliases or {}, length, table)}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
