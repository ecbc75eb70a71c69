"""SIGTERM and Ctrl-C as a request that is remembered, so that work can be saved before the process ends."""

from __future__ import annotations

import signal
from typing import Any, Protocol


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


def stop_requested() -> bool:
    """Whether a signal asked this process to stop; False where no StopSignal was made."""
    return StopSignal.newest is not None and StopSignal.newest.requested
