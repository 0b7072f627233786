"""The planner, a line per stage: trace, profile, lay out the space, solve, write the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from autopar.estimate import estimate_memory, estimate_time
from autopar.plan import ShardingPlan, SolverRecord
from autopar.profiler.cluster import ClusterInfo, as_cluster
from autopar.report.words import describe
from autopar.search import search
from autopar.sharding.moments import Moments
from autopar.sharding.sites import Pins, Workload
from autopar.sharding.space import SearchSpace
from autopar.tracer import ColoTracer, ModelGraph

ADAM_STATE = 2.0


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from."""

    plan: ShardingPlan
    graph: ModelGraph
    space: SearchSpace
    choices: tuple[int, ...]


class _Clock:
    """Seconds per named stage."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._say = progress or (lambda line: None)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        self._say(f"{stage} ...")
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


def trainable_inputs(graph: ModelGraph, model: torch.nn.Module) -> frozenset[str]:
    """Placeholder names of the parameters that require grad."""
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    return frozenset(k for k, name in graph.parameters.items() if name in wanted)


def autoplan(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterInfo | str,
    graph: ModelGraph | None = None,
    memory: str | float | None = None,
    optimizer_state: float = ADAM_STATE,
    pins: Pins | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Planned:
    """Find the fastest plan for one training step of `model(*args, **kwargs)` that fits the memory.

    Needs no GPU, no process group and no weights: the model may live on the meta device.

    Args:
        graph: the captured model, where it was traced already.
        memory: budget per device ("40GiB", bytes, or a share of the device).
        optimizer_state: bytes of optimizer state per byte of trainable parameter (Adam: 2).
        pins: layouts decided from outside.
        time_limit: seconds for the solver.
        progress: called with a line per stage.

    Raises:
        CaptureError: the model cannot be captured.
        InfeasibleError: nothing fits the budget.
    """
    cluster = as_cluster(cluster).with_memory(memory)
    clock = _Clock(progress)
    with clock("trace"):
        if graph is None:
            graph = ColoTracer().trace(model, args, kwargs)
    with clock("profile and strategies"):
        workload = Workload(trainable_inputs(graph, model), optimizer_state)
        space = SearchSpace(graph, cluster, workload, pins)
    with clock("conversion costs"):
        space.cost_links()
    with clock("solve"):
        found = search(space, time_limit=time_limit, progress=progress)
    plan = make_plan(space, found.choices, type(model).__name__, found.record(clock.seconds))
    return Planned(plan, graph, space, found.choices)


def make_plan(
    space: SearchSpace,
    choices: Sequence[int],
    model: str,
    record: SolverRecord | None = None,
) -> ShardingPlan:
    """The plan that a full choice of candidates stands for."""
    chosen = [(s, s.candidates[c]) for s, c in zip(space.sites, choices, strict=True)]
    names = {s.node.name: space.graph.parameters.get(str(s.node.target)) for s, _ in chosen}
    parameters = {
        str(names[s.node.name]): str(c.outputs[0]) for s, c in chosen if s.kind == "parameter"
    }
    moments = Moments(space, space.cluster.budget_bytes)
    estimate = estimate_time(space, choices, moments)
    if record is None:
        record = SolverRecord("given", estimate.step_us, 0.0, 1.0)
    unruled = {
        f"{n.name}: {n.target} at {space.graph.info(n).source}": float(
            next(s for s, _ in chosen if s.node is n and s.kind == "op").time_us[0]
        )
        for n in space.unruled
        if space.profile[n].forward_kernels
    }
    return ShardingPlan(
        model,
        space.graph.fingerprint,
        space.mesh,
        space.cluster.to_dict(),
        {s.name: c.name for s, c in chosen if s.kind != "output"},
        parameters,
        tuple(str(names[s.node.name]) for s, c in chosen if s.kind == "parameter" and c.regather),
        estimate,
        estimate_memory(space, choices, moments),
        record,
        space.cluster.budget_bytes,
        unruled,
        describe(space, choices),
        {s.name: " ".join(str(spec) or "scalar" for spec in c.outputs) for s, c in chosen},
    )
