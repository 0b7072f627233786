"""Two conversions of the literature, for comparison: greedy, and axis by axis.

Neither considers bytes or links. `LayoutConverter.steps_from` gives both the steps out of a spec.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.ir.spec import ShardingSpec
from autopar.sharding.conversion.converter import LayoutConverter, Step


def greedy(
    converter: LayoutConverter, shape: Sequence[int], source: ShardingSpec, target: ShardingSpec
) -> list[Step]:
    """One step at a time, to the spec nearest the target by the table of Colossal-Auto
    (arXiv:2302.02599), which prices the difference per dim; P and V count like a gather.

    Raises:
        ValueError: every step leads to a spec that the path has visited.
    """
    path: list[Step] = []
    here, seen = source, {source}
    while here != target:
        steps = [s for s in converter.steps_from(shape, here) if s.target not in seen]
        if not steps:
            raise ValueError(f"greedy search is stuck at {here} on the way to {target}")
        best = min(steps, key=lambda s: _difference(s.target, target))
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


def axis_by_axis(
    converter: LayoutConverter, shape: Sequence[int], source: ShardingSpec, target: ShardingSpec
) -> list[Step]:
    """Convert mesh axis by mesh axis, as DTensor's `generate_greedy_transform_infos` does.

    If the source is split, convert from the innermost axis to the outermost: an axis goes to its
    state in the target if it then nests in the right axes, else to R. Then convert the axes that
    are left from the outermost on. The same rule serves orders of axes that DTensor cannot express.

    Raises:
        ValueError: the source is varying where the target is not.
    """
    path: list[Step] = []
    here = source

    def convert(axis: int, state: str) -> None:
        nonlocal here
        steps = [s for s in converter.steps_from(shape, here) if s.axis == axis]
        by_state = {s.target.state(axis): s for s in steps}
        if state not in by_state and "R" not in by_state:
            raise ValueError(f"no step on axis {axis} leads from {here} towards {target}")
        path.append(by_state.get(state) or by_state["R"])
        here = path[-1].target
        if here.state(axis) != state:
            convert(axis, state)

    def nests(axis: int) -> bool:
        """Whether the axes that split the target's dim outside of this one are the right ones."""
        for order, present in zip(target.dims, here.dims, strict=True):
            if axis in order:
                outside = present[: present.index(axis)] if axis in present else present
                return outside == order[: order.index(axis)]
        return True

    def differs(axis: int) -> bool:
        return here.state(axis) != target.state(axis) or not nests(axis)

    split = {axis for order in source.dims for axis in order}
    axes = split | {axis for order in target.dims for axis in order}
    axes |= {*source.partial, *source.varying, *target.partial, *target.varying}
    remaining = set(axes) if split else set()
    while remaining:
        covered = {a for order in here.dims for a in order[:-1]}
        axis = max(a for a in remaining if a not in covered or not differs(a))
        remaining.remove(axis)
        if differs(axis) and (nests(axis) or here.state(axis) != "R"):
            convert(axis, target.state(axis) if nests(axis) else "R")
    while remaining := {a for a in axes if differs(a)}:
        axis = min(a for a in remaining if nests(a))
        convert(axis, target.state(axis))
    return path
