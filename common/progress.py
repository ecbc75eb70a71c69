"""Progress of a long step: a bar on a terminal, and a first and a last line in log files and CI.

for image in progress(images, total=len(images), what="decoding"):
    ...
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from common.stop_signal import end_if_stopped

Item = TypeVar("Item")


def progress(
    items: Iterable[Item], total: int, what: str, weigh: Callable[[Item], int] = lambda item: 1
) -> Iterator[Item]:
    """Yield `items` and show on stderr how much of `total` is done; `weigh` returns the units of one item.

    Raises:
        StoppedError: a signal asked this process to stop; what the caller has begun is to be removed as after an error.
    """
    if sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=what, unit_scale=True, dynamic_ncols=True) as bar:
            for item in items:
                yield item
                bar.update(weigh(item))
                end_if_stopped(what)
        return
    started = time.perf_counter()
    print(f"{what}: {total} ...", file=sys.stderr, flush=True)
    for item in items:
        yield item
        end_if_stopped(what)
    print(f"{what}: {total} done in {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
