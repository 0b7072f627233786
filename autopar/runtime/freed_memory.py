"""Gives freed host memory back to the system.

glibc keeps freed blocks of less than 32 MiB for the next ones. Small tensors settle in these
blocks, so the next large one finds no room in them, and a process that allocates and frees one
large tensor after another comes to hold many. `malloc_trim` gives back the whole pages among them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

# Blocks of fewer bytes are not worth the call, which walks over the heap.
LARGE_BYTES = 2**20


def return_freed_memory(nbytes: int) -> None:
    """Give back what was freed, if a block of `nbytes` that was freed last is large."""
    if nbytes >= LARGE_BYTES:
        _trim()(0)


@functools.cache
def _trim() -> Callable[[int], object]:
    """glibc's `malloc_trim`; nothing where the C library is another one."""
    try:
        trim: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return lambda _: None
    return trim
