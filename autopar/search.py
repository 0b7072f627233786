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

import numpy as np

from autopar.errors import InfeasibleError
from autopar.estimate import estimate_time, estimate_transient, hiding_share
from autopar.plan import SolverRecord
from autopar.sharding.space import SearchSpace
from autopar.solver import solve
from autopar.solver.reductions import share
from autopar.units import format_bytes

PRICES = 6
CAPS = 12
CAP_STEP = 0.75
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

    The transient peak depends on the plan: it is capped, candidates above the cap are left out, and
    the rest of the memory gets the budget less the cap. Lower caps follow while nothing fits.

    Raises:
        InfeasibleError: naming the smallest feasible budget.
    """
    budget = space.cluster.budget_bytes
    found = _at_price(space, 1.0, math.inf, math.inf, time_limit, None)
    if _fits(space, found, budget):
        return _over_prices(space, found, budget, math.inf, time_limit, progress)
    smallest = math.inf
    for cap in _caps(space, estimate_transient(space, found.choices)):
        try:
            found = _at_price(space, 1.0, budget - cap, cap, time_limit, progress)
        except InfeasibleError as error:
            smallest = min(smallest, error.smallest_bytes + cap)
            continue
        return _over_prices(space, found, budget - cap, cap, time_limit, progress)
    mesh = "x".join(map(str, space.mesh))
    raise InfeasibleError(
        f"no plan fits {format_bytes(budget)} per device on mesh {mesh}: parameters, gradients, "
        "optimizer state, saved activations and the transient peak need at least "
        f"{format_bytes(smallest)} ({smallest:.0f} bytes). Set the memory to that or more, use "
        "more devices, or make the batch smaller.",
        budget_bytes=budget,
        smallest_bytes=smallest,
    )


def _caps(space: SearchSpace, first: float) -> list[float]:
    """Bounds on the transient peak to try, from the fastest plan's down to the least there is.

    Only working sets that some candidate has are worth a try.
    """
    least, distinct = space.least_working_bytes(), space.distinct_working_bytes()
    caps, target = [first], first
    while len(caps) < CAPS and (target := target * CAP_STEP) > least:
        cap = float(distinct[np.searchsorted(distinct, target)])
        if cap < caps[-1]:
            caps.append(cap)
    return [*caps, least] if least < caps[-1] else caps


def _fits(space: SearchSpace, found: Found, budget: float) -> bool:
    transient = estimate_transient(space, found.choices)
    return found.memory_bytes + transient <= budget * (1 + 1e-9)


def _at_price(
    space: SearchSpace,
    price: float,
    budget: float,
    cap: float,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found:
    problem, classes = space.problem(
        max(budget, 1.0),
        weight_price=price,
        hidden_compute=price * hiding_share(space),
        working_cap=cap,
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
    cap: float,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found:
    """The best plan over all prices, starting from the one at full price."""
    if hiding_share(space) == 0.0:
        return full
    free = _at_price(space, 0.0, budget, cap, time_limit, progress)
    whole = space.cluster.budget_bytes  # a looser cap than the plan's own peak may not suffice
    best = min((full, free) if _fits(space, free, whole) else (full,), key=lambda f: f.step_us)
    bound = max(full.bound_us, free.bound_us)
    low, high = _line(space, free.choices), _line(space, full.choices)
    for _ in range(PRICES - 2):
        slope = low[1] - high[1]
        if best.step_us - bound <= GAP * best.step_us or low[1] <= 0 or high[1] >= 0 or slope <= 0:
            break
        price = (high[0] - low[0]) / slope
        found = _at_price(space, price, budget, cap, time_limit, progress)
        bound = max(bound, found.bound_us)
        line = _line(space, found.choices)
        if found.step_us < best.step_us and _fits(space, found, whole):
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
