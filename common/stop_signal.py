"""SIGTERM and Ctrl-C as a request that is remembered, so that work can be saved before the process ends."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from common.errors import StoppedError

LOCK_POLL_SECONDS = 0.1


class StopRequest(Protocol):
    """Something that can ask work to save and end: a signal, or a limit that was reached."""

    @property
    def number(self) -> int:
        """Not 0 once it asks."""


class StopSignal:
    """Remembers the SIGTERM or SIGINT that asked this process to stop; a second Ctrl-C stops it at once.

    Signals belong to the whole process, and so does the newest StopSignal: `stop_requested` asks it.
    """

    newest: StopSignal | None = None

    def __init__(self) -> None:
        self.number = 0  # of the signal
        self.ends_at_once: str | None = None  # work that a signal ends in the middle; see `stopped_at_once`
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        StopSignal.newest = self

    @property
    def requested(self) -> bool:
        """Whether a signal asked this process to stop."""
        return self.number != 0

    def _handle(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self.ends_at_once:
            end_if_stopped(self.ends_at_once)


def stop_requested() -> bool:
    """Whether a signal asked this process to stop; False where no StopSignal was made."""
    return StopSignal.newest is not None and StopSignal.newest.requested


def end_if_stopped(what: str) -> None:
    """Raise StoppedError if a signal asked this process to stop; `what` names the work that ends."""
    if stop_requested():
        raise StoppedError(f"stopped while {what}; the same command starts again")


@contextmanager
def stopped_at_once(what: str) -> Iterator[None]:
    """Let a signal raise StoppedError in the middle of the work that `what` names: a library that cannot ask."""
    end_if_stopped(what)
    stop = StopSignal.newest
    if stop is None:
        yield
        return
    stop.ends_at_once = what
    try:
        yield
    finally:
        stop.ends_at_once = None


def lock_when_free(file: IO[Any], what: str) -> None:
    """Lock a file; wait while another process holds the lock, unless a signal asks this one to stop.

    Raises:
        StoppedError: a signal asked to stop; `what` names the wait.
        OSError: the file system does not support locks.
    """
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            end_if_stopped(what)
            time.sleep(LOCK_POLL_SECONDS)
