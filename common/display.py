"""Names of runs, classes and files as safe text, and output streams that survive a closed reader.

A class is named after a folder and a run by its user, so a name may hold control characters, Markdown or bytes that are
not UTF-8.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

REPLACEMENT = "\ufffd"
BIDI_CONTROLS = {*"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}  # these reorder the text around them


def printable(text: str) -> str:
    """Return the text with a replacement character for each control character and each byte that is not UTF-8."""
    return "".join(REPLACEMENT if _is_unsafe(character) else character for character in text)


def escaped(text: str | Path) -> str:
    """Return the text with an escape for each control character and each byte that is not UTF-8, so that none is lost.

    It is for file names, which a user then finds by the escape; `printable` is for pages and pictures.
    """
    text = os.fsencode(text).decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _is_unsafe(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_CONTROLS


def escape_markdown(text: str) -> str:
    """Return the text so that Markdown shows it as it is, in a paragraph or in a table cell."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|$~&-])", r"\\\1", printable(text))


def code_span(text: str) -> str:
    """Return the text as inline code of Markdown, also in a table cell. Backticks in the text make the fence longer."""
    text = printable(text)
    fence = "`" * (longest_run(text, "`") + 1)
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}".replace("|", "\\|")


def code_block(text: str) -> str:
    """Return the lines as a fenced code block of Markdown that the text cannot close."""
    fence = "`" * max(3, longest_run(text, "`") + 1)
    return f"{fence}\n{text}\n{fence}"


def longest_run(text: str, character: str) -> int:
    """Return the length of the longest run of one character."""
    return max((len(run) for run in re.findall(re.escape(character) + "+", text)), default=0)


class LastingStream:
    """A text stream that never raises: when its reader is gone, further text is dropped.

    Without it, `train.py | head -1` and a closed terminal end a run with a traceback. A full disk under a log file is
    reported once on stderr.
    """

    def __init__(self, stream: Any):
        self._stream = stream
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # a character that the terminal cannot show becomes an escape

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: write to a closed file
            self._drop_output(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._drop_output(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop_output(self, error: OSError | ValueError) -> None:
        """Point the file descriptor to the null device: the buffered text is dropped, and later writes succeed."""
        try:
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w")  # noqa: SIM115  the stream has no descriptor, or a closed one
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and sys.stderr is not self:
            print(f"warning: the output is cut off: {error.strerror}", file=sys.stderr)


def lasting(stream: Any) -> Any:
    """Return the stream as a LastingStream. None, a stream closed before the start, becomes the null device."""
    if stream is None:
        return open(os.devnull, "w")
    return stream if isinstance(stream, LastingStream) else LastingStream(stream)


def protect_streams() -> None:
    """Make stdout and stderr of this process lasting, so that a reader that goes away ends nothing."""
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
