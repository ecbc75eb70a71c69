"""Parallel decoding: image files -> exact pixel statistics and packed arrays.

    with decoder(workers=2) as decode:
        facts = decode_split(decode, root, paths, side=32, packed=Path("train.npy"), what="decoding train images")

The result does not depend on the number of workers. `paths` are relative to `root`. The result is a SplitFacts with
sizes, digests, histogram, conversions and errors. With `packed` the decoded images are also written, in the order of
`paths`, as a uint8 array (N, side, side, 3).
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np

from common.progress import progress
from common.stop_signal import end_if_stopped
from image_data.image_file import MAX_MEGAPIXELS, decode_image, reason
from image_data.preparation.image_tree import PrepareError

BLAS_THREADS = "OPENBLAS_NUM_THREADS"
CHUNK = 128  # images per task: small enough for a smooth progress bar, large enough to hide the overhead of a task


@dataclass
class SplitFacts:
    """Result of decoding a split. `sizes`, `digests` and `kept` have one entry per decoded image, in order of paths."""

    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height)
    digests: list[bytes] = field(default_factory=list)  # SHA-256 of size and pixels of each image
    kept: list[int] = field(default_factory=list)  # positions in the list of paths
    broken: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    kinds: Counter = field(default_factory=Counter)  # RGB, RGBA, 16-bit, ...
    formats: Counter = field(default_factory=Counter)  # PNG, JPEG, ... by content, not by suffix
    histogram: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), dtype=np.int64))
    pixels: bytes = b""  # pixels of one chunk, for the packed file

    def add(self, other: SplitFacts) -> None:
        """Append the facts of the next chunk."""
        for name in ("sizes", "digests", "kept", "broken"):
            getattr(self, name).extend(getattr(other, name))
        self.kinds += other.kinds
        self.formats += other.formats
        self.histogram += other.histogram


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def decoder(workers: int) -> Iterator[Callable]:
    """Yield a function like `map` that runs in `workers` processes and keeps the order."""
    pool = _process_pool(workers) if workers > 1 else None
    if pool is None:
        yield map
        return
    with pool:
        try:
            yield partial(_map, pool)
        except BrokenProcessPool:
            end_if_stopped("decoding images")  # a SIGTERM to the whole process group, as of Slurm, ends the workers
            raise PrepareError(
                "a decoding process was killed (out of memory?). Run prepare_dataset.py with --workers 1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _process_pool(workers: int) -> ProcessPoolExecutor | None:
    """Create a pool of worker processes. Returns None, with a warning, where the system offers no semaphores."""
    # New processes instead of forks: a fork of a program with threads, such as those of PyTorch, may crash.
    context = multiprocessing.get_context("spawn")
    try:
        return ProcessPoolExecutor(workers, context, initializer=_exit_with_parent)
    except OSError as error:  # semaphores need /dev/shm, which may be full, read-only or missing
        print(
            f"warning: decoding in one process, because /dev/shm is not usable ({error.strerror or error})",
            file=sys.stderr,
        )
        return None


def _map(pool: ProcessPoolExecutor, function: Callable, items: Sequence) -> Iterator:
    """Call `pool.map`, which starts the processes."""
    with _for_new_processes():
        return pool.map(function, items)


@contextmanager
def _for_new_processes() -> Iterator[None]:
    """Arrange what processes that start meanwhile take over from this one."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # the parent handles Ctrl-C
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")  # else each would run the caller's script, which may have no guard
    threads = os.environ.get(BLAS_THREADS)
    os.environ[BLAS_THREADS] = "1"  # else NumPy starts a thread per core in each
    try:
        yield
    finally:
        os.environ.pop(BLAS_THREADS)
        if threads is not None:
            os.environ[BLAS_THREADS] = threads
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def useful_workers(workers: int, counts: Iterable[int]) -> int:
    """Return how many of `workers` processes can share the decoding of splits with `counts` images, one by one."""
    return min(workers, max(math.ceil(count / CHUNK) for count in counts))


def decode_split(
    decode: Callable,
    root: Path,
    paths: list[str],
    side: int | None,
    packed: Path | None,
    what: str,
    max_megapixels: float = MAX_MEGAPIXELS,
) -> SplitFacts:
    """Decode every image. The packed file is deleted at the first image that is not `side` x `side`."""
    facts = SplitFacts()
    chunks = [(start, paths[start : start + CHUNK]) for start in range(0, len(paths), CHUNK)]
    results = decode(partial(_decode_chunk, str(root), side if packed else None, max_megapixels), chunks)
    file = open(packed, "wb") if packed else None
    try:
        if file:
            assert side is not None
            file.write(_npy_header(0, side))
        for part in progress(results, len(paths), what, weigh=lambda part: len(part.kept) + len(part.broken)):
            facts.add(part)
            if file and packed and set(part.sizes) - {(side, side)}:
                file.close()
                packed.unlink()
                file = None
            elif file:
                file.write(part.pixels)
        if file:
            assert side is not None
            file.seek(0)
            file.write(_npy_header(len(facts.kept), side))
    finally:
        if file:
            file.close()
    return facts


def first_side(root: Path, paths: list[str], max_megapixels: float = MAX_MEGAPIXELS) -> int | None:
    """Return the side of the first image that can be decoded; None if it is not square."""
    for path in paths:
        try:
            height, width, _ = decode_image(root / path, max_megapixels=max_megapixels)[0].shape
            return width if width == height else None
        except Exception:  # reported later, when every image is decoded
            continue
    return None


def mean_and_std(histogram: np.ndarray) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation per channel, pixel values scaled to 0..1, from counts (3, 256).

    Sums of Python integers are exact, so the last digit is the same on every machine.
    """
    mean, std = [], []
    for counts in histogram.tolist():
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(round(total / (255 * n), 6))
        std.append(round(math.sqrt((n * squares - total * total) / (255 * n) ** 2), 6))
    return mean, std


def _exit_with_parent() -> None:
    """Exit this worker when its parent is gone: it may have been killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _decode_chunk(root: str, side: int | None, max_megapixels: float, chunk: tuple[int, list[str]]) -> SplitFacts:
    start, paths = chunk
    facts, arrays = SplitFacts(), []
    for position, path in enumerate(paths, start):
        try:
            pixels, kind, name = decode_image(Path(root, path), max_megapixels=max_megapixels)
        except Exception as error:  # see `decode_image`
            facts.broken.append((path, reason(error)))
            continue
        height, width, _ = pixels.shape
        raw = pixels.tobytes()
        facts.sizes.append((width, height))
        facts.digests.append(hashlib.sha256(b"%dx%d:" % (width, height) + raw).digest())
        facts.kept.append(position)
        facts.kinds[kind] += 1
        facts.formats[name] += 1
        for channel in range(3):
            facts.histogram[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
        if side is not None:
            arrays.append(raw)
    facts.pixels = b"".join(arrays)
    return facts


def _npy_header(count: int, side: int) -> bytes:
    """Return the first 128 bytes of a .npy file (format 1.0); fixed here, because NumPy may change their length."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({count}, {side}, {side}, 3), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"
