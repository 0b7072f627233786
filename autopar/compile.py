"""The compiler on one screen: trace, profile, space, solve, plan; apply, schedule, lower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.errors import EngineError
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.lower import LoweredStep, lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.verify import collective_signature
from autopar.plan import ShardingPlan
from autopar.planner.joint import JointPlan, plan_jointly
from autopar.planner.planner import ADAM_STATE, Planned, build_problem
from autopar.schedule.budget import MemoryPlan, StepBudget, describe
from autopar.schedule.program import Program, Schedule, eager_schedule
from autopar.schedule.simulate import peak_bytes
from autopar.schedule.transfers import large_parameters
from autopar.units import bytes_text

T = TypeVar("T")


def autoplan(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    budget_bytes: float | None = None,
    **options: Any,
) -> Planned:
    """Find the fastest plan for one training step of `model(*args, **kwargs)` that fits the memory.

    Needs no GPU, no process group and no weights: the model may live on the meta device.

    Args:
        budget_bytes: per device, for this search; the memory of the cluster if None.
        options: of `autopar.planner.planner.build_problem`: `cluster`, `memory`, `constraints`, ...

    Raises:
        CaptureError: the model cannot be captured.
        ConstraintError: a constraint has an unknown name or an impossible layout.
        InfeasibleError: nothing fits the budget; a `ConflictError` if constraints are the reason.
    """
    problem = build_problem(model, args, kwargs, **options)  # trace, profile, space
    return problem.planned(problem.decide(budget_bytes))  # solve, plan


def plan_step(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    schedule: bool = False,
    output_specs: Sequence[ShardingSpec] | None = None,
    **options: Any,
) -> JointPlan:
    """The same, together with what the step keeps, recomputes and offloads within its memory.

    Args:
        schedule: also if everything fits the memory.
        output_specs: layouts in which the caller wants the results; replicated if None.
        options: of `build_problem`.
    """
    problem = build_problem(model, args, kwargs, **options)
    return plan_jointly(problem, output_specs=output_specs, always=schedule)


class Ranks(Protocol):
    """How the ranks of a run decide alike."""

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        """Rank 0's decision, or its error, on every rank."""

    def differing(self, signature: str) -> list[int]:
        """Ranks whose signature is not that of rank 0; the same on all ranks."""


class OneRank:
    """A rank that decides by itself, for planning."""

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        return decide()

    def differing(self, signature: str) -> list[int]:
        return []


@dataclass(frozen=True)
class Place:
    """The rank that a step is compiled for.

    Args:
        coords: on the mesh.
        groups: names of its process groups, one per mesh axis.
        device_type: of its tensors.
        ranks: all ranks of the run.
    """

    coords: tuple[int, ...]
    groups: tuple[str, ...]
    device_type: str = "cpu"
    ranks: Ranks = field(default_factory=OneRank)


@dataclass(frozen=True)
class StepPlan:
    """A plan, with the schedule of its step if planning has made one.

    Args:
        program: of the first rank's step.
        memory: its schedule.
    """

    plan: ShardingPlan
    program: Program | None = None
    memory: MemoryPlan | None = None


@dataclass(frozen=True)
class Arguments:
    """What a rank's program is called with.

    Args:
        tensors: of the shapes, dtypes and grad flags of the call; may be fake.
        offloadable: names of the parameters that may be on the host for a part of the step.
    """

    tensors: Sequence[torch.Tensor]
    offloadable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CompiledStep:
    """One rank's step for one shape of inputs.

    Args:
        graph: the captured model.
        plan: of all ranks.
        local: this rank's forward program.
        lowered: its forward and backward graph; None if the local program runs eagerly.
        memory: what the step keeps, recomputes and offloads; None without a budget.
    """

    graph: ModelGraph
    plan: ShardingPlan
    local: LocalProgram
    lowered: LoweredStep | None
    memory: MemoryPlan | None


@dataclass(frozen=True)
class StepOptions:
    """How a step is compiled.

    Args:
        cluster: what the step runs on; its memory is the budget that a schedule keeps to, and
            without one the step keeps what eager PyTorch keeps.
        lowered: False leaves the local program as it is, to run eagerly (debugging).
        compile: Inductor runs the graphs.
        optimizer_state: bytes of optimizer state per byte of trainable parameter.
        dump_passes: folder for the graph before and after each pass.
    """

    cluster: ClusterInfo
    lowered: bool = True
    compile: bool = False
    optimizer_state: float = ADAM_STATE
    dump_passes: Path | None = None


