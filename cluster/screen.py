"""Keep a blocked screen (Ctrl-S, a pager that waits) from blocking the launcher, whose heartbeats keep the ranks alive.

`print` to a terminal or pipe that nobody reads blocks the whole program. A host that receives no heartbeat for 20 s
ends its ranks, so a blocked screen would end a healthy run.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

MAX_WAITING = 100_000  # pieces of text; beyond that, text is dropped (every rank's log has it)
DRAIN_SECONDS = 60.0  # at the end, for the reader to continue


class QueuedStream:
    """A text stream whose `write` never blocks: a thread passes the text to the real stream."""

    def __init__(self, stream: TextIO, max_waiting: int = MAX_WAITING):
        self.stream = stream
        self.waiting: queue.Queue[str] = queue.Queue(max_waiting)
        self.dropped = 0
        threading.Thread(target=self._work, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.waiting.put_nowait(text)
        except queue.Full:
            self.dropped += 1
        return len(text)

    def flush(self) -> None:
        """Return at once; `drain` waits."""

    def _work(self) -> None:
        is_closed = False
        while True:
            text = self.waiting.get()
            if self.dropped and not is_closed and text.endswith("\n"):
                dropped, self.dropped = self.dropped, 0
                text += f"... {dropped} pieces of output are not shown: the screen was blocked; the logs have them\n"
            try:
                if not is_closed:
                    encoding = self.stream.encoding or "utf-8"  # may be ASCII (LANG=C)
                    self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
                    self.stream.flush()
            except (OSError, ValueError):  # the reader is gone (`| head`): training continues without a screen
                is_closed = True
            self.waiting.task_done()

    def drain(self, deadline: float) -> bool:
        """Wait until everything is written, at most until `time.monotonic()` is `deadline`. Return whether it is."""
        while self.waiting.unfinished_tasks and time.monotonic() < deadline:
            time.sleep(0.02)
        return not self.waiting.unfinished_tasks


def run_unblocked(main: Callable[[], int]) -> int:
    """Call `main` with a standard output and error that never block it, and return its exit code.

    If the screen is still blocked `DRAIN_SECONDS` after the end, the process exits without the rest of the output.
    """
    streams = QueuedStream(sys.stdout), QueuedStream(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: os._exit(code))
    deadline = time.monotonic() + DRAIN_SECONDS
    drained = [stream.drain(deadline) for stream in streams]
    if not all(drained):
        os._exit(code)  # a normal exit would wait for the thread that is blocked in a write
    sys.stdout, sys.stderr = (stream.stream for stream in streams)
    return code
