"""The search around the solver: what overlaps with what, and how much memory the peak needs.

The step time of a plan with compute C, exposed communication E and weight communication W, of which
at most h C hides behind compute, is

    T  =  max(C + E,  C + E + W - h C)  =  max over 0 <= q <= 1 of  C + E + q (W - h C).

For a fixed price q of weight communication the solver minimizes the right side; every q gives a
lower bound on T, and T of every plan found is an upper one. The best q is where the lines of two
plans cross.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.errors import InfeasibleError
from autopar.estimate import estimate_time, estimate_transient, hiding_share
from autopar.plan import SolverRecord
from autopar.sharding.space import SearchSpace
from autopar.solver import solve
from autopar.solver.reductions import share

PRICES = 6
RESERVES = 4
GAP = 1e-3


@dataclass(frozen=True)
class Found:
    """Choices per site, with what is known of their quality."""

    choices: tuple[int, ...]
    step_us: float
    bound_us: float
    memory_bytes: float
    method: str

    def record(self, seconds: dict[str, float]) -> SolverRecord:
        gap = max(0.0, 1 - self.bound_us / self.step_us) if self.step_us else 0.0
        return SolverRecord(self.method, self.step_us, self.bound_us, gap, seconds)


def search(
    space: SearchSpace,
    *,
    time_limit: float,
    progress: Callable[[str], None] | None = None,
) -> Found:
    """The fastest plan whose memory, transient peak included, is within the budget.

    The transient peak depends on the plan, so a reserve for it is raised until it suffices.

    Raises:
        InfeasibleError: naming the smallest feasible budget.
    """
    budget, reserve = space.cluster.budget_bytes, 0.0
    best: Found | None = None
    for _ in range(RESERVES):
        try:
            found = _at_price(space, 1.0, budget - reserve, time_limit, progress)
            if _fits(space, found, budget):
                found = _over_prices(space, found, budget - reserve, time_limit, progress)
        except InfeasibleError as error:
            if best is not None:
                break
            raise _explained(space, error, reserve) from None
        if _fits(space, found, budget):
            return found
        best = found
        reserve = max(1.05 * reserve, estimate_transient(space, found.choices))
    raise _explained(
        space,
        InfeasibleError("", budget_bytes=budget, smallest_bytes=best.memory_bytes if best else 0.0),
        reserve,
    )


def _fits(space: SearchSpace, found: Found, budget: float) -> bool:
    transient = estimate_transient(space, found.choices)
    return found.memory_bytes + transient <= budget * (1 + 1e-9)


def _at_price(
    space: SearchSpace,
    price: float,
    budget: float,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found:
    problem, classes = space.problem(
        max(budget, 1.0), weight_price=price, hidden_compute=price * hiding_share(space)
    )
    shared, inverse = share(problem, classes)
    solution = solve(shared, time_limit=time_limit, progress=progress)
    choices = inverse(solution.choices)
    step = estimate_time(space, choices).step_us
    return Found(choices, step, solution.bound_us, solution.memory_bytes, solution.method)


def _over_prices(
    space: SearchSpace,
    full: Found,
    budget: float,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found:
    """The best plan over all prices, starting from the one at full price."""
    if hiding_share(space) == 0.0:
        return full
    free = _at_price(space, 0.0, budget, time_limit, progress)
    best = min((full, free), key=lambda f: f.step_us)
    bound = max(full.bound_us, free.bound_us)
    low, high = _line(space, free.choices), _line(space, full.choices)
    for _ in range(PRICES - 2):
        slope = low[1] - high[1]
        if best.step_us - bound <= GAP * best.step_us or low[1] <= 0 or high[1] >= 0 or slope <= 0:
            break
        price = (high[0] - low[0]) / slope
        found = _at_price(space, price, budget, time_limit, progress)
        bound = max(bound, found.bound_us)
        line = _line(space, found.choices)
        if found.step_us < best.step_us:
            best = found
        if line in (low, high):
            break
        low, high = (line, high) if line[1] > 0 else (low, line)
    return Found(
        best.choices, best.step_us, min(bound, best.step_us), best.memory_bytes, best.method
    )


def _line(space: SearchSpace, choices: Sequence[int]) -> tuple[float, float]:
    """(C + E, W - h C) of a plan."""
    time = estimate_time(space, choices)
    weights = time.weights_us
    share_us = hiding_share(space) * time.compute_us
    return time.step_us - max(0.0, weights - share_us), weights - share_us


def _explained(space: SearchSpace, error: InfeasibleError, reserve: float) -> InfeasibleError:
    budget, smallest = space.cluster.budget_bytes, error.smallest_bytes + reserve
    mesh = "x".join(map(str, space.mesh))
    return InfeasibleError(
        f"no plan fits {budget / 2**20:.1f} MiB per device on mesh {mesh}: parameters, gradients, "
        "optimizer state, saved activations and the transient peak need at least "
        f"{smallest / 2**20:.1f} MiB. Set the memory to {math.ceil(smallest / 2**20)}MiB or more, "
        "use more devices, or make the batch smaller.",
        budget_bytes=budget,
        smallest_bytes=smallest,
    )
