"""Correct strategies that an op's rule omits, by trial on several drawn calls."""

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
    AxisStrategy,
    compatible,
    correct_strategies,
    options_of,
    recheck,
)
from autopar.testing.rules.draw import Draw, Sample
from autopar.testing.rules.explained import why_omitted
from autopar.testing.rules.one_op import OneOp, one_op
from autopar.testing.rules.random_ops import UNDEFINED
from autopar.testing.rules.samples import draw_sample, find_op

_Kind = tuple[tuple[int, ...], AxisStrategy]

_SIZE = 6  # of dims: enough for uneven parts


@dataclass(frozen=True)
class Evidence:
    """A strategy, correct in `held` of `tried` trials, and the reason why the rule omits it."""

    strategy: AxisStrategy
    held: int
    tried: int
    example: str
    reason: str | None = None


@dataclass(frozen=True)
class Coverage:
    """Number of correct strategies of an op, and those that its rule omits."""

    strategies: int
    omitted: tuple[Evidence, ...]

    @property
    def missing(self) -> list[Evidence]:
        """Omitted strategies without a reason."""
        return [f for f in self.omitted if f.reason is None]


def rule_strategies(one: OneOp, parts: int) -> set[AxisStrategy]:
    """The strategies of the op's rule."""
    own = set()
    for strategy in one.strategies((parts,)):
        sides = [
            tuple(ABSENT if s is None else s.state(0).replace("V", "R") for s in specs)
            for specs in (strategy.inputs, strategy.outputs)
        ]
        own.add(AxisStrategy(sides[0], sides[1]))
    return own


def discover(
    name: str, seed: int, calls: int = 12, *, careful: bool = False
) -> tuple[dict[tuple[int, ...], list[Evidence]], dict[tuple[int, ...], list[int]]]:
    """Strategies that are correct for random calls, and result dims, by the operands' numbers of
    dims.

    Raises:
        KeyError: the op does not exist, or there is no sampler for its arguments.
    """
    op = find_op(name)
    if op is None:
        raise KeyError(f"this torch has no op {name}")
    ones = []
    for number in range(4 * calls):
        draw = Draw(random.Random(f"{seed} {name} {number}"), _SIZE)
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
) -> dict[tuple[int, ...], list[Evidence]]:
    """As `discover`, for these calls."""
    held: dict[tuple[int, ...], dict[AxisStrategy, list[OneOp]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for one in ones:
        again = _shuffled(one, draw)
        for parts in PARTS:
            for strategy in correct_strategies(one, parts, draw, careful=careful):
                if again is None or strategy in recheck(again, strategy, parts, draw):
                    held[dims_of(one)][strategy].append(one)
    return {
        key: sorted(
            (
                Evidence(
                    strategy,
                    len(calls),
                    _eligible(strategy, [one for one in ones if dims_of(one) == key]),
                    str(calls[0].sample),
                )
                for strategy, calls in by_way.items()
            ),
            key=lambda f: f.strategy,
        )
        for key, by_way in held.items()
    }


def _eligible(strategy: AxisStrategy, ones: Sequence[OneOp]) -> int:
    """Number of (call, parts) in which the strategy could be tried."""
    count = 0
    for one in ones:
        for parts in PARTS:
            possible = all(
                s in options_of(x, t, parts)
                for x, s, t in zip(one.inputs, strategy.inputs, one.trained, strict=True)
            )
            count += possible and compatible(one, (*strategy.inputs, *strategy.outputs), parts)
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


def coverage_of(name: str, seed: int, calls: int = 24, *, careful: bool = False) -> Coverage:
    """Correct strategies of an op, and those that its rule omits.

    A strategy is reported if it is correct in all trials. A split is also reported if it is correct
    in some, because a condition on the arguments might distinguish these.
    """
    if name in UNDEFINED:
        return Coverage(0, ())
    op = find_op(name)
    assert op is not None
    offered: Counter[_Kind] = Counter()
    omitted: dict[_Kind, list[OneOp]] = defaultdict(list)
    ones = []
    draw = Draw(random.Random(seed))
    for number in range(calls):
        fresh = Draw(random.Random(f"{seed} {name} {number}"), _SIZE)
        try:
            one = one_op(draw_sample(op, fresh), fresh)
            known = one.rule[1]
        except (RuntimeError, IndexError, NotImplementedError, ValueError):
            continue
        if not known or _has_few_elements(one) or (careful and _ambiguous(one)):
            continue
        ones.append(one)
        again = _shuffled(one, draw)
        for parts in PARTS:
            table = rule_strategies(one, parts)
            for strategy in correct_strategies(one, parts, draw, careful=careful):
                kind = _calls_like(one, strategy), strategy
                if _offers(table, strategy):
                    offered[kind] += 1
                elif again is None or strategy in recheck(again, strategy, parts, draw):
                    omitted[kind].append(one)
    evidence: dict[AxisStrategy, Evidence] = {}
    for (like, strategy), having in sorted(omitted.items(), key=lambda item: item[0]):
        held = len(having) + offered[like, strategy]
        tried = _eligible(strategy, [one for one in ones if _calls_like(one, strategy) == like])
        reads = any(s != "R" for s in strategy.outputs)
        at_times = 3 * held >= tried and held >= 4 and "P" not in strategy.inputs
        if reads and len({id(one) for one in having}) > 1 and (held == tried or at_times):
            before = evidence.get(
                strategy, Evidence(strategy, 0, 0, str(min(having, key=_weight).sample))
            )
            evidence[strategy] = replace(
                before, held=before.held + held, tried=before.tried + tried
            )
    reports = tuple(replace(f, reason=why_omitted(name, f.strategy)) for f in evidence.values())
    return Coverage(len({strategy for _, strategy in offered} | evidence.keys()), reports)


def _calls_like(one: OneOp, strategy: AxisStrategy) -> tuple[int, ...]:
    """Key of calls that share a strategy: numbers of dims if it splits, else which operands
    exist."""
    splits = any(s.startswith("S") for s in (*strategy.inputs, *strategy.outputs))
    return dims_of(one) if splits else tuple(min(n, 0) for n in dims_of(one))


def _offers(table: set[AxisStrategy], strategy: AxisStrategy) -> bool:
    """Whether the rule has the strategy, or one that takes a sum where this takes a replica."""
    for t in table:
        pairs = zip(t.inputs, strategy.inputs, strict=True)
        weaker = all(a == b or (a, b) == ("P", "R") for a, b in pairs)
        if t.inputs == strategy.inputs or (weaker and t.outputs == strategy.outputs):
            return True
    return False


def _has_few_elements(one: OneOp) -> bool:
    """Whether strategies may be correct by chance."""
    return max((x.numel() for x in one.inputs if x is not None), default=0) < 6


def _ambiguous(one: OneOp) -> bool:
    """Whether two dims of a tensor have the same extent."""
    return any(len(set(x.shape)) < x.ndim for x in one.inputs if x is not None)


def _weight(one: OneOp) -> int:
    return sum(x.numel() for x in one.inputs if x is not None)
