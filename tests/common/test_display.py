"""common/display.py: names as safe text, and streams whose reader goes away. Run: python -m pytest tests/common"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.display import LastingStream, code_block, code_span, escape_markdown, escaped, lasting, printable
from common.paths import PROJECT


def test_control_characters_and_undecodable_bytes_are_replaced():
    assert printable("猫 $x_{$ é\u200d") == "猫 $x_{$ é\u200d"
    assert printable("a\x1b[31m\nb\u202ec") == "a\ufffd[31m\ufffdb\ufffdc"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\ufffd"


def test_control_characters_and_undecodable_bytes_are_escaped():
    assert escaped("猫 é") == "猫 é"
    assert escaped("a\x1b[31m\nb") == "a\\x1b[31m\\nb"
    assert escaped(Path(os.fsdecode(b"in/caf\xe9"))) == "in/caf\\xe9"


def test_markdown_shows_names_as_they_are():
    assert escape_markdown("a|b <img> *c* `d`") == r"a\|b \<img\> \*c\* \`d\`"
    assert code_span("plain") == "`plain`" and code_span("a`b|c") == "``a`b\\|c``" and code_span("`a`") == "`` `a` ``"
    assert code_block("a\n```\nb").splitlines() == ["````", "a", "```", "b", "````"]


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_without_reader_drops_text():
    stream = LastingStream(ClosedPipe())
    for _ in range(3):
        print("text", file=stream, flush=True)
    assert lasting(stream) is stream and lasting(None).write("x") == 1
    closed = io.StringIO()
    closed.close()
    print("text", file=LastingStream(closed), flush=True)


def test_a_full_disk_under_the_output_is_one_warning(capsys):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    stream = LastingStream(Full())
    print("a", file=stream)
    print("b", file=stream)
    assert capsys.readouterr().err == "warning: the output is cut off: No space left on device\n"


@pytest.mark.parametrize("stdout", ["a closed pipe", "closed", "ascii"])
def test_a_process_ends_normally_whatever_happens_to_its_output(stdout):
    code = (
        "from common.display import protect_streams; protect_streams()\n"
        "import sys\nfor i in range(20000): print('ü', i)\nprint('end', file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    if stdout == "closed":
        command = ["bash", "-c", 'exec "$@" >&-', "bash", *command]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii" if stdout == "ascii" else "utf-8"}
    child = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if stdout == "ascii":
        assert child.stdout.readline() == "\\xfc 0\n"
    child.stdout.close()
    assert child.stderr.read() == "end\n" and child.wait() == 0
    child.stderr.close()
