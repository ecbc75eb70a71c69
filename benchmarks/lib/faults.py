"""The faults of `fault_matrix.py`: each starts a run and interrupts it."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.forked_programs import Done, Program, run_script
from records.run_folder import RunFolder

STOPPED = 75  # exit code of a run that was asked to stop and saved a checkpoint
DISK_MB = 6
CHANGES = (  # audit events; os.replace raises os.rename
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "shutil.rmtree",
)
REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")


class TooLate(Exception):
    """The run was over before the fault occurred."""


@dataclass(frozen=True)
class Round:
    """The state of one round that a fault uses."""

    folder: Path  # holds the run folder `run`
    command: list[str]  # of train.py
    seconds: float  # training time of the undisturbed run
    operations: int  # file operations of the undisturbed run in its folder
    random: random.Random

    @property
    def record(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    def begin(self, plan: tuple[int, str, float] | None = None) -> Program:
        """Start the run; `plan` is what `Operations.inject` does."""
        return Program(train, (str(self.folder / "run"), plan, *self.command), {})

    def some_time(self, program: Program) -> None:
        """Wait for a random moment of training. Raises TooLate if the run was over before."""
        program.wait_for("engine  ")
        time.sleep(self.random.uniform(0, self.seconds))
        if not program.process.is_alive():
            raise TooLate


# --- the faults: each starts a run and interrupts it --------------------------------------------------------------


def killed(now: Round) -> None:
    """SIGKILL at a random moment"""
    program = now.begin()
    now.some_time(program)
    program.send(signal.SIGKILL)
    expect(program.end(), -signal.SIGKILL)


def told_to_stop(now: Round) -> None:
    """SIGTERM at a random moment"""
    program = now.begin()
    now.some_time(program)
    program.send(signal.SIGTERM)
    expect(program.end(), STOPPED)


def killed_saving(now: Round) -> None:
    """killed up to 3 ms after a random file operation in the run folder: nearly always inside a save"""
    operation = now.random.randint(1, now.operations)
    expect(now.begin((operation, "die", now.random.uniform(1e-6, 3e-3))).end(), -signal.SIGALRM)


def no_room(now: Round) -> None:
    """a random file operation in the run folder fails because the disk is full"""
    expect(now.begin((now.random.randint(1, now.operations), "no room", 0.0)).end(), 1)


def short_files(now: Round) -> None:
    """from a random file operation on, the system truncates files beyond a random size (RLIMIT_FSIZE)"""
    expect(now.begin((now.random.randint(1, now.operations), "short files", now.random.uniform(0, 300_000))).end(), 1)


def disk_full(now: Round) -> None:
    """a separate disk is filled to the last byte at a random moment, and emptied before the next start"""
    with small_disk(now.folder):
        program = now.begin()
        now.some_time(program)
        ballast = now.folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        done = program.end()
        ballast.unlink()
        shutil.copytree(now.folder, now.folder.with_name("kept"))
    shutil.copytree(now.folder.with_name("kept"), now.folder, dirs_exist_ok=True)
    expect(done, 1)


def deleted(now: Round) -> None:
    """SIGKILL, then a random file of the run folder, or its newest checkpoint, is deleted"""
    killed(now)
    path = some_file(now)
    shutil.rmtree(path.parent) if now.random.random() < 0.2 and path.parent.name.startswith("step-") else path.unlink()


def cut(now: Round) -> None:
    """SIGKILL, then a random file of the run folder is truncated at a random position"""
    killed(now)
    path = some_file(now)
    os.truncate(path, now.random.randrange(max(1, path.stat().st_size)))


def flipped(now: Round) -> None:
    """SIGKILL, then one bit of a random file of the run folder is flipped"""
    killed(now)
    path = some_file(now)
    content = bytearray(path.read_bytes())
    if content:
        content[now.random.randrange(len(content))] ^= 1 << now.random.randrange(8)
        path.write_bytes(content)


FAULTS: dict[str, Callable[[Round], None]] = {
    "killed": killed,
    "told-to-stop": told_to_stop,
    "killed-saving": killed_saving,
    "no-room": no_room,
    "short-files": short_files,
    "disk-full": disk_full,
    "deleted": deleted,
    "cut": cut,
    "flipped": flipped,
}


def expect(done: Done, code: int) -> None:
    """Raises TooLate for a run that finished, AssertionError for another exit code than the fault's or a traceback."""
    if done.code == 0:
        raise TooLate
    assert done.code == code, f"expected exit code {code}\n{done.text}"
    assert "Traceback" not in done.err, done.err


def some_file(now: Round) -> Path:
    """Return a file that the next start reads: of the newest checkpoint or of the run folder itself."""
    newest = now.record.newest_checkpoint()
    if newest is None or now.record.is_finished():
        raise TooLate
    files = [
        path
        for path in (*newest.iterdir(), now.record.folder / "run.json", now.record.folder / "metrics.jsonl")
        if path.is_file()
    ]
    return now.random.choice(sorted(files))


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of DISK_MB at `folder`. Raises RuntimeError if this process may not mount one."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        raise RuntimeError(f"this process may not mount a disk ({mounted.stderr.strip()})")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# --- inside the program -------------------------------------------------------------------------------------------


def train(run: str, plan: tuple[int, str, float] | None, *command: str) -> None:
    """Run train.py with a fault at the `plan[0]`-th file operation in its run folder."""
    counter = Operations(run, *(plan or (0, "", 0.0)))
    sys.addaudithook(counter.hear)
    try:
        run_script("train.py", *command)
    finally:
        counter.listening = False
        print(f"operations {counter.count}")


@dataclass
class Operations:
    """Counts Python's file operations in a folder and lets one of them fail or be the last."""

    folder: str
    number: int
    what: str
    amount: float
    count: int = 0
    listening: bool = True
    injected: bool = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not (self.listening and event in CHANGES and str(arguments[0]).startswith(self.folder)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.count += 1
        needs_none = (
            self.what == "no room" and event in REMOVALS
        )  # removing a file needs no space: take the next operation
        if self.what and not self.injected and self.count >= self.number and not needs_none:
            self.injected = True
            self.inject()

    def inject(self) -> None:
        if self.what == "die":
            # SIGALRM is not caught, so the process dies in the middle of whatever it is doing.
            signal.setitimer(signal.ITIMER_REAL, self.amount)
        elif self.what == "no room":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(self.amount), int(self.amount)))
