"""The planner, a line per stage: trace, profile, lay out the space, solve, write the plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from autopar.planner.search import Found, search
from autopar.planner.space import SearchSpace
from autopar.tracer import ColoTracer, ModelGraph

ADAM_STATE = 2.0


@dataclass(frozen=True)
class Planned:
    """A plan with what it was made from.

    Args:
        choices: candidate per decision of the space.
        only: candidates per decision, where constraints left not all of them.
    """

    plan: ShardingPlan
    graph: ModelGraph
    space: SearchSpace
    choices: tuple[int, ...]
    only: Allowed = field(default_factory=dict)


class _Clock:
    """Seconds per named stage."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self.say = progress or (lambda line: None)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        self.say(f"{stage} ...")
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


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
    fixed: FixedLayouts | None = None,
    constraints: Constraints | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Planned:
    """Find the fastest plan for one training step of `model(*args, **kwargs)` that fits the memory.

    Needs no GPU, no process group and no weights: the model may live on the meta device.

    Args:
        graph: the captured model, where it was traced already.
        memory: budget per device ("40GiB", bytes, or a share of the device).
        optimizer_state: bytes of optimizer state per byte of trainable parameter (Adam: 2).
        fixed: layouts decided from outside.
        constraints: layouts by the names of parameters, inputs, outputs, modules and operators
            (`autopar.planner.names`): `{"h.*.mlp.c_fc.weight": "RS1", "inputs.x": "S0R"}`.
        time_limit: seconds for the solver. Where they end before any plan that fits was found, a
            hand-written plan takes its place, and the record says so.
        progress: called with a line per stage.

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint names nothing, or a layout that cannot be.
        InfeasibleError: nothing fits the budget; a `ConflictError` where constraints are why.
    """
    problem = build_problem(
        model, args, kwargs, cluster=as_cluster(cluster).with_memory(memory), graph=graph,
        optimizer_state=optimizer_state, fixed=fixed, constraints=constraints,
        time_limit=time_limit, progress=progress,
    )  # fmt: skip
    return problem.planned(problem.decide())


@dataclass(frozen=True)
class PlanningProblem:
    """A model problem out for the search.

    Args:
        model: its class name.
        space: under the budget.
        only: candidates per decision, where constraints leave not all of them.
        constraints: layouts by name.
        time_limit: seconds for each run of the solver.
        clock: times the stages, and says what goes on.
    """

    model: str
    space: SearchSpace
    only: Allowed
    constraints: Constraints
    time_limit: float
    clock: _Clock

    def decide(self, space: SearchSpace | None = None) -> Found:
        """The fastest plan, of this space or of one under another budget."""
        with self.clock("solve"), existing_objects_frozen():
            return decide(
                space or self.space, self.only, self.constraints, self.time_limit, self.clock.say
            )

    def planned(self, found: Found) -> Planned:
        """The plan of what was found."""
        space = self.space
        with existing_objects_frozen():
            plan = make_plan(space, found.choices, self.model, found.record(self.clock.seconds))
        plan = replace(plan, constraints=self.constraints)
        return Planned(plan, space.graph, space, found.choices, self.only)


