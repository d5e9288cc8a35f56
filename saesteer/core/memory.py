"""Memory that is freed and asked for again a moment later."""

import ctypes
import sys
from functools import cache

# mallopt's names in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**30


@cache
def keep_freed_memory() -> None:
    """Let this process keep up to 1 GB an arena of what it frees, where glibc is its allocator.

    By default glibc hands large blocks back to the system, which clears their pages anew for the
    next tensor: a small model's pass on a CPU spends up to a third of its time on that.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _KEPT)
        mallopt(_TRIM_THRESHOLD, _KEPT)
