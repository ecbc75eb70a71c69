"""Freed memory stays with a process that trains on a CPU, unless the user's environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.memory import SWITCH
from common.paths import PROJECT

# Blocks beyond malloc's largest threshold, freed and allocated again: each page is touched once per block.
PROGRAM = """
import resource, sys
import torch
from common.memory import keep_freed_memory
from parallel.process_group import pick_device
if "pick" in sys.argv:
    pick_device()
for block in range(24):
    if block == 14:  # the heap has its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(40 * 2**20, dtype=torch.uint8)
print(keep_freed_memory(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*words: str, **variables: str) -> tuple[bool, int]:
    """Return whether memory is kept and the page faults of 10 blocks of 40 MiB."""
    ours = (SWITCH, "LD_PRELOAD")
    known = {key: value for key, value in os.environ.items() if key not in ours and key[:7] != "MALLOC_"}
    environment = {**known, "DS_ACCELERATOR": "cpu", **variables}
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_a_process_that_computes_on_a_cpu_keeps_what_tensors_free():
    kept, few = run("pick")
    _, many = run(**{SWITCH: "off"})
    assert kept and few < many / 5, (few, many)


@pytest.mark.parametrize("variable", [SWITCH, "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD"])
def test_the_choice_is_left_to_variables_of_the_user(variable, monkeypatch):
    from common import memory

    monkeypatch.setenv(variable, {SWITCH: "off", "LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}.get(variable, "1"))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("mallopt was called"))
    assert not memory.keep_freed_memory.__wrapped__()
