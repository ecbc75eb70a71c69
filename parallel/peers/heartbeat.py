"""Heartbeats to the lighthouses, and function calls in background threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any

from parallel.peers.endpoint import coordination, lighthouse_of

BEAT_SECONDS = 0.5  # between heartbeats
SILENT_SECONDS = 4.0  # without an answer, until the next lighthouse is used


class Heartbeat(threading.Thread):
    """Sends heartbeats of this peer to one lighthouse and records whether it answers."""

    def __init__(self, endpoint: str, peer: str, is_alive: Callable[[], bool]):
        super().__init__(name=f"heartbeat to {endpoint}", daemon=True)
        self.endpoint, self.peer, self.peer_is_alive = endpoint, peer, is_alive
        self.ended = threading.Event()
        self.tried = False
        self._client: Any = None
        self._heard = float("-inf")

    @property
    def answers(self) -> bool:
        return time.monotonic() - self._heard < SILENT_SECONDS

    def reconnect(self) -> None:
        """Count this lighthouse as answering again only after it answers over a new connection."""
        self._client, self._heard, self.tried = None, float("-inf"), False

    def run(self) -> None:
        limit = timedelta(seconds=SILENT_SECONDS / 2)
        while not self.ended.is_set():
            if self.peer_is_alive():
                try:
                    client = self._client or coordination().LighthouseClient(
                        lighthouse_of(self.endpoint), connect_timeout=limit
                    )
                    self._client = client
                    client.heartbeat(self.peer, timeout=limit)
                    self._heard = time.monotonic()
                except (RuntimeError, TimeoutError, ValueError):
                    self._client = None
                self.tried = True
            self.ended.wait(BEAT_SECONDS)


def background(function: Callable[..., Any], *arguments: Any) -> Future:
    """Call a function in a daemon thread, because a wait for peers must not keep the process alive."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
