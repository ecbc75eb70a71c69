"""SIGTERM and Ctrl-C as a request that is remembered, so that work can be saved before the end."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Remembers the number of the SIGTERM or SIGINT that asked for an end; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    @property
    def requested(self) -> bool:
        """Whether an end was asked for."""
        return self.number != 0

    def _handle(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
