"""A primal heuristic: the best assignment made of choices that visited assignments make.

The integer program over these choices has a few variables per node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autopar.solver.cutting_planes import CutPool
from autopar.solver.ilp import NothingFaster, size_of, solve_ilp
from autopar.solver.problem import Choices, Problem, Separate
from autopar.solver.reductions import RestrictedDomains
from autopar.solver.subproblem import Subproblem

# variables and seconds of a program
MAX_PROGRAM, SECONDS = 6000, 4.0


def solve_restricted(
    pool: CutPool,
    domains: Sequence[np.ndarray],
    *,
    rounds: int,
    gap: float,
    done: Callable[[], bool],
    say: Callable[[str], None],
    better_by: float = 0.0,
) -> None:
    """Visit the best assignment with choices in `domains`; repeat where it violates new rows.

    Args:
        domains: per node some choices (indices).
        rounds: at most.
        gap: of a program.
        better_by: only visit what is better than the best known by this share.
    """
    for _ in range(rounds):
        rows = len(pool.rows)
        restricted = RestrictedDomains(replace(pool.problem, rows=tuple(pool.rows)), domains)
        variables = size_of(restricted.problem)
        say(f"restricted MIP of {variables} variables")
        if variables > MAX_PROGRAM:
            return
        visit_optimum(pool, restricted, gap=gap, seconds=SECONDS, better_by=better_by)
        say(f"restricted MIP: best {pool.time_us:.0f} us")
        if done() or len(pool.rows) == rows:
            return


def visit_optimum(
    pool: CutPool, restricted: RestrictedDomains, *, gap: float, seconds: float, better_by: float
) -> float:
    """Visit the optimum of an integer program. Returns a lower bound on its assignments, or on
    those better than the best known by a share, under the rows that were known."""
    cutoff = pool.time_us - better_by * abs(pool.time_us)
    try:
        choices, bound = solve_ilp(restricted.problem, time_limit=seconds, gap=gap, cutoff=cutoff)
    except NothingFaster:
        return cutoff
    if choices is not None:
        pool.visit(restricted.expand(choices))
    return min(bound, cutoff)


def combine(
    problem: Problem,
    starts: Sequence[Choices],
    *,
    separate: Separate,
    prices: Mapping[str, float],
    rounds: int,
    gap: float,
    enough_us: float,
    expired: Callable[[], bool],
    say: Callable[[str], None],
    disable: frozenset[str] = frozenset(),
) -> Choices:
    """The best assignment made of choices in `starts`, for a problem that has only these.

    Args:
        starts: some of them within the rows.
        prices: of the problem's rows; starts that are slower at these than the best are left out.
        gap: improvements by less are not searched for.
        enough_us: stop at an assignment as fast as this.
        expired: whether time is over.
    """
    pool = CutPool(problem, separate, disable)
    for start in starts:
        pool.visit(start)
    root = Subproblem(pool, [np.arange(len(t)) for t in problem.time_us])
    root.prices = dict(prices)
    solve_restricted(
        pool, root.near_domains(), rounds=rounds, gap=gap, better_by=gap, say=say,
        done=lambda: pool.time_us <= enough_us or expired(),
    )  # fmt: skip
    assert pool.choices is not None
    return pool.choices
