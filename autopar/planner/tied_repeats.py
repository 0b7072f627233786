"""Which copies of a repeated block are tied: all, all but the ends, or every second and so on.

Tied copies cost the solver nothing, but they all make the same choice: where memory or overlapping
compute binds, the best plan would make it for some of them. Parts of a half, a quarter, an eighth
... of the copies make up every share of them, and spread it evenly, so that communication has
compute to overlap with everywhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from autopar.ir.repeats import INDEX
from autopar.planner.space import SearchSpace

# A list of blocks (the name before its number), and the number; None where there is none.
BlockPosition = tuple[str, int] | None


def untie_ends(classes: Sequence[int]) -> list[int]:
    """The classes, with the first and the last copy each in one of their own."""
    count = Counter(classes)
    seen: Counter[int] = Counter()
    new = max(classes, default=0) + 1
    untied = []
    for c in classes:
        seen[c] += 1
        end = count[c] > 2 and seen[c] in (1, count[c])
        untied.append(new if end else c)
        new += end
    return untied


def interleave(classes: Sequence[int], positions: Sequence[BlockPosition], parts: int) -> list[int]:
    """Divide classes into every second copy, every second of the rest, and so on: every share of
    the copies is then a sum of parts, evenly spread.

    Args:
        classes: per node.
        positions: per node; nodes without one stay in one class.
        parts: how many; the last is the rest.
    """
    count = Counter(classes)
    numbers: dict[str, set[int]] = defaultdict(set)
    for c, position in zip(classes, positions, strict=True):
        if position is not None and count[c] > 1:
            numbers[position[0]].add(position[1])
    part_of: dict[BlockPosition, int] = {}
    for name, copies in numbers.items():
        for k, number in enumerate(sorted(copies), 1):
            halvings = (k & -k).bit_length() - 1
            part_of[name, number] = min(halvings, parts - 1)
    keys: dict[tuple[int, int], int] = {}
    return [
        keys.setdefault((c, part_of.get(position, 0) if count[c] > 1 else 0), len(keys))
        for c, position in zip(classes, positions, strict=True)
    ]


def block_positions(space: SearchSpace, classes: Sequence[int]) -> list[BlockPosition]:
    """Per decision its list of blocks and its number there: the first number in its name that
    differs between the copies of its class."""
    names = [space.location(i) for i in range(len(space.decisions))]
    by_class: dict[int, list[int]] = defaultdict(list)
    for v, c in enumerate(classes):
        by_class[c].append(v)
    positions: list[BlockPosition] = [None] * len(names)
    for copies in by_class.values():
        matches = [list(INDEX.finditer(names[v])) for v in copies]
        if len({len(m) for m in matches}) != 1:
            continue
        numbers = [[int(m[0]) for m in ms] for ms in matches]
        differing = [i for i, column in enumerate(zip(*numbers, strict=True)) if len({*column}) > 1]
        if differing:
            at = differing[0]
            for v, m, n in zip(copies, matches, numbers, strict=True):
                positions[v] = names[v][: m[at].start()], n[at]
    return positions
