"""A row in the notation of `autopar.sharding.rule` that states discovered strategies."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.sharding.rule import Row
from autopar.testing.rules.discover import AxisStrategy
from autopar.testing.rules.missing import Evidence

_LETTERS = "abcdefghijklmnopqrstuvw"


def propose(
    evidence: Sequence[Evidence], input_dims: Sequence[int], output_dims: Sequence[int]
) -> Row:
    """The row of calls whose tensors have these numbers of dims (-1: absent).

    Strategies that are correct in all trials become factors, those of most dims first; a dim has
    one factor. Sums that pass through become linear sets.
    """
    sure = [e.strategy for e in evidence if e.held >= max(1, e.tried) and not e.strategy.special]
    factors: dict[tuple[str, int, int], int] = {}  # by place
    terms: set[int] = set()
    for number, s in enumerate(sorted(sure, key=lambda s: (-len(_places(s)), s))):
        if _places(s) and factors.keys().isdisjoint(_places(s)):
            factors |= dict.fromkeys(_places(s), number)
            terms |= {i for i, state in enumerate(s.inputs) if state == "P"}
    letters: dict[int, str] = {}

    def pattern(side: str, tensor: int, ndim: int) -> str:
        tokens = []
        for dim in range(ndim):
            number = factors.get((side, tensor, dim))
            if number is None:
                tokens.append("[x]")
            else:
                tokens.append(letters.setdefault(number, _LETTERS[len(letters)]))
        text = " ".join(tokens)
        return f"+{text}" if side == "in" and tensor in terms else text

    left = ", ".join(pattern("in", i, n) for i, n in enumerate(input_dims))
    right = ", ".join(pattern("out", i, n) for i, n in enumerate(output_dims))
    linear = [
        tuple(i for i, state in enumerate(s.inputs) if state == "P" and i not in terms)
        for s in sure
        if set(s.inputs) <= {"R", "P", ""} and set(s.outputs) == {"P"}
    ]
    return Row(f"{left} -> {right}", tuple(sorted(linear)))


def _places(strategy: AxisStrategy) -> list[tuple[str, int, int]]:
    """The dims that it splits: side, tensor and dim."""
    return [
        (side, i, int(s[1:]))
        for side, states in (("in", strategy.inputs), ("out", strategy.outputs))
        for i, s in enumerate(states)
        if s.startswith("S")
    ]
