"""The stages from a module to a plan: build the problem, search, make the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.cluster.local import as_cluster
from autopar.errors import InfeasibleError, PlanError
from autopar.gc_utils import collection_paused, existing_objects_frozen
from autopar.plan import ShardingPlan, SolverRecord
from autopar.planner.baselines import baseline_plans
from autopar.planner.constraints import Allowed, Constraints, allowed, conflict, fixed_outputs
from autopar.planner.decisions import FixedLayouts, Workload
from autopar.planner.describe import describe
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.search import SearchResult, search
from autopar.planner.space import SearchSpace
from autopar.tracer import ColoTracer, ModelGraph

ADAM_STATE = 2.0


@dataclass(frozen=True)
class Planned:
    """A plan with the space it was chosen from.

    Args:
        choices: candidate per decision of the space.
        mask: candidates per decision, where constraints exclude some.
    """

    plan: ShardingPlan
    graph: ModelGraph
    space: SearchSpace
    choices: tuple[int, ...]
    mask: Allowed = field(default_factory=dict)


@dataclass(frozen=True)
class PlanningProblem:
    """A model, costed and ready for the search.

    Args:
        model: its class name.
        mask: candidates per decision, where constraints exclude some.
        constraints: layouts by name.
        budget_bytes: per device.
        time_limit: seconds for each run of the solver.
        seconds: per stage so far.
        say: called with a line per stage.
    """

    model: str
    space: SearchSpace
    mask: Allowed
    constraints: Constraints
    budget_bytes: float
    time_limit: float
    seconds: Mapping[str, float]
    say: Callable[[str], None]

    def decide(self, budget_bytes: float | None = None) -> SearchResult:
        """The fastest plan within the budget, or within another one; or the fastest baseline, if
        the search ran out of time.

        Raises:
            InfeasibleError: nothing fits; a `ConflictError` if constraints are the reason.
        """
        self.say("solve ...")
        budget = self.budget_bytes if budget_bytes is None else budget_bytes
        limits: dict[str, Any] = {"budget_bytes": budget, "time_limit": self.time_limit}
        start = time.monotonic()
        with existing_objects_frozen():
            try:
                return search(self.space, **limits, progress=self.say, mask=self.mask)
            except InfeasibleError as error:
                if time.monotonic() - start >= self.time_limit:
                    baseline = self._fastest_baseline(budget)
                    if baseline is not None:
                        return baseline
                raise conflict(
                    self.space, self.constraints, error, **limits, say=self.say
                ) from None

    def _fastest_baseline(self, budget_bytes: float) -> SearchResult | None:
        """The fastest baseline that fits, named in the method."""
        baselines = baseline_plans(self.space, time_limit=self.time_limit, mask=self.mask)
        fitting = [b for b in baselines if b.memory.total_bytes <= budget_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda b: b.time.step_us)
        method = f"baseline {best.name}: {self.time_limit:g} s were too short to find a plan"
        self.say(method)
        return SearchResult(best.choices, best.time.step_us, 0.0, method)

    def planned(self, result: SearchResult, seconds: Mapping[str, float] | None = None) -> Planned:
        """The plan of a search result, with the seconds of stages after the search."""
        spent = {**self.seconds, "solve": result.seconds, **(seconds or {})}
        with existing_objects_frozen():
            plan = make_plan(self.space, result.choices, self.model, result.record(spent))
        plan = replace(plan, constraints=self.constraints, budget_bytes=self.budget_bytes)
        return Planned(plan, self.space.graph, self.space, result.choices, self.mask)


def trainable_inputs(graph: ModelGraph, model: torch.nn.Module) -> frozenset[str]:
    """Placeholder names of the parameters that require grad."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return frozenset(k for k, name in graph.parameters.items() if name in trainable)


# -- stages -------------------------------------------------------------------------------------


