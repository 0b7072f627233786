"""A row in the notation of `autopar.sharding.rule` that states discovered strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.testing.rules.discover import AxisStrategy
from autopar.testing.rules.missing import Evidence

_LETTERS = "abcdefghijklmnopqrstuvw"


@dataclass(frozen=True)
class Proposal:
    """A row for the table."""

    notation: str
    linear: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        linear = f", linear={self.linear}" if self.linear else ""
        return f'Row("{self.notation}"{linear})'


def propose(
    evidence: Sequence[Evidence], input_dims: Sequence[int], output_dims: Sequence[int]
) -> Proposal:
    """The row of calls whose tensors have these numbers of dims (-1: absent).

    Strategies that are correct in all trials become factors, those of most dims first; a dim has
    one factor. Sums that pass through become linear sets.
    """
    sure = [f.strategy for f in evidence if f.held >= max(1, f.tried) and not f.strategy.special]
    splits = [w for w in sure if any(s.startswith("S") for s in (*w.inputs, *w.outputs))]
    splits.sort(key=lambda w: (-_dims(w), w))
    taken: dict[tuple[str, int, int], int] = {}
    terms: set[int] = set()
    for number, strategy in enumerate(splits):
        places = _places(strategy)
        if any(p in taken for p in places):
            continue
        taken |= dict.fromkeys(places, number)
        terms |= {i for i, s in enumerate(strategy.inputs) if s == "P"}
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


def _dims(strategy: AxisStrategy) -> int:
    return len(_places(strategy))


def _places(strategy: AxisStrategy) -> list[tuple[str, int, int]]:
    return [
        (side, i, int(s[1:]))
        for side, states in (("in", strategy.inputs), ("out", strategy.outputs))
        for i, s in enumerate(states)
        if s.startswith("S")
    ]
