"""Which operators are copies of each other: repeated blocks by name, unrolled loops by operators.

Copies share one decision, so the size of the planning problem does not grow with depth and sequence
length.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

# The number of a copy in a name.
INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")

# A shorter body is more likely a few equal operators in a row than a loop.
_SMALLEST_BODY = 4
_LARGEST_BODY = 256
_FEWEST_ITERATIONS = 3


def pattern(name: str) -> str:
    """`h.3.attn` to `h.*.attn`: the same name for every copy of a block."""
    return INDEX.sub("*", name)


def has_index(name: str) -> bool:
    """Whether a module is part of a list of blocks."""
    return INDEX.search(name) is not None


def number_in(blocks: str, name: str) -> int | None:
    """The number of the copy that a name is in, of a list of blocks such as "model.layers."."""
    index = INDEX.match(name, len(blocks)) if name.startswith(blocks) else None
    return int(index[0]) if index else None


def by_position(numbers: Sequence[int | None]) -> list[int | None]:
    """The copy that each item of a sequence is in, by the numbers that some of them have. A copy
    begins with the first item of its number and ends where the next one begins: what has no number
    belongs to the copy it follows, and so has what comes late of the copy before."""
    last = max((k for k, n in enumerate(numbers) if n is not None), default=-1)
    copies: list[int | None] = []
    seen = set[int]()
    current: int | None = None
    for n in numbers[: last + 1]:
        if n is not None and n not in seen:
            seen.add(n)
            current = n
        copies.append(current)
    return copies + [None] * (len(numbers) - len(copies))


def fold_loops(signatures: Sequence[Hashable]) -> list[tuple[int, bool]]:
    """Places in a sequence, equal for the iterations of a loop, and whether each is in a loop.

    In a loop, every item equals the one a period before it, for at least three iterations. The
    shortest period wins.
    """
    numbers: dict[Hashable, int] = {}
    items = np.array([numbers.setdefault(s, len(numbers)) for s in signatures], dtype=np.int64)
    place = np.arange(len(items))
    looped = np.zeros(len(items), dtype=bool)
    longest = min(_LARGEST_BODY, len(items) // _FEWEST_ITERATIONS)
    for period in range(_SMALLEST_BODY, longest + 1):
        equal = np.r_[False, items[period:] == items[:-period], False].astype(np.int8)
        edges = np.flatnonzero(np.diff(equal))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            # equal[k] says that items k and k + period are equal
            loop = slice(start, end + period)
            if end - start < (_FEWEST_ITERATIONS - 1) * period or looped[loop].any():
                continue
            place[loop] = start + (np.arange(start, end + period) - start) % period
            looped[loop] = True
    return [(int(p), bool(x)) for p, x in zip(place, looped, strict=True)]


def places(modules: Iterable[tuple[str, Hashable]]) -> list[Any]:
    """Per operator a key that its copies share, or None if it has no copies.

    Args:
        modules: module and signature of each operator, in graph order.
    """
    operators = list(modules)
    by_module: dict[str, list[int]] = {}
    for i, (module, _) in enumerate(operators):
        by_module.setdefault(module, []).append(i)
    keys: list[Any] = [None] * len(operators)
    for module, indices in by_module.items():
        folded = fold_loops([operators[i][1] for i in indices])
        for i, (place, looped) in zip(indices, folded, strict=True):
            if looped or has_index(module):
                keys[i] = (pattern(module), place)
    return keys