def compile_step(
    graph: ModelGraph,
    decide: Callable[[], StepPlan],
    place: Place,
    arguments: Callable[[ShardingPlan, LocalProgram], Arguments],
    options: StepOptions,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
) -> CompiledStep:
    """Compile one rank's step: plan (on rank 0), apply, trace, schedule, lower.

    Args:
        decide: plans; called on rank 0.
        arguments: what the rank's program is called with.
        trainable: placeholder names of the parameters that require grad.
        output_specs: layouts in which the caller wants the results; replicated if None.

    Raises:
        EngineError: ranks built different programs.
        InfeasibleError: the step does not fit the budget.
    """
    known = _plan(decide, place.ranks)
    plan = known.plan
    local = apply_sharding(
        graph, plan, coords=place.coords, groups=place.groups,
        output_specs=output_specs, trainable=trainable,
    )  # fmt: skip
    _check_agreement(place, local.gm)
    given = arguments(plan, local)
    if not options.lowered:
        return CompiledStep(graph, plan, local, None, None)
    budget = _budget(graph, plan, given, options)
    traced = trace_step(
        local.gm, given.tensors, _lowering(graph, plan, place, given, options, budget)
    )
    memory = None if budget is None else _schedule(traced.program, budget, known, place.ranks)
    lowered = lower(traced, None if memory is None else memory.schedule)
    _check_agreement(place, lowered.forward, lowered.backward)
    return CompiledStep(graph, plan, local, lowered, memory)


def _plan(decide: Callable[[], StepPlan], ranks: Ranks) -> StepPlan:
    """Rank 0's plan; on rank 0 with its schedule."""
    decided: list[StepPlan] = []

    def on_rank_zero() -> str:
        decided.append(decide())
        return decided[0].plan.to_json()

    text = ranks.from_rank_zero(on_rank_zero)
    return decided[0] if decided else StepPlan(ShardingPlan.from_json(text))


def _check_agreement(place: Place, *graphs: fx.GraphModule | None) -> None:
    """Ranks whose programs communicate in different orders would deadlock."""
    signature = " ".join(collective_signature(gm, place.groups) for gm in graphs if gm is not None)
    differing = place.ranks.differing(signature)
    if differing:
        raise EngineError(
            f"ranks {differing} built another sequence of collectives than rank 0; they must run "
            "the same model, batch shapes and autopar version"
        )


def _budget(
    graph: ModelGraph, plan: ShardingPlan, given: Arguments, options: StepOptions
) -> StepBudget | None:
    """The budget of this run, or of the plan if its step was scheduled."""
    memory_bytes = options.cluster.memory_bytes
    if memory_bytes is None and plan.step is not None:
        memory_bytes = plan.budget_bytes
    if memory_bytes is None:
        return None
    copied = sum(graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders)
    host = options.cluster.host_link
    return StepBudget.of(given.tensors, memory_bytes, options.optimizer_state, copied, host)


def _lowering(
    graph: ModelGraph,
    plan: ShardingPlan,
    place: Place,
    given: Arguments,
    options: StepOptions,
    budget: StepBudget | None,
) -> LowerOptions:
    position = {name: k for k, name in enumerate(graph.parameters.values())}
    large = large_parameters(graph)
    return LowerOptions(
        device_type=place.device_type,
        cluster=options.cluster,
        scheduled=budget is not None,
        compile=options.compile,
        reshard_after_forward=frozenset(
            position[n] for n in plan.reshard_after_forward if n in position
        ),
        offloadable={k: name for k, name in large.items() if name in given.offloadable},
        awaited_results=len(graph.mutations),
        dump=options.dump_passes,
    )


def _schedule(program: Program, budget: StepBudget, known: StepPlan, ranks: Ranks) -> MemoryPlan:
    """What the step keeps, recomputes and offloads: rank 0 decides, whose shards are the largest.

    Ranks by themselves might decide differently, as the small integer programs behind a schedule
    have limits in seconds. Where the ranks' programs differ in more than sizes, no schedule fits
    all, and everything is kept.
    """

    def choose() -> tuple[Schedule, bool]:
        same = known.program is not None and known.program.same_as(program)
        memory = known.memory if same and known.memory is not None else budget.choose(program)
        return memory.schedule, memory.state_on_host

    def keep_everything() -> tuple[Schedule, bool]:
        needed = peak_bytes(program, eager_schedule(program))
        if needed > budget.step_bytes:
            free = bytes_text(max(0.0, budget.step_bytes))
            raise EngineError(
                f"the step needs {bytes_text(needed)} if everything is kept, and there is {free}; "
                f"what to recompute cannot be decided, as the programs of ranks {differing} differ "
                "from that of rank 0. Give more memory, or sizes that the mesh divides"
            )
        return eager_schedule(program), False

    differing = ranks.differing(program.signature)
    schedule, state_on_host = ranks.from_rank_zero(keep_everything if differing else choose)
    if differing:
        schedule = eager_schedule(program)
    return replace(describe(program, schedule), state_on_host=state_on_host)
