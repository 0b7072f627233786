"""A row in the notation of `autopar.sharding.rule`, made of what was discovered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.testing.rules.discover import Way
from autopar.testing.rules.missing import Found

_LETTERS = "abcdefghijklmnopqrstuvw"


@dataclass(frozen=True)
class Proposal:
    """What could be written into the table."""

    notation: str
    linear: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        linear = f", linear={self.linear}" if self.linear else ""
        return f'Row("{self.notation}"{linear})'


def propose(
    found: Sequence[Found], input_dims: Sequence[int], output_dims: Sequence[int]
) -> Proposal:
    """The row of calls whose tensors have these numbers of dims (-1: absent).

    Ways that hold wherever they could be tried become factors, the widest first; a dim has one
    factor. Sums that pass through become linear sets.
    """
    sure = [f.way for f in found if f.held >= max(1, f.tried) and not f.way.special]
    splits = [w for w in sure if any(s.startswith("S") for s in (*w.inputs, *w.outputs))]
    splits.sort(key=lambda w: (-_dims(w), w))
    taken: dict[tuple[str, int, int], int] = {}
    terms: set[int] = set()
    for number, way in enumerate(splits):
        places = _places(way)
        if any(p in taken for p in places):
            continue
        taken |= dict.fromkeys(places, number)
        terms |= {i for i, s in enumerate(way.inputs) if s == "P"}
    letters: dict[int, str] = {}

    def pattern(side: str, tensor: int, ndim: int) -> str:
        tokens = []
        for dim in range(ndim):
            number = taken.get((side, tensor, dim))
            if number is None:
                tokens.append("[x]")
            else:
                tokens.append(letters.setdefault(number, _LETTERS[len(letters)]))
        text = " ".join(tokens)
        return f"+{text}" if side == "in" and tensor in terms else text

    left = ", ".join(pattern("in", i, n) for i, n in enumerate(input_dims))
    right = ", ".join(pattern("out", i, n) for i, n in enumerate(output_dims))
    passing = [
        tuple(i for i, s in enumerate(w.inputs) if s == "P" and i not in terms)
        for w in sure
        if set(w.inputs) <= {"R", "P", ""} and set(w.outputs) == {"P"}
    ]
    return Proposal(f"{left} -> {right}", tuple(sorted(passing)))


def _dims(way: Way) -> int:
    return len(_places(way))


def _places(way: Way) -> list[tuple[str, int, int]]:
    return [
        (side, i, int(s[1:]))
        for side, states in (("in", way.inputs), ("out", way.outputs))
        for i, s in enumerate(states)
        if s.startswith("S")
    ]
