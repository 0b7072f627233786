"""Which constraints leave no plan."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

from autopar.errors import ConflictError, InfeasibleError
from autopar.planner.constraints import (
    OUTPUTS,
    Allowed,
    Constraints,
    allowed,
    masked,
    quoted,
)
from autopar.planner.liveness import Liveness
from autopar.planner.liveness_rows import LivenessRows
from autopar.planner.space import SearchSpace
from autopar.solver import solve
from autopar.units import bytes_text


def conflict(
    space: SearchSpace,
    constraints: Constraints,
    error: InfeasibleError,
    *,
    budget_bytes: float,
    time_limit: float,
    say: Callable[[str], None],
) -> InfeasibleError:
    """The error for constraints without a plan: it names a smallest conflicting set, found by
    dropping one constraint after the other while there is still no plan.

    Args:
        error: of the search with all of them.
    """
    conflicting = {n: t for n, t in constraints.items() if not n.startswith(OUTPUTS)}
    if not conflicting or not _feasible(space, {}, budget_bytes, time_limit):
        return error
    for name in list(conflicting):
        say(f"does {name} conflict? ...")
        fewer = {n: t for n, t in conflicting.items() if n != name}
        if not _feasible(space, allowed(space, fewer), budget_bytes, time_limit):
            conflicting = fewer
    named = [f"{name}: {text}" for name, text in conflicting.items()]
    if math.isfinite(error.smallest_bytes):
        needed = bytes_text(error.smallest_bytes)
        remedy = f"relax one, or set the memory to at least {needed} ({error.smallest_bytes:.0f})"
        within = f" within {bytes_text(error.budget_bytes)} per device"
    else:
        remedy, within = "relax one", ""
    together = "these constraints together" if len(named) > 1 else "this constraint"
    message = f"no plan satisfies {together}{within}: {quoted(named)}. Without "
    message += "any one of them there is a plan" if len(named) > 1 else "it there is a plan"
    return ConflictError(
        f"{message}; {remedy}", named,
        budget_bytes=error.budget_bytes, smallest_bytes=error.smallest_bytes,
    )  # fmt: skip


def _feasible(space: SearchSpace, mask: Allowed, budget_bytes: float, time_limit: float) -> bool:
    """Whether some plan is within the budget, however slow."""
    tied = masked(space.problem(), mask).tied()
    try:
        solve(
            tied.problem, separate=LivenessRows(Liveness(space, budget_bytes), tied),
            time_limit=time_limit, enough_us=sys.float_info.max, subproblems=0,
        )  # fmt: skip
    except InfeasibleError:
        return False
    return True
