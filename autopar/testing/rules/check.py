"""`autopar rules check`: random calls, meshes and strategies for every op of the table."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch

from autopar.sharding.node_rules import call_of
from autopar.sharding.rule import Strategy
from autopar.sharding.rules.registry import DERIVED, ROWS
from autopar.testing.rules.case import Outcome, check_case
from autopar.testing.rules.draw import Draw
from autopar.testing.rules.one_op import OneOp
from autopar.testing.rules.samples import draw_call, find_op, table_ops
from autopar.testing.rules.shards import Mesh

# Small meshes find most errors, and larger ones test the order of axes.
MESHES: tuple[Mesh, ...] = (
    (2,), (3,), (4,), (2,), (3,), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (2, 2, 2), (2, 1, 3),
)  # fmt: skip
_POINTWISE_SHARE = 0.35  # of the cases that an op with a row of its own gets
_SHRINK_S = 4.0
_DISTINCT = 3  # failures reported per op


@dataclass(frozen=True)
class Failure:
    """A failed case, as small as the search could make it."""

    call: str
    mesh: Mesh
    strategy: str
    layouts: str
    differences: tuple[str, ...]

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh))
        lines = [self.call]
        if self.strategy:
            lines.append(f"  mesh {mesh}, strategy '{self.strategy}': {self.layouts}")
        return "\n".join([*lines, *(f"  {d}" for d in self.differences)])


@dataclass(frozen=True)
class OpReport:
    """The proof of one op.

    Args:
        cases: number of cases that ran.
        covered, possible: kinds of strategies ("row 0: m", "sum1") that ran, and that exist.
        rows: indices of the row's alternatives that calls reached.
        alternatives: number of alternatives.
        worst: largest error of the correct cases in float64.
        failed: number of failed cases.
        failures: distinct failures.
    """

    name: str
    cases: int
    covered: frozenset[str]
    possible: frozenset[str]
    rows: frozenset[int]
    alternatives: int
    worst: float
    failed: int
    failures: tuple[Failure, ...]
    seconds: float


def prove_op(name: str, cases: int, seed: int) -> OpReport:
    """Run random cases of one op; the same seed runs the same cases."""
    op = find_op(name)
    assert op is not None, name
    alternatives = 1 if name in DERIVED else len(ROWS.get(name, (None,)))
    used: Counter[str] = Counter()
    possible: set[str] = set()
    rows: set[int] = set()
    done = failed = calls = 0
    worst = 0.0
    failures: dict[str, Failure] = {}
    began = time.perf_counter()
    while done < cases and calls < 3 * cases + 20:
        calls += 1
        draw = Draw(random.Random(f"{seed} {name} {calls}"))
        one = draw_call(op, draw)
        if one is None:
            continue
        try:
            ruled, row = one.rule[1], alternative(one)
        except Exception as error:
            failed, done = failed + 1, done + 1
            reason = f"the rule refuses the call: {type(error).__name__}: {error}"
            failures.setdefault("", Failure(str(one.sample), (), "", "", (reason,)))
            continue
        if not ruled:
            continue
        if row in rows and len(rows) < alternatives and calls % 8:
            continue  # until every alternative has been reached
        rows.add(row)
        for mesh, strategy in _cases(one, row, draw, used, possible):
            outcome = check_case(one, mesh, strategy, draw)
            done += 1
            if not outcome.differences:
                worst = max(worst, outcome.worst)
                continue
            failed += 1
            key = " ".join(sorted(kinds(strategy, row)))
            if key not in failures and len(failures) < _DISTINCT:
                failures[key] = _smallest(one, mesh, strategy, outcome, f"{seed} {name}")
            if done >= cases:
                break
    return OpReport(
        name, done, frozenset(used), frozenset(possible), frozenset(rows), alternatives, worst,
        failed, tuple(failures.values()), time.perf_counter() - began,
    )  # fmt: skip


def alternative(one: OneOp) -> int:
    """Index of the op's row that applies to a call; 0 for derived rules."""
    name, arguments = str(one.sample.op), call_of(one.node).arguments
    rows = () if name in DERIVED else ROWS.get(name, ())
    return next((i for i, row in enumerate(rows) if row.applies(arguments)), 0)


def kinds(strategy: Strategy, row: int) -> set[str]:
    """Kinds of a strategy: the factors it splits and the sums that pass through it."""
    tokens = {t.partition(":")[0] for t in strategy.name.split()} - {"-"}
    return {f"row {row}: {t}" if row else t for t in tokens}


