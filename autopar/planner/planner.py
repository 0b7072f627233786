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
from autopar.ir.precision import Precision
from autopar.plan import ShardingPlan
from autopar.plan_records import SolverRecord
from autopar.planner.axis_groups import axis_groups, groups_text
from autopar.planner.baselines import baseline_plans
from autopar.planner.conflict import conflict
from autopar.planner.constraints import (
    Allowed,
    Constraints,
    allowed,
    axis_orders,
    fixed_outputs,
    layouts_of,
)
from autopar.planner.decisions import FixedLayouts, Workload
from autopar.planner.describe import describe
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.presets import preset_constraints
from autopar.planner.search import SearchResult, search
from autopar.planner.space import SearchSpace
from autopar.planner.work import work_of
from autopar.progress import TIME_LIMIT, Deadline, Progress, Stage, Tell
from autopar.solver.solve import TARGET_GAP
from autopar.tracer import ColoTracer, ModelGraph
from autopar.units import mesh_text

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
        deadline: that all runs of the solver and all schedules share.
        seconds: per stage so far.
        progress: is told the stages.
        weighs_memory: a plan that holds some percent less than the fastest is better where its step
            takes fewer percent longer.
        is_enough: as of `search`.
    """

    model: str
    space: SearchSpace
    mask: Allowed
    constraints: Constraints
    budget_bytes: float
    deadline: Deadline
    seconds: Mapping[str, float]
    progress: Progress
    weighs_memory: bool = False
    is_enough: Callable[[SearchResult], bool] | None = None

    def decide(self, budget_bytes: float | None = None) -> SearchResult:
        """The fastest plan within the budget, or within another one; or the fastest baseline, if
        the search ran out of time.

        Raises:
            InfeasibleError: nothing fits; a `ConflictError` if constraints are the reason.
        """
        budget = self.budget_bytes if budget_bytes is None else budget_bytes
        with existing_objects_frozen(), self.progress.stage("solve") as stage:
            result = self.search(budget)
            if self.weighs_memory and not self.deadline.over:
                result = self._with_less_memory(result, budget)
            stage.done = f"solved: {result.describe()}{self.cut_short(result)}"
        return result

    def _with_less_memory(self, fastest: SearchResult, budget: float) -> SearchResult:
        """The plan with the least sum of its time and of what it holds, each as a share of the
        fastest plan's. The product of both, byte-seconds, has the same slope there."""
        held = self.space.held_bytes(fastest.choices)
        price = fastest.step_us / held if held else 0.0
        priced = search(
            self.space, budget_bytes=budget, time_limit=self.deadline.left,
            progress=self.progress.detail, mask=self.mask, us_per_byte=price,
        )  # fmt: skip
        fewer = held - self.space.held_bytes(priced.choices)
        if fewer <= 0:
            return fastest
        step_us = priced.step_us - price * (held - fewer)
        longer = step_us / fastest.step_us - 1
        return replace(
            priced, step_us=step_us, bound_us=fastest.bound_us, sharing=(),
            bounded=fastest.bounded,
            trade=f"{fewer / held:.0%} less memory and {longer:.0%} longer than the fastest",
        )  # fmt: skip

    def search(self, budget: float) -> SearchResult:
        """The same, as a part of a stage."""
        try:
            return search(
                self.space, budget_bytes=budget, time_limit=self.deadline.left,
                progress=self.progress.detail, mask=self.mask, is_enough=self.is_enough,
            )  # fmt: skip
        except InfeasibleError as error:
            if self.deadline.over:
                baseline = self._fastest_baseline(budget)
                if baseline is not None:
                    return baseline
            raise conflict(
                self.space, self.constraints, error, budget_bytes=budget,
                time_limit=self.deadline.seconds, say=self.progress.detail,
            ) from None  # fmt: skip

    def cut_short(self, result: SearchResult) -> str:
        """What the line of a search says more where the time limit has ended it."""
        stopped = self.deadline.over and result.gap > TARGET_GAP
        return f", stopped by the time limit of {self.deadline.seconds:g} s" if stopped else ""

    def _fastest_baseline(self, budget_bytes: float) -> SearchResult | None:
        """The fastest baseline that fits, named in the method."""
        limit = self.deadline.seconds / 8
        baselines = baseline_plans(self.space, time_limit=limit, mask=self.mask)
        fitting = [b for b in baselines if b.memory.total_bytes <= budget_bytes]
        if not fitting:
            return None
        best = min(fitting, key=lambda b: b.time.step_us)
        limit = self.deadline.seconds
        method = f"baseline {best.name}: {limit:g} s were too short to find a plan"
        self.progress.tell(method)
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
    precision: Precision | str | torch.dtype | None = None,
    optimizer_state: float = ADAM_STATE,
    steps_on: tuple[str, ...] = (),
    states_on: str | None = None,
    forward: bool = False,
    microbatches: int = 1,
    fixed: FixedLayouts | None = None,
    constraints: Constraints | str | None = None,
    time_limit: float = TIME_LIMIT,
    deadline: Deadline | None = None,
    progress: Progress | Tell | None = None,
) -> PlanningProblem:
    """Trace a model, profile it, and lay out the search space with all costs.

    Args:
        cluster: or a mesh such as "2x4".
        graph: the captured model, if it was traced already.
        memory: of the cluster, per device ("40GiB", bytes, or a share of the device).
        budget_bytes: per device, that the plan keeps to; the memory of the cluster if None.
        precision: dtypes of the step, of a graph that is captured here: "bf16" or a `Precision`.
        optimizer_state: bytes of optimizer state per byte of trainable parameter (Adam: 2).
        steps_on: the tiers that the optimizer can step on (`planner/optimizer_state.py`).
        states_on: that tier, "" for the device; None to choose.
        forward: nothing is trained: no backward, no gradients, no optimizer state.
        microbatches: of the batch, if the graph is that of one of them.
        fixed: layouts that the caller decides.
        constraints: layouts by the names of parameters, inputs, outputs, modules and operators
            (`autopar.planner.names`): `{"h.*.mlp.c_fc.weight": "RS1", "inputs.x": "S0R"}`; or the
            name of a preset (`autopar.planner.presets`): "tp2d".
        time_limit: seconds from here on, for all runs of the solver and all schedules. Afterwards
            the best plan is returned with its gap. If none fits yet, the fastest baseline that fits
            takes its place, and the record says so.
        deadline: in place of a time limit, where other planning shares it.
        progress: called with a line per stage.

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint has an unknown name or an impossible layout.
    """
    deadline = deadline or Deadline(time_limit)
    cluster = as_cluster(cluster).with_memory(memory)
    telling = Progress.of(progress)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[Stage]:
        start = time.perf_counter()
        with telling.stage(name) as running:
            yield running
        seconds[name] = time.perf_counter() - start

    if graph is None:
        with stage("trace") as running:
            tracer = ColoTracer(precision=Precision.of(precision))
            graph = tracer.trace(model, args, kwargs)
            running.done = captured(model, graph)
    with stage("profile and strategies") as running, collection_paused():
        if isinstance(constraints, str):
            constraints = preset_constraints(constraints, graph, cluster.mesh)
        constraints = dict(constraints or {})
        fixed = fixed_outputs(graph, cluster.mesh, constraints, fixed)
        trainable = frozenset[str]() if forward else trainable_inputs(graph, model)
        state = 0.0 if forward else optimizer_state
        if microbatches > 1:  # gradients of several backwards add up on the device
            states_on = ""
        workload = Workload(trainable, state, steps_on, states_on, forward, microbatches)
        groups = axis_groups(cluster.mesh, cluster.links, layouts_of(constraints))
        space = SearchSpace(
            graph, cluster, workload, fixed, orders=axis_orders(constraints), groups=groups
        )
        mask = allowed(space, constraints)
        candidates = sum(len(d.candidates) for d in space.decisions)
        alike = groups_text(groups)
        running.done = (
            f"profiled, with {candidates:,} candidates for {len(space.decisions):,} decisions on "
            f"mesh {mesh_text(cluster.mesh, cluster.axis_names)}"
            f"{alike and f', where {alike}'}"
        )
    with stage("conversion costs") as running, collection_paused():
        for edge in space.edges:
            space.edge_costs(edge)  # memoized
        running.done = f"costed the conversions between them, on {len(space.edges):,} edges"
    budget = cluster.budget_bytes if budget_bytes is None else budget_bytes
    return PlanningProblem(
        type(model).__name__, space, mask, constraints, budget, deadline, seconds,
        telling, forward and cluster.memory_bytes is None and budget_bytes is None,
    )  # fmt: skip


