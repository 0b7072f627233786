"""The longest sequence that trains within a budget, and peaks against predictions.

Lengths are multiples of 256 tokens. Each is tried by running it: measured is the most that is alive
on the fullest rank, parameters, optimizer state and buffers of gradients included. By hand, blocks
keep everything or their inputs alone (checkpointing). autopar's strategies keep everything; its own
choice is a joint plan within the budget (docs/memory.md). A prediction is compared at the longest
sequence: of the plan before the program exists, and of the program that runs.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.common import Row
from benchmarks.sequence_cases import Case

UNIT = 256  # tokens
BUDGET, QUICK_BUDGET = 96 * 2**20, 24 * 2**20
CASES = (Case(0, 128, 8, 8, 4), Case(0, 128, 8, 2, 4))
OURS = "autopar within the budget"
_AMPLE = "64GiB"
SCHEDULE_TARGET, PLAN_TARGET = 3.0, 3.0  # percent


@dataclass(frozen=True)
class Peak:
    """What was measured on the fullest rank, and predicted of it.

    Args:
        measured: bytes.
        planned: by the plan, before the program exists; None by hand.
        program: by the program that runs, likewise.
    """

    measured: float
    planned: float | None = None
    program: float | None = None


def longest(
    peak: Callable[[int], Peak | None], budget: float, start: int
) -> tuple[int, Peak | None]:  # fmt: skip
    """The largest number of units whose peak is within the budget, and that peak.

    Args:
        peak: of so many units; None where there is no plan. It grows nearly linearly.
        start: units to try first.
    """
    found: dict[int, Peak | None] = {}
    low, high, tried = 0, math.inf, start
    while high - low > 1:
        found[tried] = of = peak(tried)
        if of is not None and of.measured <= budget:
            low = tried
        else:
            high = tried
        points = [(k, p.measured) for k, p in sorted(found.items()) if p is not None]
        if len(points) > 1 and points[-1][1] > points[-2][1]:
            (a, x), (b, y) = points[-2:]
            guess = a + math.floor((budget - x) * (b - a) / (y - x))
        else:
            guess = 2 * low if math.isinf(high) else (low + int(high)) // 2
        tried = int(min(max(guess, low + 1), high - 1, 4 * max(low, 1)))
    return low, found.get(low)


# -- on ranks --------------------------------------------------------------------------------------


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """The longest sequence by contestant, and its peak."""
    import torch.distributed as dist

    from autopar import ClusterInfo
    from autopar.errors import InfeasibleError
    from benchmarks.sequence_ranks import BY_HAND, Contestant, by_autopar, by_hand, largest

    case, budget = Case(**job["case"]), job["budget"]
    cluster = ClusterInfo.of(str(dist.get_world_size()), "cpu")

    def measured(build: Callable[[Case], Contestant], units: int) -> Peak | None:
        try:
            one = build(replace(case, tokens=UNIT * units))
            one.step()
            one.step()
        except InfeasibleError:  # on all ranks
            return None
        peak = largest(one.peak_bytes())
        engine: Any = one.model
        if getattr(engine, "memory_plan", None) is None:
            plan = getattr(engine, "plan", None)
            return Peak(peak, None if plan is None else plan.memory.total_bytes)
        program = largest(one.predicted_peak_bytes())
        return Peak(peak, engine.plan.memory.total_bytes, program)

    builds: dict[str, Callable[[Case], Contestant]] = {}
    for name in BY_HAND:
        for recompute in (False, True):
            words = f"{name}, checkpointing" if recompute else name
            builds[words] = lambda of, n=name, r=recompute: by_hand(n, of, r)
    for name, constraints in job["strategies"].items():
        builds[name] = lambda of, n=name, c=constraints: by_autopar(
            n, of, cluster, constraints=c, memory=_AMPLE
        )
    results: dict[str, tuple[int, Peak | None]] = {}
    for name, build in builds.items():
        results[name] = longest(lambda units, b=build: measured(b, units), budget, 4)
        gc.collect()
    start = max(units for units, _ in results.values())
    results[OURS] = longest(
        lambda units: measured(lambda of: by_autopar(OURS, of, cluster, memory=budget), units),
        budget, max(start, 1),
    )  # fmt: skip
    return {
        name: {"tokens": UNIT * units, "peak": peak and asdict(peak)}
        for name, (units, peak) in results.items()
    }


# -- rows ------------------------------------------------------------------------------------------


def rows(
    worlds: list[int], quick: bool, only: str,
    strategies: Callable[[Case, int], Mapping[str, Mapping[str, str]]],
    on_ranks: Callable[[int, Mapping[str, Any]], dict[str, Any]],
) -> Iterator[Row]:  # fmt: skip
    """All cases."""
    budget = QUICK_BUDGET if quick else BUDGET
    for ranks in worlds:
        for of in CASES[1:] if quick else CASES:
            shared = f", {of.keys} for keys" if of.grouped else ""
            case = f"{of.heads} heads{shared}, {ranks} ranks, {budget >> 20} MiB"
            if only not in case:
                continue
            job = {
                "kind": "memory", "case": asdict(of), "budget": budget,
                "strategies": strategies(of, ranks),
            }  # fmt: skip
            yield from _rows(case, on_ranks(ranks, job))


def _rows(case: str, results: Mapping[str, Any]) -> Iterator[Row]:
    for name, result in results.items():
        yield Row(case, f"{name}, longest", result["tokens"], "tokens")
        peak = result["peak"]
        if peak is None:
            continue
        for what, key, target in (
            ("as planned", "planned", PLAN_TARGET), ("of the program", "program", SCHEDULE_TARGET),
        ):  # fmt: skip
            if peak[key] is not None:
                off = 100 * abs(peak[key] / peak["measured"] - 1)
                yield Row(case, f"{name}, peak {what} off by", off, "%", target)
    others = {name: r["tokens"] for name, r in results.items() if name != OURS}
    best = max(others, key=lambda name: others[name])
    yield Row(case, f"{best} / autopar, longest", others[best] / results[OURS]["tokens"], "x", 1.0)
