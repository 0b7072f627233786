"""Which copies of a repeated block decide as one: all, all but the ends, or every second and so on.

Copies that decide as one cost the solver nothing, but a choice is then made for all of them: where
memory or the time to hide behind binds, the best plan would make it for some. Parts of a half, a
quarter, an eighth ... of the copies make up every share of them, and spread it evenly, so that
communication finds compute to hide behind wherever it is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from autopar.planner.space import SearchSpace

_NUMBER = re.compile(r"(?:^|(?<=\.))\d+(?=\.|$)")

# A list of blocks (the name before its number), and the number; None where there is none.
Place = tuple[str, int] | None


def ends_apart(classes: Sequence[int]) -> list[int]:
    """The classes, with the first and the last copy each in one of their own."""
    count = Counter(classes)
    seen: Counter[int] = Counter()
    free = max(classes, default=0) + 1
    found = []
    for c in classes:
        seen[c] += 1
        end = count[c] > 2 and seen[c] in (1, count[c])
        found.append(free if end else c)
        free += end
    return found


def interleaved(classes: Sequence[int], places: Sequence[Place], parts: int) -> list[int]:
    """Classes divided so that every share of the copies is one part or a few, evenly spread: every
    second copy, of the rest every second, and so on.

    Args:
        classes: per node.
        places: per node; nodes without one stay in one class.
        parts: into how many; the last is what is left.
    """
    count = Counter(classes)
    numbers: dict[str, set[int]] = defaultdict(set)
    for c, place in zip(classes, places, strict=True):
        if place is not None and count[c] > 1:
            numbers[place[0]].add(place[1])
    part_of: dict[Place, int] = {}
    for name, found in numbers.items():
        for k, number in enumerate(sorted(found), 1):
            halvings = (k & -k).bit_length() - 1
            part_of[name, number] = min(halvings, parts - 1)
    keys: dict[tuple[int, int], int] = {}
    return [
        keys.setdefault((c, part_of.get(place, 0) if count[c] > 1 else 0), len(keys))
        for c, place in zip(classes, places, strict=True)
    ]


def places(space: SearchSpace, classes: Sequence[int]) -> list[Place]:
    """Per decision the list of blocks that it is in and its number there: the number in its name that
    differs between the copies of its class."""
    names = []
    for decision in space.decisions:
        parameter = space.graph.parameters.get(str(decision.node.target), "")
        names.append(
            parameter or (space.graph.info(decision.node).module if decision.node.meta else "")
        )
    by_class: dict[int, list[int]] = defaultdict(list)
    for v, c in enumerate(classes):
        by_class[c].append(v)
    found: list[Place] = [None] * len(names)
    for copies in by_class.values():
        numbers = [[int(x) for x in _NUMBER.findall(names[v])] for v in copies]
        if len({len(n) for n in numbers}) != 1:
            continue
        differing = [i for i, column in enumerate(zip(*numbers, strict=True)) if len({*column}) > 1]
        if not differing:
            continue
        for v, n in zip(copies, numbers, strict=True):
            at = differing[0]
            matches = list(_NUMBER.finditer(names[v]))
            found[v] = names[v][: matches[at].start()], n[at]
    return found