def captured(model: torch.nn.Module, graph: ModelGraph) -> str:
    """The line of a capture."""
    return f"captured {type(model).__name__}, {sum(1 for _ in graph.compute_nodes()):,} operators"


def make_plan(
    space: SearchSpace, choices: Sequence[int], model: str, record: SolverRecord | None = None
) -> ShardingPlan:
    """The plan of a full choice of candidates, with the memory of the cluster for its budget."""
    chosen = [(d, d.candidates[c]) for d, c in zip(space.decisions, choices, strict=True)]
    stored = {
        space.graph.parameters[str(d.node.target)]: c for d, c in chosen if d.kind == "parameter"
    }
    liveness = Liveness(space, math.inf)
    estimated = estimate_time(space, choices, liveness)
    operators = {d.node: d for d in space.decisions if d.kind == "op"}
    return ShardingPlan(
        model,
        space.graph.fingerprint,
        space.mesh,
        space.cluster.to_dict(),
        {d.name: c.name for d, c in chosen if d.kind != "output"},
        {name: str(c.outputs[0]) for name, c in stored.items()},
        tuple(name for name, c in stored.items() if c.reshard_after_forward),
        estimated,
        estimate_memory(space, choices, liveness),
        record or SolverRecord("given", estimated.step_us, 0.0, 1.0),
        space.cluster.budget_bytes,
        {
            f"{n.name}: {n.target} at {space.graph.info(n).source}": float(operators[n].time_us[0])
            for n in space.unruled
            if space.profile[n].forward.kernels
        },
        describe(space, choices),
        {d.name: " ".join(str(spec) or "scalar" for spec in c.outputs) for d, c in chosen},
        optimizer_state=space.workload.state_bytes_per_param_byte,
        precision=space.graph.precision,
        work=work_of(space.graph, space.profile),
        forward=space.workload.forward,
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
