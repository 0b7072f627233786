"""Which operators are copies of each other: repeated blocks by their names, unrolled loops by their
operators. Copies share one decision, so that depth and sequence length cost the solver nothing."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

# A body of fewer operators is no loop but a few like operators in a row.
_SMALLEST_BODY = 4
_LARGEST_BODY = 256
_FEWEST_TURNS = 3


def pattern(name: str) -> str:
    """`h.3.attn` to `h.*.attn`: the same place in every copy of a block."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def has_index(name: str) -> bool:
    """Whether a module is part of a list of blocks."""
    return pattern(name) != name


def fold_loops(signatures: Sequence[Hashable]) -> list[tuple[int, bool]]:
    """Places in a sequence, equal for the turns of a loop, and whether each is part of a loop.

    A loop is a run in which every item equals the one a period before it, for three turns or more;
    of several readings the shortest period wins.
    """
    numbers: dict[Hashable, int] = {}
    items = np.array([numbers.setdefault(s, len(numbers)) for s in signatures], dtype=np.int64)
    place = np.arange(len(items))
    looped = np.zeros(len(items), dtype=bool)
    longest = min(_LARGEST_BODY, len(items) // _FEWEST_TURNS)
    for period in range(_SMALLEST_BODY, longest + 1):
        alike = np.r_[False, items[period:] == items[:-period], False].astype(np.int8)
        edges = np.flatnonzero(np.diff(alike))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            # alike at k says that items k and k + period are equal
            whole = slice(start, end + period)
            if end - start < (_FEWEST_TURNS - 1) * period or looped[whole].any():
                continue
            place[whole] = start + (np.arange(start, end + period) - start) % period
            looped[whole] = True
    return [(int(p), bool(x)) for p, x in zip(place, looped, strict=True)]


def places(modules: Iterable[tuple[str, Hashable]]) -> list[Any]:
    """Per operator, given its module and signature in graph order: a key that its copies share, or
    None where it has none."""
    given = list(modules)
    by_module: dict[str, list[int]] = {}
    for i, (module, _) in enumerate(given):
        by_module.setdefault(module, []).append(i)
    found: list[Any] = [None] * len(given)
    for module, indices in by_module.items():
        folded = fold_loops([given[i][1] for i in indices])
        for i, (place, looped) in zip(indices, folded, strict=True):
            if looped or has_index(module):
                found[i] = (pattern(module), place)
    return found
