"""Which axes of a mesh split alike, where it has many.

An operator has as many strategies as choices of a factor per axis, so their number grows
exponentially with the axes, and that of the conversions between two operators with its square. On a
mesh of many axes, neighbours are taken as one: a plan splits the same dims over both. So such a
search covers fewer plans, and its bound is one of these; its result says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

from autopar.cluster.link import Link
from autopar.ir.spec import ShardingSpec

Groups = tuple[tuple[int, ...], ...]

_MANY, _GROUPS = 4, 3  # more axes than that are searched in so many groups


def single_axes(mesh: Sequence[int]) -> Groups:
    """Each axis that has several ranks by itself."""
    return tuple((axis,) for axis, size in enumerate(mesh) if size > 1)


def axis_groups(
    mesh: Sequence[int], links: Sequence[Link], layouts: Iterable[ShardingSpec] = ()
) -> Groups:
    """The axes of a mesh, those together that split alike in all plans that are searched.

    Neighbours with the same link come first, then those with the fewest ranks, from the front: the
    last axis, which has the fastest links, is for tensor parallelism. Those with different links
    are together only where there are too many without.

    Args:
        layouts: that plans must be able to have: what they split differently is in no group.
    """
    groups = single_axes(mesh)
    if len(groups) <= _MANY:
        return groups
    given = list(layouts)

    def alike(axis: int, other: int) -> bool:
        return all(spec.state(axis) == spec.state(other) for spec in given)

    while len(groups) > _GROUPS:
        pairs = [
            (links[a[-1]] != links[b[0]], prod(mesh[axis] for axis in a + b), k)
            for k, (a, b) in enumerate(pairwise(groups))
            if alike(a[-1], b[0])
        ]
        differ, _, k = min(pairs, default=(True, 0, 0))
        if not pairs or (differ and len(groups) <= _MANY):
            break
        groups = (*groups[:k], groups[k] + groups[k + 1], *groups[k + 2 :])
    return groups


def groups_text(groups: Groups) -> str:
    """`axes 0 and 1, and axes 2 and 3, split alike`; empty if each axis is by itself."""
    merged = [" and ".join(map(str, group)) for group in groups if len(group) > 1]
    return f"axes {', and axes '.join(merged)} split alike" if merged else ""
