"""What an op's rule leaves out, or should say: the ways that hold on several drawn calls."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autopar.testing.rules.discover import (
    ABSENT,
    PARTS,
    Way,
    compatible,
    options_of,
    recheck,
    ways,
)
from autopar.testing.rules.draw import Draw, Sample
from autopar.testing.rules.explained import why_left_out
from autopar.testing.rules.one_op import OneOp, one_op
from autopar.testing.rules.random_ops import UNDEFINED
from autopar.testing.rules.samples import draw_sample, find_op

_Kind = tuple[tuple[int, ...], Way]

_SIZE = 6  # of dims: enough for uneven parts


@dataclass(frozen=True)
class Found:
    """A way that held in `held` of `tried` calls, and why the table may leave it out."""

    way: Way
    held: int
    tried: int
    example: str
    reason: str | None = None


@dataclass(frozen=True)
class Looked:
    """How many ways are right for an op, and those of them that its rule leaves out."""

    ways: int
    left_out: tuple[Found, ...]

    @property
    def missing(self) -> list[Found]:
        """Those for which there is no reason."""
        return [f for f in self.left_out if f.reason is None]


def stated(one: OneOp, parts: int) -> set[Way]:
    """The ways that the table's rule has."""
    found = set()
    for strategy in one.strategies((parts,)):
        sides = [
            tuple(ABSENT if s is None else s.state(0).replace("V", "R") for s in specs)
            for specs in (strategy.inputs, strategy.outputs)
        ]
        found.add(Way(sides[0], sides[1]))
    return found


def discover(
    name: str, seed: int, calls: int = 12, *, careful: bool = False
) -> tuple[dict[tuple[int, ...], list[Found]], dict[tuple[int, ...], list[int]]]:
    """What holds for an op's random calls, by the numbers of dims of its operands; and of results.

    Raises:
        KeyError: the op does not exist, or nothing is known about its arguments.
    """
    op = find_op(name)
    if op is None:
        raise KeyError(f"this torch has no op {name}")
    ones = []
    for turn in range(4 * calls):
        draw = Draw(random.Random(f"{seed} {name} {turn}"), _SIZE)
        sample = draw_sample(op, draw)
        try:
            ones.append(one_op(sample, draw))
        except (RuntimeError, IndexError, NotImplementedError, ValueError):
            continue
        if len(ones) == calls:
            break
    results = {dims_of(one): [t.ndim for t in one.outputs] for one in ones}
    return from_calls(ones, Draw(random.Random(seed)), careful=careful), results


def dims_of(one: OneOp) -> tuple[int, ...]:
    """Numbers of dims of the operands, -1 where absent."""
    return tuple(-1 if x is None else x.ndim for x in one.inputs)


def from_calls(
    ones: Sequence[OneOp], draw: Draw, *, careful: bool = False
) -> dict[tuple[int, ...], list[Found]]:
    """As `discover`, of given calls."""
    held: dict[tuple[int, ...], dict[Way, list[OneOp]]] = defaultdict(lambda: defaultdict(list))
    for one in ones:
        again = _shuffled(one, draw)
        for parts in PARTS:
            for way in ways(one, parts, draw, careful=careful):
                if again is None or way in recheck(again, way, parts, draw):
                    held[dims_of(one)][way].append(one)
    return {
        key: sorted(
            (
                Found(
                    way,
                    len(calls),
                    _eligible(way, [one for one in ones if dims_of(one) == key]),
                    str(calls[0].sample),
                )
                for way, calls in found.items()
            ),
            key=lambda f: f.way,
        )
        for key, found in held.items()
    }


def _eligible(way: Way, ones: Sequence[OneOp]) -> int:
    """In how many (call, parts) the way could be tried at all."""
    count = 0
    for one in ones:
        for parts in PARTS:
            possible = all(
                s in options_of(x, t, parts)
                for x, s, t in zip(one.inputs, way.inputs, one.trained, strict=True)
            )
            count += possible and compatible(one, (*way.inputs, *way.outputs), parts)
    return count