def build_problem(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    cluster: ClusterInfo,
    graph: ModelGraph | None = None,
    optimizer_state: float = ADAM_STATE,
    fixed: FixedLayouts | None = None,
    constraints: Constraints | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> PlanningProblem:
    """All of `autoplan` but the search."""
    constraints = dict(constraints or {})
    clock = _Clock(progress)
    with clock("trace"):
        if graph is None:
            graph = ColoTracer().trace(model, args, kwargs)
    with clock("profile and strategies"), collection_paused():
        workload = Workload(trainable_inputs(graph, model), optimizer_state)
        space, only = build_space(graph, cluster, workload, constraints, fixed)
    with clock("conversion costs"), collection_paused():
        space.cost_edges()
    return PlanningProblem(type(model).__name__, space, only, constraints, time_limit, clock)


def build_space(
    graph: ModelGraph,
    cluster: ClusterInfo,
    workload: Workload,
    constraints: Constraints,
    fixed: FixedLayouts | None = None,
) -> tuple[SearchSpace, Allowed]:
    """The search space, and what constraints leave of it."""
    fixed = fixed_outputs(graph, cluster.mesh, constraints, fixed)
    space = SearchSpace(graph, cluster, workload, fixed)
    return space, allowed(space, constraints)


def decide(
    space: SearchSpace,
    only: Allowed,
    constraints: Constraints,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found:
    """What the search finds; or a hand-written plan, if it ran out of time. Raises what is why."""
    start = time.monotonic()
    try:
        return search(space, time_limit=time_limit, progress=progress, only=only)
    except InfeasibleError as error:
        if time.monotonic() - start >= time_limit:
            expert = _expert(space, only, time_limit, progress)
            if expert is not None:
                return expert
        raise conflict(
            space, constraints, error, time_limit=time_limit, progress=progress
        ) from None


def _expert(
    space: SearchSpace,
    only: Allowed,
    time_limit: float,
    progress: Callable[[str], None] | None,
) -> Found | None:
    """The fastest hand-written plan that fits, named in the method."""
    fitting = [e for e in baseline_plans(space, time_limit=time_limit, only=only) if e.fits]
    if not fitting:
        return None
    best = min(fitting, key=lambda e: e.time.step_us)
    method = f"{best.name}, written by hand: {time_limit:g} s were too short to find a plan"
    if progress is not None:
        progress(method)
    return Found(best.choices, best.time.step_us, 0.0, method)


def make_plan(
    space: SearchSpace,
    choices: Sequence[int],
    model: str,
    record: SolverRecord | None = None,
) -> ShardingPlan:
    """The plan that a full choice of candidates stands for."""
    chosen = [(s, s.candidates[c]) for s, c in zip(space.decisions, choices, strict=True)]
    names = {s.node.name: space.graph.parameters.get(str(s.node.target)) for s, _ in chosen}
    parameters = {
        str(names[s.node.name]): str(c.outputs[0]) for s, c in chosen if s.kind == "parameter"
    }
    liveness = Liveness(space, space.cluster.budget_bytes)
    estimate = estimate_time(space, choices, liveness)
    if record is None:
        record = SolverRecord("given", estimate.step_us, 0.0, 1.0)
    unruled = {
        f"{n.name}: {n.target} at {space.graph.info(n).source}": float(
            next(s for s, _ in chosen if s.node is n and s.kind == "op").time_us[0]
        )
        for n in space.unruled
        if space.profile[n].forward.kernels
    }
    return ShardingPlan(
        model,
        space.graph.fingerprint,
        space.mesh,
        space.cluster.to_dict(),
        {s.name: c.name for s, c in chosen if s.kind != "output"},
        parameters,
        tuple(
            str(names[s.node.name])
            for s, c in chosen
            if s.kind == "parameter" and c.reshard_after_forward
        ),
        estimate,
        estimate_memory(space, choices, liveness),
        record,
        space.cluster.budget_bytes,
        unruled,
        describe(space, choices),
        {s.name: " ".join(str(spec) or "scalar" for spec in c.outputs) for s, c in chosen},
        optimizer_state=space.workload.state_bytes_per_param_byte,
    )


def choices_of(space: SearchSpace, plan: ShardingPlan) -> tuple[int, ...]:
    """The candidate per decision that a plan names.

    Raises:
        PlanError: the plan was made for another space.
    """
    found = []
    for decision in space.decisions:
        names = [c.name for c in decision.candidates]
        wanted = plan.choices.get(decision.name, names[0] if decision.kind == "output" else None)
        if wanted not in names:
            raise PlanError(
                f"the plan chooses {wanted!r} for {decision.name}, which can be {', '.join(names)}; "
                "plan again with this version of autopar"
            )
        found.append(names.index(wanted))
    return tuple(found)
