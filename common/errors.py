"""What a command says when it cannot do what it was asked: one exception for each part of the project."""

from __future__ import annotations

import difflib

EXIT_STOPPED = 75  # told to stop, and saved: start again to resume


class UserError(ValueError):
    """Something that the user can fix; the message names the thing and the fix, and is all that a command prints."""


class SettingsError(UserError):
    """A setting is unknown, of the wrong type, or not usable; the message names it."""


def unknown(kind: str, name: str, known: list[str]) -> str:
    """The sentence for a name that a table does not hold, with the nearest one suggested."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(sorted(known))})"


class RunError(UserError):
    """The run cannot go on, or its folder cannot be used as asked; the message says why and what to do."""


class DatasetError(UserError):
    """The dataset cannot be used; the message names the file and the mend."""
