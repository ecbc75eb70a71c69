"""Errors that a user can fix: one exception class for each part of the project, and a sentence for a missing package.

Scripts import this file before any package that may be missing.
"""

from __future__ import annotations

import difflib
import sys
from types import TracebackType

from common.paths import PROJECT

EXIT_STOPPED = 75  # stopped on request and saved: the same command resumes
EXIT_INTERRUPTED = 130  # a Ctrl-C before anything could be saved
EXIT_NOTHING_DONE = 2  # wrong arguments, or nothing left to train: nothing was changed


class UserError(ValueError):
    """Something that the user can fix; commands print the message alone: what is wrong and what to do."""


class SettingsError(UserError):
    """A setting that is unknown, of the wrong type, out of range or unusable; the message names it."""


def unknown(kind: str, name: str, known: list[str]) -> str:
    """Return the sentence for a name that a registry does not have, with the nearest known name."""
    by_lower_case = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(str(name).lower(), list(by_lower_case), n=1)
    hint = f"; did you mean '{by_lower_case[near[0]]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (known: {', '.join(sorted(known))})"


class RunError(UserError):
    """A run that cannot continue, or a run folder that cannot be used; the message says why and what to do."""


class RunFinishedError(RunError):
    """A run that has nothing left to train; its folder is unchanged."""


class StoppedError(RunError):
    """A signal asked to stop before there was anything to save: the same command starts or resumes the run."""


class DatasetError(UserError):
    """A dataset that cannot be used; the message names the file and the fix."""


def reason_of(error: Exception) -> str:
    """Return why an optional file or a tracker failed, for a warning: the system's words, or the error's own."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    return getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}"


def print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one sentence for a package that is not installed, and the traceback of any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    is_ours = not package or (PROJECT / package).exists() or (PROJECT / f"{package}.py").exists()
    if not issubclass(kind, ModuleNotFoundError) or is_ours:
        sys.__excepthook__(kind, error, trace)
        return
    print(
        f"error: {sys.executable} lacks the package {package}. Run source .venv/bin/activate first "
        "(./launch_local_train.sh makes .venv and adds what it lacks)",
        file=sys.stderr,
    )


sys.excepthook = print_uncaught  # here and not in a script: packages are imported before a script's first line runs
