"""The search: the solver over the space, first with repeated blocks alike, then less so.

Copies in repeated blocks share one decision, so that depth costs nothing. That is a restriction:
the first and the last block, whose neighbours are others, are then let free. Where bound and plan
are apart still, every second block decides apart, and so on, so that a choice can be made for any
share of the blocks. Each problem begins from the choices and the prices of the one before. What
each wins says what sharing decisions costs.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopar.errors import InfeasibleError
from autopar.plan import SolverRecord
from autopar.planner.baselines import baseline_plans
from autopar.planner.constraints import Allowed, restricted
from autopar.planner.liveness import Liveness
from autopar.planner.memory_rows import SharedRows
from autopar.planner.repeats import ends_apart, interleaved, places
from autopar.planner.space import SearchSpace
from autopar.solver import PairCost, Problem, Solution, solve
from autopar.solver.problem import Branch, Choices
from autopar.solver.recombination import mixed
from autopar.solver.reductions import Kept, Shared
from autopar.solver.solve import TARGET_GAP
from autopar.units import format_bytes

# Blocks that differ have to win at least this share of a step.
SIMPLER = 1e-4
# Parts of a half, a quarter, ... of the blocks that decide apart; rows are then looked for in so
# many segments of the step.
PARTS, SEGMENTS = 4, 16
# Closing a gap may take so many times as long as what came before, and so many seconds at least.
CLOSING, CLOSING_S = 4.0, 6.0
# Parts of the choices that branching looks at: with all alike, to see whether it closes the gap,
# and with first and last apart, where it did.
REGIONS, MORE_REGIONS = 24, 96


@dataclass(frozen=True)
class Found:
    """Choices per decision, with what is known of their quality.

    Args:
        sharing: what copies shared their decisions, and the best step found so; freer and freer.
    """

    choices: tuple[int, ...]
    step_us: float
    bound_us: float
    method: str
    sharing: tuple[tuple[str, float], ...] = ()

    def record(self, seconds: dict[str, float]) -> SolverRecord:
        gap = max(0.0, 1 - self.bound_us / self.step_us) if self.step_us else 0.0
        return SolverRecord(
            self.method, self.step_us, self.bound_us, gap, seconds, dict(self.sharing)
        )  # fmt: skip


def search(
    space: SearchSpace,
    *,
    time_limit: float,
    progress: Callable[[str], None] | None = None,
    only: Allowed | None = None,
    disable: frozenset[str] = frozenset(),
) -> Found:
    """The fastest plan that is within the budget at every moment of the step.

    Args:
        only: candidates per decision, where not all of them are allowed.

    Raises:
        InfeasibleError: naming the smallest feasible budget.
    """
    say = progress or (lambda line: None)
    start = time.monotonic()
    budget = space.cluster.budget_bytes
    liveness = Liveness(space, budget)
    problem, classes = restricted(*space.problem(), only or {})
    alike, freer = Shared(problem, classes), ends_apart(classes)
    repeated = freer != classes

    def by_hand() -> Iterator[Choices]:
        """What people write, where the search alone finds nothing that fits for a while."""
        say("nothing that fits was found yet: hand-written plans ...")
        for expert in baseline_plans(space, time_limit=time_limit / 8, only=only):
            yield alike.contract(expert.choices)

    try:
        found = _solve(
            alike, liveness, None, time_limit, progress, (), fallback=by_hand, disable=disable,
            recombinations=2 if repeated else 6, regions=REGIONS if repeated else math.inf,
        )  # fmt: skip
    except InfeasibleError as error:
        if not math.isfinite(error.smallest_bytes):
            raise
        mesh = "x".join(map(str, space.mesh))
        raise InfeasibleError(
            f"no plan fits {format_bytes(budget)} per device on mesh {mesh}: the smallest budget "
            f"with a plan is {format_bytes(error.smallest_bytes)} ({error.smallest_bytes:.0f} "
            f"bytes), {_dominating(liveness, alike.expand(error.choices))}. Set the memory to at "
            "least that, use more devices, or make the batch smaller.",
            budget_bytes=budget,
            smallest_bytes=error.smallest_bytes,
        ) from None
    best = Found(alike.expand(found.choices), found.time_us, found.bound_us, found.method)
    steps = {"all alike": found.time_us}

    def solve_freer(
        what: str, freer: Sequence[int], before: Solution, met: Sequence[Choices] = (), **how: Any
    ) -> Solution:
        """From the choices and prices of a solution over all decisions; takes what is better."""
        nonlocal best
        spent = time.monotonic() - start
        left = time_limit - spent
        if how.get("regions") is None:
            left = min(left, max(CLOSING * spent, CLOSING_S))
        if left <= 0:
            return replace(before, near=())
        shared = Shared(problem, freer)
        starts = [shared.contract(c) for c in (best.choices, *before.near, *met)]
        found = _solve(shared, liveness, before, left, progress, starts, disable=disable, **how)
        found = replace(
            found,
            choices=shared.expand(found.choices),
            near=tuple(shared.expand(c) for c in found.near),
        )
        if math.isfinite(found.bound_us):
            steps[what] = found.time_us
            say("blocks " + ", ".join(f"{name} {us:.0f} us" for name, us in steps.items()))
            # what is not better reads better with fewer blocks apart; the bound of the freer holds
            better = found.time_us < best.step_us * (1 - SIMPLER)
            plan = found if better else replace(found, choices=best.choices, time_us=best.step_us)
            bound_us = min(found.bound_us, plan.time_us)
            best = Found(plan.choices, plan.time_us, bound_us, found.method)
        return found

    def mix(freer: Sequence[int], before: Solution) -> Choices | None:
        """What choices met before make when less of them are shared, if that is good enough or
        better by as much as is; over all decisions."""
        shared = Shared(problem, freer)
        starts = [shared.contract(c) for c in (best.choices, *before.near)]
        kept = Kept(shared.problem, [np.unique(column) for column in zip(*starts, strict=True)])
        rows = SharedRows(liveness, shared, SEGMENTS, kept)
        made = mixed(
            replace(kept.problem, rows=tuple(map(rows.named, before.prices))),
            [kept.contract(c) for c in starts],
            separate=rows, prices=before.prices, rounds=6, gap=TARGET_GAP, say=say,
            enough_us=before.relaxed_us / (1 - TARGET_GAP),
            expired=lambda: time.monotonic() - start > time_limit, disable=disable,
        )  # fmt: skip
        choices = shared.expand(kept.expand(made))
        return choices if choices != best.choices else None

    if repeated:
        closed = found.gap <= TARGET_GAP  # else branching does not close that of freer blocks
        ends = solve_freer(
            "first and last apart", freer, replace(found, near=()), recombinations=2,
            regions=MORE_REGIONS if closed else 0, met=[alike.expand(c) for c in found.met],
            tree=_for_most(found.tree, classes, freer) if closed and found.tree and "replay" not in disable else None,
        )  # fmt: skip
        apart = interleaved(freer, places(space, freer), PARTS) if ends.near else freer
        mixes = ends.near and not disable & {"interleaving", "restricted MIP"}
        better = mix(apart, ends) if mixes else None
        if better is not None:
            solve_freer("every second apart", apart, ends, met=[better])
        elif ends.gap > TARGET_GAP:  # any share of the blocks is no better
            solve_freer("first and last apart", freer, ends, recombinations=0,
                        tree=None if "replay" in disable else ends.tree)
    if best.choices != alike.expand(alike.contract(best.choices)):
        choices = _alike_where_equal(problem, liveness, classes, best.choices)
        best = replace(best, choices=choices)
    return replace(best, sharing=tuple(steps.items()))


def _for_most(tree: Branch, classes: Sequence[int], freer: Sequence[int]) -> Branch:
    """How branching divided the choices of classes, for those of most of their copies."""
    copies: dict[int, list[int]] = defaultdict(list)
    order = {c: i for i, c in enumerate(dict.fromkeys(freer))}
    for c, free in zip(classes, freer, strict=True):
        copies[c].append(order[free])
    middle = [same[len(same) // 2] for same in copies.values()]

    def moved(branch: Branch) -> Branch:
        decided = {middle[v]: among for v, among in branch.decided.items()}
        return Branch(decided, branch.prices, tuple(map(moved, branch.parts)))

    return moved(tree)


def _priced(tree: Branch | None) -> list[str]:
    """The names of the rows that have prices in a tree."""
    parts = [name for part in tree.parts for name in _priced(part)] if tree else []
    return [*tree.prices, *parts] if tree else []


def _dominating(liveness: Liveness, choices: Choices) -> str:
    """What the memory of a plan is made of at its peak: kinds, and where most of it is."""
    space, series = liveness.space, liveness.memory
    moment = int(np.argmax(series.values(space, choices)))
    kinds, where = series.kinds(space, choices, moment), series.where(space, choices, moment)
    parts = sorted(kinds.items(), key=lambda kind: -kind[1])
    most = sorted(where.items(), key=lambda place: -place[1])[:3]
    made = ", ".join(f"{kind} {format_bytes(n)}" for kind, n in parts if n)
    held = ", ".join(f"{format_bytes(n)} in {place}" for place, n in most)
    return f"of which {made}; most of it {held}"


def _solve(
    shared: Shared,
    liveness: Liveness,
    before: Solution | None,
    time_limit: float,
    progress: Callable[[str], None] | None,
    starts: Sequence[Choices],
    *,
    segments: int = 1,
    tree: Branch | None = None,
    **how: Any,
) -> Solution:
    """Solve, from the choices and the prices of a more restricted problem, if there was one."""
    prices = before.prices if before is not None else {}
    rows = SharedRows(liveness, shared, segments)
    names = dict.fromkeys([*prices, *_priced(tree)])
    problem = replace(shared.problem, rows=tuple(map(rows.named, names)))
    return solve(
        problem,
        separate=rows,
        starts=starts,
        prices=prices,
        tree=tree,
        time_limit=time_limit,
        progress=progress,
        **how,
    )


def _alike_where_equal(
    problem: Problem, liveness: Liveness, classes: Sequence[int], choices: Choices
) -> Choices:
    """Where a copy's choice costs nothing more than its own, the choice of the copies in the
    middle: plans that differ for no reason are hard to read."""
    copies: dict[int, list[int]] = defaultdict(list)
    for v, c in enumerate(classes):
        copies[c].append(v)
    touching: dict[int, list[PairCost]] = defaultdict(list)
    for edge in problem.edges:
        touching[edge.source].append(edge)
        touching[edge.target].append(edge)
    now = list(choices)

    def local_us(v: int) -> float:
        around = sum(float(e.time_us[now[e.source], now[e.target]]) for e in touching[v])
        return float(problem.time_us[v][now[v]]) + around

    def rest() -> tuple[float, float]:
        excess = liveness.memory.values(liveness.space, now).max() - liveness.memory.limit
        return liveness.late_us(now), max(0.0, float(excess))

    late, excess = rest()
    for same in copies.values():
        usual = now[same[len(same) // 2]]
        for v in same:
            before, kept = local_us(v), now[v]
            if kept == usual:
                continue
            now[v] = usual
            if local_us(v) > before + 1e-9 * max(1.0, abs(before)):
                now[v] = kept
                continue
            then = rest()
            if then[0] > late + 1e-9 * max(1.0, late) or then[1] > excess:
                now[v] = kept
    return tuple(now)
