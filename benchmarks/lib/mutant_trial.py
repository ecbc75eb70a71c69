"""A clone of the project in which one mutant at a time is planted and tested.

    trial = Trial(folder, commit, limit_seconds=120)
    verdict = trial.judge(mutant, source)

pytest runs in forked processes that have PyTorch and DeepSpeed in memory (`benchmarks/lib/forked_programs.py`), because
most mutants are noticed by a test of milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from benchmarks.lib.forked_programs import Program
from benchmarks.lib.mutants import Mutant
from benchmarks.lib.nearest_tests import NearestTests
from common.paths import PROJECT

# Without a verdict: the time was over before the nearest test file was.
KILLED, TIMED_OUT, SURVIVED, UNTESTED = OUTCOMES = ("killed", "timed out", "survived", "not tested")
SELECTION = "not slow and not gpu and not cluster"
STAGES = (1, 3, 6)  # test files per pytest process; the rest is one more. Loading all files outlasts most mutants.
PR_SET_PDEATHSIG = 1  # of Linux, sys/prctl.h
Failure = tuple[str, str | None]  # outcome and test


@dataclass(frozen=True)
class Verdict:
    """What the tests said: the first test that failed, and how many test files were run to their end."""

    outcome: str
    test: str | None
    files_run: int
    files: int


class Trial:
    """A clone of the project at a commit.

    Args:
        folder: where the clone is made.
        limit_seconds: time limit of the tests of one mutant, and of each of them.
    """

    def __init__(self, folder: Path, commit: str, limit_seconds: float):
        self.folder, self.limit_seconds = folder, limit_seconds
        self.is_sound: dict[str, bool] = {}  # test -> whether it passes without a mistake
        self._writes = 0
        clone = ["git", "clone", "--quiet", "--shared", "--no-checkout", str(PROJECT), str(folder)]
        subprocess.run(clone, check=True)
        subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", "--detach", commit], check=True)
        self.nearest = NearestTests(folder)

    def judge(self, mutant: Mutant, source: str) -> Verdict:
        """Run the tests on a mutant until one fails that passes without it, or the time is over."""
        left = self.nearest.of(mutant.file)
        began, files, done = time.monotonic(), len(left), 0
        for number, size in enumerate((*STAGES, files)):
            deadline = began + self.limit_seconds * (1 if number else 2)  # the nearest file may take longer
            stage, left = left[:size], left[size:]
            while stage and (seconds := deadline - time.monotonic()) > 0:
                failure, finished = self._run_planted(mutant, source, stage, seconds)
                if failure is None:
                    done += len(stage) if finished else 0
                    break
                outcome, test = failure
                if test is None or self.passes(test):
                    return Verdict(outcome, test, done, files)
        return Verdict(SURVIVED if done or not files else UNTESTED, None, done, files)

    def passes(self, test: str) -> bool:
        """Whether a test passes without a mistake, or a file can be collected; asked once for each."""
        if test not in self.is_sound:
            words = [test] if "::" in test else [test, "--collect-only"]
            self.is_sound[test] = self._run(words, 3 * self.limit_seconds)[0] is None
        return self.is_sound[test]

    def _run_planted(
        self, mutant: Mutant, source: str, stage: list[str], seconds: float
    ) -> tuple[Failure | None, bool]:
        unsound = [f"--deselect={test}" for test, is_sound in self.is_sound.items() if not is_sound]
        self._write(mutant.file, mutant.apply(source))
        try:
            return self._run([*stage, *unsound], seconds)
        finally:
            self._write(mutant.file, source)

    def _write(self, file: str, text: str) -> None:
        path = self.folder / file
        path.write_text(text)
        self._writes += 1  # a time that no earlier content had: compiled files are valid by size and whole seconds
        os.utime(path, (self._writes, self._writes))

    def _run(self, words: list[str], seconds: float) -> tuple[Failure | None, bool]:
        """Run pytest. Return the first failure or None, and whether all tests were run."""
        options = ["-x", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider", "-m", SELECTION]
        options += [f"--session-timeout={max(1, round(seconds))}", f"--timeout={round(self.limit_seconds)}"]
        options += [f"--basetemp={self.folder}.tests"]
        program = Program(run_pytest, (str(PROJECT), str(self.folder), [*options, *words]), {})
        program.process.join(seconds + 2 * self.limit_seconds)
        hangs = program.process.is_alive()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(program.process.pid or 0, signal.SIGKILL)  # and what its tests left running
        program.process.join()
        if hangs:
            return (TIMED_OUT, None), False
        return read_output(program.said(), program.process.exitcode or 0)


def run_pytest(project: str, clone: str, words: list[str]) -> None:
    """Run pytest on the clone, in a forked process: no module of the user's tree stays loaded."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the program, however that ends
    os.chdir(clone)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if file.startswith(project + os.sep) and not file.startswith(sys.prefix + os.sep):
            del sys.modules[name]
    # A program that a test forks would import the main module again, and with it the user's tree.
    sys.modules["__main__"] = ModuleType("__main__")
    sys.path[:] = [clone, *(path for path in sys.path if path not in ("", project))]
    import pytest

    sys.exit(int(pytest.main(words)))


def read_output(output: str, code: int) -> tuple[Failure | None, bool]:
    """Return the first failure that pytest printed or None, and whether all tests were run."""
    if found := re.search(r"^(?:FAILED|ERROR) (\S+?\.py(?:::\w+)*(?:\[.*?\](?= - |$))?)", output, re.MULTILINE):
        hung = re.search(r"Failed: Timeout", output) is not None
        return (TIMED_OUT if hung else KILLED, found[1]), False
    if "session-timeout" in output:
        return None, False
    return (None, True) if code in (0, 5) else ((KILLED, None), False)  # 5: nothing selected; else Python itself died
