"""When not to look for garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Look for no reference cycles meanwhile.

    Graphs and spaces are hundreds of thousands of objects that stay; looking through them again and
    again takes an eighth of the time to make them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def existing_objects_frozen() -> Iterator[None]:
    """Look for reference cycles among new objects alone.

    What was made before stays anyway; looking through it takes longer than what is done meanwhile.
    """
    frozen = not gc.get_freeze_count()  # someone else's stay frozen
    if frozen:
        gc.freeze()
    try:
        yield
    finally:
        if frozen:
            gc.unfreeze()