def build_problem(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterInfo | str,
    graph: ModelGraph | None = None,
    memory: str | float | None = None,
    budget_bytes: float | None = None,
    optimizer_state: float = ADAM_STATE,
    fixed: FixedLayouts | None = None,
    constraints: Constraints | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> PlanningProblem:
    """Trace a model, profile it, and lay out the search space with all costs.

    Args:
        cluster: or a mesh such as "2x4".
        graph: the captured model, if it was traced already.
        memory: of the cluster, per device ("40GiB", bytes, or a share of the device).
        budget_bytes: per device, that the plan keeps to; the memory of the cluster if None.
        optimizer_state: bytes of optimizer state per byte of trainable parameter (Adam: 2).
        fixed: layouts that the caller decides.
        constraints: layouts by the names of parameters, inputs, outputs, modules and operators
            (`autopar.planner.names`): `{"h.*.mlp.c_fc.weight": "RS1", "inputs.x": "S0R"}`.
        time_limit: seconds for the solver. If they end before any plan fits, the fastest baseline
            that fits takes its place, and the record says so.

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint has an unknown name or an impossible layout.
    """
    cluster = as_cluster(cluster).with_memory(memory)
    constraints = dict(constraints or {})
    say = progress or (lambda line: None)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        say(f"{name} ...")
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with stage("trace"):
        if graph is None:
            graph = ColoTracer().trace(model, args, kwargs)
    with stage("profile and strategies"), collection_paused():
        fixed = fixed_outputs(graph, cluster.mesh, constraints, fixed)
        workload = Workload(trainable_inputs(graph, model), optimizer_state)
        space = SearchSpace(graph, cluster, workload, fixed)
        mask = allowed(space, constraints)
    with stage("conversion costs"), collection_paused():
        for edge in space.edges:
            space.edge_costs(edge)  # memoized
    budget = cluster.budget_bytes if budget_bytes is None else budget_bytes
    return PlanningProblem(
        type(model).__name__, space, mask, constraints, budget, time_limit, seconds, say
    )


def make_plan(
    space: SearchSpace, choices: Sequence[int], model: str, record: SolverRecord | None = None
) -> ShardingPlan:
    """The plan of a full choice of candidates, with the memory of the cluster for its budget."""
    chosen = [(d, d.candidates[c]) for d, c in zip(space.decisions, choices, strict=True)]
    stored = {
        space.graph.parameters[str(d.node.target)]: c for d, c in chosen if d.kind == "parameter"
    }
    liveness = Liveness(space, math.inf)
    time = estimate_time(space, choices, liveness)
    operators = {d.node: d for d in space.decisions if d.kind == "op"}
    return ShardingPlan(
        model,
        space.graph.fingerprint,
        space.mesh,
        space.cluster.to_dict(),
        {d.name: c.name for d, c in chosen if d.kind != "output"},
        {name: str(c.outputs[0]) for name, c in stored.items()},
        tuple(name for name, c in stored.items() if c.reshard_after_forward),
        time,
        estimate_memory(space, choices, liveness),
        record or SolverRecord("given", time.step_us, 0.0, 1.0),
        space.cluster.budget_bytes,
        {
            f"{n.name}: {n.target} at {space.graph.info(n).source}": float(operators[n].time_us[0])
            for n in space.unruled
            if space.profile[n].forward.kernels
        },
        describe(space, choices),
        {d.name: " ".join(str(spec) or "scalar" for spec in c.outputs) for d, c in chosen},
        optimizer_state=space.workload.state_bytes_per_param_byte,
    )


def choices_of(space: SearchSpace, plan: ShardingPlan) -> tuple[int, ...]:
    """The candidate per decision that a plan names.

    Raises:
        PlanError: the plan was made for another space.
    """
    choices = []
    for decision in space.decisions:
        names = [c.name for c in decision.candidates]
        choice = plan.choices.get(decision.name, names[0] if decision.kind == "output" else None)
        if choice not in names:
            raise PlanError(
                f"the plan chooses {choice!r} for {decision.name}, which can be "
                f"{', '.join(names)}; plan again with this version of autopar"
            )
        choices.append(names.index(choice))
    return tuple(choices)