def _shuffled(one: OneOp, draw: Draw) -> OneOp | None:
    """The call with the elements of its float operands in another order."""

    def other(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return [other(i) for i in x] if isinstance(x, list | tuple) else x
        if not x.dtype.is_floating_point:
            return x
        return x.flatten()[torch.randperm(x.numel(), generator=draw.generator)].view(x.shape)

    sample = one.sample
    kwargs = {k: other(v) for k, v in sample.kwargs.items()}
    try:
        return one_op(
            Sample(sample.op, tuple(other(a) for a in sample.args), kwargs, sample.fixed), draw
        )
    except (RuntimeError, ValueError):
        return None


def look_at(name: str, seed: int, calls: int = 24, *, careful: bool = False) -> Looked:
    """Ways that are right for an op, and which of them its rule leaves out.

    Told are those that hold wherever they can be tried, and those that hold at times, by a split,
    which a condition on the arguments might tell apart.
    """
    if name in UNDEFINED:
        return Looked(0, ())
    op = find_op(name)
    assert op is not None
    offered: Counter[_Kind] = Counter()
    left: dict[_Kind, list[OneOp]] = defaultdict(list)
    ones = []
    draw = Draw(random.Random(seed))
    for turn in range(calls):
        fresh = Draw(random.Random(f"{seed} {name} {turn}"), _SIZE)
        try:
            one = one_op(draw_sample(op, fresh), fresh)
            known = one.rule[1]
        except (RuntimeError, IndexError, NotImplementedError, ValueError):
            continue
        if not known or _proves_little(one) or (careful and _ambiguous(one)):
            continue
        ones.append(one)
        again = _shuffled(one, draw)
        for parts in PARTS:
            table = stated(one, parts)
            for way in ways(one, parts, draw, careful=careful):
                kind = _calls_like(one, way), way
                if _offers(table, way):
                    offered[kind] += 1
                elif again is None or way in recheck(again, way, parts, draw):
                    left[kind].append(one)
    found: dict[Way, Found] = {}
    for (like, way), having in sorted(left.items(), key=lambda item: item[0]):
        held = len(having) + offered[like, way]
        tried = _eligible(way, [one for one in ones if _calls_like(one, way) == like])
        reads = any(s != "R" for s in way.outputs)
        at_times = 3 * held >= tried and held >= 4 and "P" not in way.inputs
        if reads and len({id(one) for one in having}) > 1 and (held == tried or at_times):
            before = found.get(way, Found(way, 0, 0, str(min(having, key=_weight).sample)))
            found[way] = replace(before, held=before.held + held, tried=before.tried + tried)
    told = tuple(replace(f, reason=why_left_out(name, f.way)) for f in found.values())
    return Looked(len({way for _, way in offered} | found.keys()), told)


def _calls_like(one: OneOp, way: Way) -> tuple[int, ...]:
    """What calls must share for a way to be the same: dims where it splits them, else operands."""
    splits = any(s.startswith("S") for s in (*way.inputs, *way.outputs))
    return dims_of(one) if splits else tuple(min(n, 0) for n in dims_of(one))


def _offers(table: set[Way], way: Way) -> bool:
    """Whether the rule has it, or the same but for sums: what is whole can be given as one."""
    for t in table:
        pairs = zip(t.inputs, way.inputs, strict=True)
        weaker = all(a == b or (a, b) == ("P", "R") for a, b in pairs)
        if t.inputs == way.inputs or (weaker and t.outputs == way.outputs):
            return True
    return False


def _proves_little(one: OneOp) -> bool:
    """Few elements: much holds by chance."""
    return max((x.numel() for x in one.inputs if x is not None), default=0) < 6


def _ambiguous(one: OneOp) -> bool:
    """Dims that cannot be told apart by their extents."""
    return any(len(set(x.shape)) < x.ndim for x in one.inputs if x is not None)


def _weight(one: OneOp) -> int:
    return sum(x.numel() for x in one.inputs if x is not None)
