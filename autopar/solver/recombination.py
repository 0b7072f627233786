"""The best assignment made of choices that were met: an integer program of a few per node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from autopar.solver.dual import Pool, Region
from autopar.solver.ilp import NothingFaster, size_of, solve_ilp
from autopar.solver.merging import Merged
from autopar.solver.problem import Choices, Problem, Separate
from autopar.solver.reductions import Kept

# variables and seconds of a program
MAX_PROGRAM, SECONDS = 6000, 4.0


def recombine(
    pool: Pool,
    used: Sequence[np.ndarray],
    *,
    rounds: int,
    gap: float,
    done: Callable[[], bool],
    say: Callable[[str], None],
    better_by: float = 0.0,
) -> None:
    """Look for something better among these choices; once more where that violates new rows.

    Args:
        used: per node the choices (indices).
        rounds: at most.
        gap: of a program.
        better_by: look for what is better by this share alone.
    """
    for _ in range(rounds):
        rows = len(pool.rows)
        kept = Kept(replace(pool.problem, rows=tuple(pool.rows)), used)
        merged = Merged(kept.problem, "merging" not in pool.disable)
        say(f"integer program of {size_of(merged.problem)} variables")
        if size_of(merged.problem) > MAX_PROGRAM:
            return
        by_program(pool, kept, merged, gap=gap, seconds=SECONDS, better_by=better_by)
        say(f"{pool.time_us:.0f} us found by recombination")
        if done() or len(pool.rows) == rows:
            return


def by_program(
    pool: Pool, kept: Kept, merged: Merged, *, gap: float, seconds: float, better_by: float
) -> float:
    """A lower bound on what was kept, or on what of it is better by a share than the best known,
    under the rows known when it was made."""
    cutoff = pool.time_us - better_by * abs(pool.time_us)
    try:
        found, bound = solve_ilp(merged.problem, time_limit=seconds, gap=gap, cutoff=cutoff)
    except NothingFaster:
        return cutoff
    if found is not None:
        pool.note(kept.expand(merged.expand(found)))
    return min(bound, cutoff)


def mixed(
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
    """The best assignment made of choices of those given, of a problem made for these alone.

    Args:
        starts: some of them within the rows.
        prices: of the problem's rows, at which the starts have to be faster than the best.
        gap: what is better by less is not looked for.
        enough_us: stop at an assignment as fast as this.
        expired: whether time is over.
    """
    pool = Pool(problem, separate, disable)
    for start in starts:
        pool.note(start)
    every = [np.arange(len(t)) for t in problem.time_us]
    used = Region(pool, every, prices=prices).used()
    recombine(
        pool, used, rounds=rounds, gap=gap / 2, better_by=gap, say=say,
        done=lambda: pool.time_us <= enough_us or expired(),
    )  # fmt: skip
    assert pool.choices is not None
    return pool.choices
