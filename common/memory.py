"""Memory that tensors free stays with the process, so that the next ones need no page faults."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
NEVER = 2**31 - 1  # bytes; mallopt takes an int
LARGEST_FROM_HEAP = (2**30, 2**25)  # bytes; older versions of glibc take no more than the second
GROW_BY = 2**26  # bytes by which the heap grows at a time
SWITCH = "KEEP_FREED_MEMORY"  # "off": benchmarks/freed_memory.py compares


@cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc keep freed memory, and take large blocks from the heap too. Returns whether it does.

    By default each block of some megabytes is mapped at its allocation and unmapped when it is freed. A training step
    on a CPU allocates hundreds of such tensors, and the kernel then clears and maps their pages again each time.
    Variables such as MALLOC_TRIM_THRESHOLD_ or another allocator leave the choice to the user.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    if os.environ.get(SWITCH) == "off" or "malloc" in preloaded or any(name[:7] == "MALLOC_" for name in os.environ):
        return False
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    took = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST_FROM_HEAP)
    return bool(took and mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_TOP_PAD, GROW_BY))
