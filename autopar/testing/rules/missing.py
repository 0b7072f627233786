"""Correct strategies that an op's rule omits, by trial on several drawn calls."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
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
from autopar.testing.rules.draw import Draw
from autopar.testing.rules.explained import why_omitted
from autopar.testing.rules.one_op import OneOp, one_op
from autopar.testing.rules.random_ops import UNDEFINED
from autopar.testing.rules.samples import draw_call, find_op

_Dims = tuple[int, ...]

_SIZE = 6  # of dims: enough for uneven parts


@dataclass(frozen=True)
class Evidence:
    """A strategy, correct in `held` of `tried` trials, and the reason why the rule omits it."""

    strategy: AxisStrategy
    held: int
    tried: int
    example: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.strategy}: in {self.held} of {self.tried} tries, such as {self.example}"


@dataclass(frozen=True)
class Coverage:
    """Number of correct strategies of an op, and those that its rule omits."""

    strategies: int
    omitted: tuple[Evidence, ...]

    @property
    def missing(self) -> list[Evidence]:
        """Omitted strategies without a reason."""
        return [e for e in self.omitted if e.reason is None]


def discover(
    name: str, seed: int, calls: int = 12, *, careful: bool = False
) -> tuple[dict[_Dims, list[Evidence]], dict[_Dims, list[int]]]:
    """Strategies that are correct for random calls, and result dims, by the operands' numbers of
    dims.

    Raises:
        KeyError: there is no sampler for the op's arguments.
    """
    ones = []
    for one in _drawn(name, seed, 4 * calls):
        ones.append(one)
        if len(ones) == calls:
            break
    results = {dims_of(one): [t.ndim for t in one.outputs] for one in ones}
    return from_calls(ones, Draw(random.Random(seed)), careful=careful), results


def _drawn(name: str, seed: int, count: int) -> Iterator[OneOp]:
    """So many random calls, without those that torch refuses."""
    op = find_op(name)
    assert op is not None
    for number in range(count):
        one = draw_call(op, Draw(random.Random(f"{seed} {name} {number}"), _SIZE))
        if one is not None:
            yield one


def dims_of(one: OneOp) -> _Dims:
    """Numbers of dims of the operands, -1 where absent."""
    return tuple(-1 if x is None else x.ndim for x in one.inputs)


def from_calls(
    ones: Sequence[OneOp], draw: Draw, *, careful: bool = False
) -> dict[_Dims, list[Evidence]]:
    """As `discover`, for these calls."""
    correct: dict[_Dims, dict[AxisStrategy, list[OneOp]]] = defaultdict(lambda: defaultdict(list))
    for one in ones:
        for _, strategy in _correct(one, draw, careful):
            correct[dims_of(one)][strategy].append(one)
    evidence = {}
    for dims, by_strategy in correct.items():
        similar = [one for one in ones if dims_of(one) == dims]
        evidence[dims] = [
            Evidence(strategy, len(calls), _eligible(strategy, similar), str(calls[0].sample))
            for strategy, calls in sorted(by_strategy.items())
        ]
    return evidence


def _correct(one: OneOp, draw: Draw, careful: bool) -> Iterator[tuple[int, AxisStrategy]]:
    """Numbers of parts, and strategies that are correct for these and the call, whatever the
    order of its elements."""
    again = _shuffled(one, draw)
    for parts in PARTS:
        for strategy in correct_strategies(one, parts, draw, careful=careful):
            if again is None or strategy in recheck(again, strategy, parts, draw):
                yield parts, strategy


def _eligible(strategy: AxisStrategy, ones: Sequence[OneOp]) -> int:
    """Number of (call, parts) in which the strategy could be tried."""

    def possible(one: OneOp, parts: int) -> bool:
        operands = zip(one.inputs, strategy.inputs, one.trained, strict=True)
        return all(s in options_of(x, trained, parts) for x, s, trained in operands) and compatible(
            one, (*strategy.inputs, *strategy.outputs), parts
        )

    return sum(possible(one, parts) for one in ones for parts in PARTS)


def _shuffled(one: OneOp, draw: Draw) -> OneOp | None:
    """The call with the elements of its float operands in another order."""

    def shuffle(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return [shuffle(i) for i in x] if isinstance(x, list | tuple) else x
        if not x.dtype.is_floating_point:
            return x
        return x.flatten()[torch.randperm(x.numel(), generator=draw.generator)].view(x.shape)

    sample = one.sample
    kwargs = {k: shuffle(v) for k, v in sample.kwargs.items()}
    shuffled = replace(sample, args=tuple(map(shuffle, sample.args)), kwargs=kwargs)
    try:
        return one_op(shuffled, draw)
    except (RuntimeError, ValueError):
        return None


def coverage_of(name: str, seed: int, calls: int = 24, *, careful: bool = False) -> Coverage:
    """Correct strategies of an op, and those that its rule omits.

    A strategy is reported if it is correct in all trials. A split is also reported if it is correct
    in some, because a condition on the arguments might distinguish these.
    """
    if name in UNDEFINED:
        return Coverage(0, ())
    offered: Counter[tuple[_Dims, AxisStrategy]] = Counter()
    omitted: dict[tuple[_Dims, AxisStrategy], list[OneOp]] = defaultdict(list)
    ones = []
    draw = Draw(random.Random(seed))
    for one in _drawn(name, seed, calls):
        if not one.rule[1] or _has_few_elements(one) or (careful and _ambiguous(one)):
            continue
        ones.append(one)
        tables = {parts: _rule_strategies(one, parts) for parts in PARTS}
        for parts, strategy in _correct(one, draw, careful):
            key = _similar(one, strategy), strategy
            if _offers(tables[parts], strategy):
                offered[key] += 1
            else:
                omitted[key].append(one)
    evidence: dict[AxisStrategy, Evidence] = {}
    for (similar, strategy), having in sorted(omitted.items(), key=lambda item: item[0]):
        held = len(having) + offered[similar, strategy]
        tried = _eligible(strategy, [one for one in ones if _similar(one, strategy) == similar])
        reads = any(s != "R" for s in strategy.outputs)
        at_times = 3 * held >= tried and held >= 4 and "P" not in strategy.inputs
        if reads and len({id(one) for one in having}) > 1 and (held == tried or at_times):
            example = str(min(having, key=OneOp.elements).sample)
            reason = why_omitted(name, strategy)
            before = evidence.get(strategy, Evidence(strategy, 0, 0, example, reason))
            evidence[strategy] = replace(
                before, held=before.held + held, tried=before.tried + tried
            )
    return Coverage(
        len({strategy for _, strategy in offered} | evidence.keys()), tuple(evidence.values())
    )


def _rule_strategies(one: OneOp, parts: int) -> set[AxisStrategy]:
    """The strategies of the op's rule."""

    def states(specs: Any) -> tuple[str, ...]:
        return tuple(ABSENT if s is None else s.state(0).replace("V", "R") for s in specs)

    return {AxisStrategy(states(s.inputs), states(s.outputs)) for s in one.strategies((parts,))}


def _similar(one: OneOp, strategy: AxisStrategy) -> _Dims:
    """Key of calls that share a strategy: numbers of dims if it splits, else which operands
    exist."""
    splits = any(s.startswith("S") for s in (*strategy.inputs, *strategy.outputs))
    return dims_of(one) if splits else tuple(min(n, 0) for n in dims_of(one))


def _offers(table: set[AxisStrategy], strategy: AxisStrategy) -> bool:
    """Whether the rule has the strategy, or one that takes a sum where this takes a replica."""
    for t in table:
        states = zip(t.inputs, strategy.inputs, strict=True)
        weaker = all(a == b or (a, b) == ("P", "R") for a, b in states)
        if t.inputs == strategy.inputs or (weaker and t.outputs == strategy.outputs):
            return True
    return False


def _has_few_elements(one: OneOp) -> bool:
    """Whether strategies may be correct by chance."""
    return max((x.numel() for x in one.inputs if x is not None), default=0) < 6


def _ambiguous(one: OneOp) -> bool:
    """Whether two dims of a tensor have the same extent."""
    return any(len(set(x.shape)) < x.ndim for x in one.inputs if x is not None)
