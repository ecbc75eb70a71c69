"""Heartbeats to the lighthouses, and calls that wait in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from parallel.peers.endpoint import coordination, lighthouse_of

BEAT_SECONDS = 0.5  # between heartbeats
SILENT_SECONDS = 4.0  # a lighthouse that has not answered for so long is given up for the next


class Heartbeat(threading.Thread):
    """Tells one lighthouse that this peer is alive, and notes whether it answers."""

    def __init__(self, place: str, peer: str, is_alive: Callable[[], bool]):
        super().__init__(name=f"heartbeat to {place}", daemon=True)
        self.place, self.peer, self.is_alive = place, peer, is_alive
        self.ended = threading.Event()
        self.tried = False
        self._client: Any = None
        self._heard = float("-inf")

    @property
    def answers(self) -> bool:
        return time.monotonic() - self._heard < SILENT_SECONDS

    def begin_anew(self) -> None:
        """Believe in this lighthouse again when it has answered over a new connection."""
        self._client, self._heard = None, float("-inf")

    def run(self) -> None:
        limit = timedelta(seconds=SILENT_SECONDS / 2)
        while not self.ended.is_set():
            if self.is_alive():
                try:
                    client = self._client or coordination().LighthouseClient(
                        lighthouse_of(self.place), connect_timeout=limit
                    )
                    self._client = client
                    client.heartbeat(self.peer, timeout=limit)
                    self._heard = time.monotonic()
                except (RuntimeError, TimeoutError):
                    self._client = None
                self.tried = True
            self.ended.wait(BEAT_SECONDS)


def background(function: Callable[..., Any], *arguments: Any) -> Future:
    """Call a function in a thread that does not keep the process alive: it may wait for peers that never come."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
