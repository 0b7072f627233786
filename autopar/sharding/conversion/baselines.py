"""Two conversions that are not exact, kept to compare with: greedy, and axis by axis.

Neither knows bytes or links. Both take the steps out of a spec from `LayoutConverter.steps_from`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autopar.ir.spec import ShardingSpec

if TYPE_CHECKING:
    from autopar.sharding.conversion.converter import Step

StepsFrom = Callable[[ShardingSpec], "list[Step]"]


def greedy(steps_from: StepsFrom, source: ShardingSpec, target: ShardingSpec) -> list[Step]:
    """One step at a time, to the spec nearest the target by the table of Colossal-Auto
    (arXiv:2302.02599), which prices the difference per dim; P and V count like a gather.

    Raises:
        ValueError: it went round in circles.
    """
    path: list[Step] = []
    here, seen = source, {source}
    while here != target:
        moves = [s for s in steps_from(here) if s.target not in seen]
        if not moves:
            raise ValueError(f"greedy search is stuck at {here} on the way to {target}")
        best = min(moves, key=lambda s: _difference(s.target, target))
        path.append(best)
        here = best.target
        seen.add(here)
    return path


def _difference(a: ShardingSpec, b: ShardingSpec) -> float:
    gather, shard, penalty = 20, 5, 6

    def dim(x: tuple[int, ...], y: tuple[int, ...]) -> float:
        common = 0
        while common < min(len(x), len(y)) and x[common] == y[common]:
            common += 1
        gathers, shards = len(x) - common, len(y) - common
        return gather * gathers + shard * shards + penalty * max(0, gathers + shards - 1)

    dims = sum(dim(x, y) for x, y in zip(a.dims, b.dims, strict=True))
    pending = set(a.partial) ^ set(b.partial) | set(a.varying) ^ set(b.varying)
    return dims + gather * len(pending)


def axis_by_axis(steps_from: StepsFrom, source: ShardingSpec, target: ShardingSpec) -> list[Step]:
    """Every mesh axis by itself, as DTensor's `generate_greedy_transform_infos` does.

    If the source is split, first from the innermost axis to the outermost: each goes to its state
    in the target if it then nests in the right axes, and else to R. Then from the outermost what is
    missing. Orders of axes that DTensor has no placements for go by the same rule.

    Raises:
        ValueError: the source is varying where the target is not.
    """
    path: list[Step] = []
    here = source

    def turn(axis: int, state: str) -> None:
        nonlocal here
        steps = [s for s in steps_from(here) if s.axis == axis]
        ways = {s.target.state(axis): s for s in steps}
        if state not in ways and "R" not in ways:
            raise ValueError(f"no step on axis {axis} leads from {here} towards {target}")
        path.append(ways.get(state) or ways["R"])
        here = path[-1].target
        if here.state(axis) != state:
            turn(axis, state)

    def nests(axis: int) -> bool:
        """Whether just those axes split the target's dim outside of this one that should."""
        for order, present in zip(target.dims, here.dims, strict=True):
            if axis in order:
                outside = present[: present.index(axis)] if axis in present else present
                return outside == order[: order.index(axis)]
        return True

    def wrong(axis: int) -> bool:
        return here.state(axis) != target.state(axis) or not nests(axis)

    split = {axis for order in source.dims for axis in order}
    axes = split | {axis for order in target.dims for axis in order}
    axes |= {*source.partial, *source.varying, *target.partial, *target.varying}
    todo = set(axes) if split else set()
    while todo:
        covered = {a for order in here.dims for a in order[:-1]}
        axis = max(a for a in todo if a not in covered or not wrong(a))
        todo.remove(axis)
        if wrong(axis) and (nests(axis) or here.state(axis) != "R"):
            turn(axis, target.state(axis) if nests(axis) else "R")
    while todo := {a for a in axes if wrong(a)}:
        axis = min(a for a in todo if nests(a))
        turn(axis, target.state(axis))
    return path
