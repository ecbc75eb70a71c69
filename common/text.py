"""Formatting of durations, names and errors for the screen, commands to type, and the last error of a log."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

# What torch.distributed puts before each line of a traceback, and a line that names an error.
RANK, ERROR = re.compile(r"\[rank\d+\]: *"), re.compile(r"error\b|[\w.]*(Error|Exception|Interrupt)\b")


def shorten(text: str, length: int) -> str:
    """Shorten a name to `length` letters; the middle is cut, because long names often differ at their ends."""
    tail = (length - 1) // 3
    return text if len(text) <= length else text[: length - 1 - tail] + "…" + text[len(text) - tail :]


def duration(seconds: float) -> str:
    """Format a duration: 92 s, 15 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def quoted(word: object) -> str:
    """Return a word of a command as the user types it: quoted if it has a space or another special letter."""
    return shlex.quote(str(word))


def python_command(*words: object) -> str:
    """Return a command of the project as the user types it."""
    return " ".join(["python", *map(quoted, words)])


def last_error(log: str) -> str | None:
    """Return the last line of a log that names an error, or else its last line; None for an empty log."""
    lines = [RANK.sub("", line.strip(), count=1) for line in log.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Training failed")]
    errors = [line for line in lines if ERROR.match(line)]
    return without_paths((errors or lines)[-1]) if lines else None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def type_and_first_line(error: BaseException) -> str:
    """Return `ValueError: the first line of its message`, or the name of the type alone where it has none."""
    name, line = type(error).__name__, first_line(error)
    return line if line == name else f"{name}: {line}"


def without_paths(text: str) -> str:
    """Shorten every absolute path and every path that starts with `../` to its last part, since reports are shared."""
    return re.sub(r"(?<![\w.:/])(?:/(?:[^\s/'\"]+/)+|(?:\.\./)+(?:[^\s/'\"]+/)*)", "", text)


NAMES_SHOWN = 10


def listed(names: Iterable[object]) -> str:
    """Format names as `'a', 'b' and 3 more`: up to ten names and a count of the rest."""
    names = list(names)
    shown = ", ".join(f"'{name}'" for name in names[:NAMES_SHOWN])
    return shown + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")


def epochs_text(step: int, steps_per_epoch: int) -> str:
    """Return the length of a run for a sentence: 1 epoch, 12 epochs, 6.5 epochs, 0.02 epochs."""
    epochs = step / steps_per_epoch
    amount = f"{epochs:.2g}" if epochs < 1 else f"{epochs:.1f}".removesuffix(".0")
    return f"{amount} epoch{'' if amount == '1' else 's'}"


def precision_text(precision: str) -> str:
    """Return for the screen what run.json has as a precision: autocast keeps fp32 weights and computes in bf16."""
    return {"bf16": "bf16 incl. weights", "autocast": "bf16"}.get(precision, precision)
