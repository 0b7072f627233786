"""Pauses of the garbage collector."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Do not collect reference cycles inside.

    Graphs and search spaces are hundreds of thousands of objects that live on. Collections would
    scan them again and again, which takes an eighth of the time to build them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Collect reference cycles only among objects that are created inside.

    Older objects live on anyway, and scanning them takes longer than the work inside.
    """
    frozen = not gc.get_freeze_count()  # objects that others froze stay frozen
    if frozen:
        gc.freeze()
    try:
        yield
    finally:
        if frozen:
            gc.unfreeze()
