"""Runs a case on a pool of processes."""

from __future__ import annotations

from tests.dist.pool import Pool
from tests.scripts.case import Outcome, attempt, outcome_of
from tests.scripts.catalog import CASES


def outcome_on(pool: Pool, name: str, mesh: str, timeout_s: float) -> Outcome:
    """The outcome of a case on a pool's ranks, which are left in step with each other."""
    last = CASES[name].ends_apart
    try:
        outcome = outcome_of(pool.run(attempt, name, mesh, timeout=timeout_s, last=last))
    except TimeoutError as error:  # the pool has started anew
        return Outcome("wrong", f"{error}: a hang")
    except AssertionError as error:
        return Outcome("wrong", str(error), True)
    if outcome.out_of_step and pool.world > 1 and not last:
        pool.restart()
    return outcome