def _cases(
    one: OneOp, row: int, draw: Draw, used: Counter[str], possible: set[str]
) -> Iterator[tuple[Mesh, Strategy]]:
    """Strategies of one call, with the least-tested kinds first."""
    mesh = draw.choice(MESHES)
    strategies = one.strategies(mesh)
    by_kind: dict[str, list[Strategy]] = {}
    for strategy in strategies:
        for kind in kinds(strategy, row):
            by_kind.setdefault(kind, []).append(strategy)
    possible.update(by_kind)
    if not by_kind:
        yield mesh, strategies[0]
        return
    rarest = min(by_kind, key=lambda k: used[k])
    for strategy in (draw.choice(by_kind[rarest]), draw.choice(strategies)):
        used.update(kinds(strategy, row))
        yield mesh, strategy


# -- smaller failures ---------------------------------------------------------------------------


def _smallest(one: OneOp, mesh: Mesh, strategy: Strategy, outcome: Outcome, seed: str) -> Failure:
    """The failure, or one of the same kind on a smaller call or mesh."""
    best = one, mesh, strategy, outcome
    kinds_to_keep = {_family(k) for k in kinds(strategy, 0)}
    deadline = time.perf_counter() + _SHRINK_S
    for attempt in range(400):
        if time.perf_counter() > deadline:
            break
        largest = 2 + attempt // 60  # smaller calls first
        draw = Draw(random.Random(f"{seed} smaller {attempt}"), largest)
        small = draw_call(one.sample.op, draw)
        where = draw.choice([(2,), (2,), (3,), mesh])
        size = math.prod(where)
        if small is None or small.elements() * size >= best[0].elements() * math.prod(best[1]):
            continue
        for other in _within(small, where, kinds_to_keep)[:4]:
            again = check_case(small, where, other, draw)
            if again.differences and again.differences[0].value == outcome.differences[0].value:
                best = small, where, other, again
                break
    return _failure(*best)


def _within(one: OneOp, mesh: Mesh, allowed: set[str]) -> list[Strategy]:
    """Strategies of these kinds only, of any kind if there are none."""
    try:
        strategies = one.strategies(mesh) if one.rule[1] else []
    except Exception:  # reported elsewhere
        return []
    return [s for s in strategies if not allowed or {_family(k) for k in kinds(s, 0)} <= allowed]


def _family(kind: str) -> str:
    return re.sub(r"\d+$", "", kind)


def _failure(one: OneOp, mesh: Mesh, strategy: Strategy, outcome: Outcome) -> Failure:
    spelled = [
        ", ".join("-" if s is None else str(s) or "scalar" for s in specs)
        for specs in (strategy.inputs, strategy.outputs)
    ]
    shown = [str(d) for d in outcome.differences[:4]]
    if len(outcome.differences) > 4:
        shown.append(f"... and {len(outcome.differences) - 4} more")
    layouts = " -> ".join(spelled) + (", by lowering" if strategy.lowered else "")
    return Failure(str(one.sample), mesh, strategy.name, layouts, tuple(shown))


# -- the table ----------------------------------------------------------------------------------


def shares(names: Sequence[str], cases: int) -> dict[str, int]:
    """How many cases each op gets: those with a rule of their own more than pointwise ones."""
    own = {n: 1.0 if n in ROWS or n in DERIVED else _POINTWISE_SHARE for n in names}
    unit = cases / sum(own.values())
    return {n: max(1, round(unit * weight)) for n, weight in own.items()}


def matching(pattern: str | None) -> list[str]:
    """Ops of the table by full name or by a part of it.

    Raises:
        ValueError: there are none.
    """
    names = table_ops()
    if pattern is None:
        return list(names)
    matches = [n for n in names if n == pattern] or [n for n in names if pattern in n]
    if not matches:
        raise ValueError(f"no op of the rule table is called {pattern!r}; see autopar rules list")
    return matches


def prove(
    names: Sequence[str],
    cases: int,
    seed: int,
    jobs: int,
    done: Callable[[OpReport], None] = lambda report: None,
) -> list[OpReport]:
    """Run all cases in `jobs` processes; the reports do not depend on their number."""
    work = [(n, count, seed) for n, count in shares(names, cases).items()]
    reports: list[OpReport] = []
    if jobs == 1:
        torch.set_num_threads(1)
        for item in work:
            reports.append(prove_op(*item))
            done(reports[-1])
        return sorted(reports, key=lambda r: r.name)
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes import torch
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(prove_op, *item) for item in work]):
            reports.append(future.result())
            done(reports[-1])
    return sorted(reports, key=lambda r: r.name)
