"""Planning with slightly different costs: whether its time depends on luck.

Every time of a candidate and of a conversion gets a factor of its own, drawn from 0.95 to 1.05;
copies in repeated blocks share theirs, and bytes stay as they are. So choices that cost the same no
longer do, and the optimum and the order in which branching meets it change.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.common import Row

SPREAD, SEEDS, QUICK_SEEDS = 0.05, 20, 3
# the 95th percentile as a multiple of the median, and the largest gap in percent
PERCENTILE, GAP = 2.0, 0.1


def jittered(space: Any, seeds: Sequence[int]) -> Iterator[int]:
    """Change a search space's times in place by a seed after another; yields the seeds."""
    arrays, caches = [], []
    decisions = {d.cost_class: d for d in space.decisions}
    for decision in decisions.values():
        parts = [part for name, part in decision.parts.items() if name.endswith("_us")]
        arrays.append([decision.time_us, *parts])
    edges = {costs.cost_class: costs for costs in map(space.edge_costs, space.edges)}
    for costs in edges.values():
        arrays.append([costs.forward_us, costs.backward_us, costs.again_us])
        caches.append(vars(costs))
    before = [[array.copy() for array in group] for group in arrays]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for group, originals in zip(arrays, before, strict=True):
            factors = rng.uniform(1 - SPREAD, 1 + SPREAD, group[0].shape)
            for array, original in zip(group, originals, strict=True):
                np.multiply(original, factors, out=array)
        for cache in caches:  # what follows from the times
            for name in ("time_us", "hidden_us", "queued_us", "released_us"):
                cache.pop(name, None)
        yield seed


def work(space: Any, budget_bytes: float, seeds: Sequence[int], limit_s: float) -> dict[str, Any]:
    """Search with jittered costs; processor seconds, gaps and steps by seed."""
    from autopar.planner.search import search

    runs: dict[str, list[Any]] = {"seconds": [], "gap": [], "step_us": [], "method": []}
    for _ in jittered(space, seeds):
        start = time.process_time()
        result = search(space, budget_bytes=budget_bytes, time_limit=limit_s)
        runs["seconds"].append(time.process_time() - start)
        runs["gap"].append(result.gap)
        runs["step_us"].append(result.step_us)
        runs["method"].append(result.method)
    return runs


def rows_of(case: str, before_s: float, runs: dict[str, list[Any]]) -> list[Row]:
    """Median, 95th percentile and worst gap over the seeds.

    Args:
        before_s: processor seconds from the module to the search.
    """
    search = np.array(runs["seconds"])
    whole = search + before_s
    return [
        Row(case, "jittered: planning, median", float(np.median(whole)), "s"),
        Row(case, "jittered: planning, worst", float(whole.max()), "s"),
        Row(
            case, "jittered: planning, 95th percentile / median",
            float(np.quantile(whole, 0.95) / np.median(whole)), "x", PERCENTILE,
        ),
        Row(case, "jittered: search, median", statistics.median(search), "s"),
        Row(
            case, "jittered: search, 95th percentile / median",
            float(np.quantile(search, 0.95) / np.median(search)), "x",
        ),
        Row(case, "jittered: largest gap", 100 * max(runs["gap"]), "%", GAP),
    ]  # fmt: skip
