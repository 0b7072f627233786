"""Pointwise functions of masks, and of what is added to scores where a mask shows or does not.

All of them follow from one rule: a function of values that have two levels each has at most 2^n
values, one for each combination of masks that show.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from autopar.tracer.positions import Conjunction, Levels, Shape

_MOST_VARYING = 3  # masks


def combined(
    result: Callable[..., torch.Tensor], operands: Sequence[Levels], shape: Shape
) -> Levels | None:
    """A function's value, by its results for every combination of its operands' levels.

    Where one combination has one value and all others another one, it is a value of the masks
    together.

    Args:
        result: from tensors of one element.
        operands: in the shape of the result.
    """
    operands = [o.inverse() if o.where.is_half and o.where.within[0].high is None else o
                for o in operands]  # fmt: skip
    varying = list(dict.fromkeys(o.where for o in operands if not o.is_constant))
    if len(varying) > _MOST_VARYING:
        return None

    def of(shows: Sequence[bool]) -> torch.Tensor:
        return result(*(
            o.value if o.is_constant else o.inside if shows[varying.index(o.where)] else o.outside
            for o in operands
        ))  # fmt: skip

    results = {c: of(c) for c in itertools.product((True, False), repeat=len(varying))}
    for i in reversed(range(len(varying))):  # those on which nothing depends
        flips = [(c, (*c[:i], not c[i], *c[i + 1 :])) for c in results]
        if all(torch.equal(results[a], results[b]) for a, b in flips):
            results = {(*c[:i], *c[i + 1 :]): r for c, r in results.items() if c[i]}
            del varying[i]
    if not varying:
        return Levels.constant(shape, results[()])
    for corner, inside in results.items():
        others = [r for c, r in results.items() if c != corner]
        where = _where(varying, corner)
        if where is not None and all(torch.equal(r, others[0]) for r in others):
            return Levels(shape, where, inside, others[0])
    return None


def _where(masks: Sequence[Conjunction], shows: Sequence[bool]) -> Conjunction | None:
    """Where some masks show and others do not."""
    both = Conjunction()
    for mask, shown in zip(masks, shows, strict=True):
        if not shown and not mask.is_half:
            return None
        both = both.and_(mask if shown else mask.inverse())
    return both
