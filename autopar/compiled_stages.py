"""One rank's step that runs once per microbatch: cut into stages, each compiled by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.compiled_step import Arguments, Place, StepOptions, StepPlan
from autopar.errors import InfeasibleError
from autopar.ir.graph import ModelGraph
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.bucket import bucket_bytes_within
from autopar.passes.cut import Crossing, StageProgram, cut
from autopar.passes.joint import return_arguments
from autopar.passes.lower import LoweredStep, TracedStep, lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.plan import ShardingPlan
from autopar.planner.microbatch_step import STATES_STAY
from autopar.planner.stages import in_flight
from autopar.progress import Deadline
from autopar.schedule.agreed import agreed_schedule
from autopar.schedule.budget import MemoryPlan, StepBudget
from autopar.units import budget_text, bytes_text

# Amounts of memory that are tried for the microbatches in flight.
_TRIES = 10
# Of a budget that was named and is not enough.
_SLACK = 0.001


@dataclass(frozen=True)
class CompiledStage:
    """One stage of one rank.

    Args:
        enter: what runs once per step, of parameters; None if they enter as they are.
        body: what runs per microbatch.
        memory: what the body keeps, recomputes and offloads; None without a budget.
    """

    program: StageProgram
    enter: LoweredStep | None
    body: LoweredStep
    memory: MemoryPlan | None


@dataclass(frozen=True)
class CompiledSlice:
    """The step for microbatches of one size.

    Args:
        graph: of a microbatch.
        local: this rank's program of all stages.
        programs: of all stages.
        stages: those that run on this rank, by number.
    """

    graph: ModelGraph
    local: LocalProgram
    programs: tuple[StageProgram, ...]
    stages: dict[int, CompiledStage]

    @property
    def stage_of_result(self) -> dict[int, int]:
        """By position of a result, the stage that gives it."""
        return {k: stage for stage, p in enumerate(self.programs) for k in p.results}

    @property
    def users(self) -> dict[int, list[int]]:
        """By position of a parameter, the stages that use it."""
        users: dict[int, list[int]] = {}
        for stage, program in enumerate(self.programs):
            for k in program.parameters:
                users.setdefault(k, []).append(stage)
        return users


def compile_stages(
    graph: ModelGraph,
    planned: StepPlan,
    local: LocalProgram,
    programs: tuple[StageProgram, ...],
    called_with: Arguments,
    place: Place,
    options: StepOptions,
    *,
    own: Collection[int] = (0,),
    split_backward: bool = False,
) -> CompiledSlice:
    """Compile the stages of a rank.

    Args:
        graph: of a microbatch.
        programs: of all stages.
        place: of this rank, on the mesh of its stages; `ranks` are those that run the same stages.
        own: stages of this rank.
        split_backward: gradients of weights are a program of their own.
    """
    plan = planned.plan
    memory_bytes = step_memory(options, plan)
    stages: dict[int, CompiledStage] = {}
    for number in own:
        program = programs[number]
        tensors = called_with.tensors
        entering = [tensors[k] for k in program.parameters]
        enter, entered = _enter(program, entering, graph, plan, place, options)
        nodes = program.body.graph.find_nodes(op="placeholder")
        received = nodes[len(entered) + len(program.others) :]
        given = [*entered, *(tensors[k] for k in program.others), *map(_fake, received)]
        lowering = LowerOptions(
            device_type=place.device_type, cluster=options.cluster,
            scheduled=memory_bytes is not None, compile=options.compile,
            reshard_after_forward=_gathered_again(graph, plan, program),
            sum_dtypes=_wider_sums(graph, entered),
            bucket_bytes=bucket_bytes_within(plan.budget_bytes), dump=options.dump_passes,
            added=len(entered) if plan.microbatches > 1 else 0,
        )  # fmt: skip
        traced = trace_step(program.body, given, lowering)
        first = None
        if split_backward and number:
            first = range(len(given) - len(received), len(given))
        if memory_bytes is None:
            memory, body = None, lower(traced, first=first)
        else:
            arguments = [*entering, *(tensors[k] for k in program.others)]
            budget = _budget(graph, options, memory_bytes, arguments)
            room = StageRoom.of(plan, number)
            known = None
            if plan.pipeline is None:
                inputs = tensors[graph.input_arguments]
                budget = budget.of_microbatch(arguments, inputs, plan.microbatches)
                results = plan.microbatches * _results_bytes(traced)
                budget = replace(budget, other_bytes=budget.other_bytes + results)
                known = planned.schedule_of(traced.program)
            else:
                budget = budget.with_sums(arguments, plan.microbatches)
            memory, body = _within(traced, budget, room, place, first, known, options.time_limit)
        place.check_agreement(
            *(None if enter is None else enter.forward, None if enter is None else enter.backward),
            body.forward, body.backward, body.weights,
        )  # fmt: skip
        stages[number] = CompiledStage(program, enter, body, memory)
    return CompiledSlice(graph, local, programs, stages)


@dataclass(frozen=True)
class StageRoom:
    """What a stage's rank holds besides one microbatch of the stage.

    Args:
        number: of the stage.
        more: how many other microbatches of the stage are in flight at a time.
        held_bytes: what the plan expects each to hold.
        others_bytes: what other stages of the rank hold: states, and microbatches in flight.
        of_pipeline: it is one of several stages.
    """

    number: int = 0
    more: int = 0
    held_bytes: float = 0.0
    others_bytes: float = 0.0
    of_pipeline: bool = False

    @staticmethod
    def of(plan: ShardingPlan, number: int) -> StageRoom:
        """The room of a stage of a plan."""
        if plan.pipeline is None:
            return StageRoom()
        flying = in_flight(plan.pipeline)
        stages = plan.pipeline.stages
        others = sum(
            s.state_bytes + flying[k] * s.held_bytes
            for k, s in enumerate(stages)
            if s.rank == stages[number].rank and k != number
        )
        return StageRoom(
            number, flying[number] - 1, stages[number].held_bytes, others, of_pipeline=True
        )

    def described(self, own: float, others: float) -> str:
        """What does not fit, and what it needs.

        Args:
            own, others: bytes of one microbatch, and of what else is there.
        """
        needs = bytes_text(own)
        if not self.of_pipeline:
            return f"a microbatch needs {needs}, with gradients of those before it"
        return (
            f"pipeline stage {self.number} needs {needs} beside {bytes_text(others)} for "
            f"{self.more} other microbatches in flight and for other stages of its rank "
            f"({bytes_text(self.others_bytes)})"
        )


def _budget(
    graph: ModelGraph, options: StepOptions, memory_bytes: float, arguments: Sequence[torch.Tensor]
) -> StepBudget:
    copied = sum(graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders)
    return StepBudget.of(arguments, memory_bytes, options.optimizer_state, copied)


def _results_bytes(traced: TracedStep) -> float:
    """Of the results of a microbatch and of their gradients: those of all microbatches are there at
    the end. Scalars do not count."""
    nbytes = 0.0
    for node, result in zip(traced.joint.outputs, traced.joint.results, strict=False):
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor) and value.ndim:
            nbytes += (2 if result.differentiable else 1) * value.nbytes
    return nbytes


def _within(
    traced: TracedStep, budget: StepBudget, room: StageRoom, place: Place,
    first: Collection[int] | None, known: MemoryPlan | None, seconds: float,
) -> tuple[MemoryPlan, LoweredStep]:  # fmt: skip
    """A stage's program, scheduled so that all microbatches in flight fit.

    The more is reserved for the others, the more this one recomputes and the less each holds: what
    is reserved is halved in until it is enough.

    Args:
        known: the schedule, if planning has made it.
        seconds: of processor time for all searches.

    Raises:
        InfeasibleError: naming the stage.
    """
    least, most = room.others_bytes, budget.memory_bytes
    reserved = min(least + room.more * room.held_bytes, most)
    smallest = 1.0  # memory with which this one has a schedule, as far as known
    deadline = Deadline(seconds)
    for _ in range(_TRIES):
        own = replace(budget, memory_bytes=budget.memory_bytes - reserved)
        try:
            memory = agreed_schedule(traced.program, own, place.ranks, known, deadline.left)
        except InfeasibleError as error:
            smallest, most = error.smallest_bytes, reserved
        else:
            body = lower(traced, memory.schedule, first=first)
            needed = room.others_bytes + room.more * held_bytes(body)
            if place.ranks.all(needed <= reserved):
                return memory, body
            least = reserved
        if not room.more:
            break
        reserved = (least + most) / 2
    # the schedule that needs least is one that keeps little
    for _ in range(_TRIES):
        own = replace(budget, memory_bytes=smallest)
        try:
            memory = agreed_schedule(traced.program, own, place.ranks, None, deadline.left)
        except InfeasibleError as error:
            smallest = max(error.smallest_bytes, (1 + _SLACK) * smallest)
            continue
        body = lower(traced, memory.schedule, first=first)
        needed = max(place.ranks.of_all(room.others_bytes + room.more * held_bytes(body)))
        if smallest + needed <= budget.memory_bytes:
            return memory, body
        break
    else:
        needed = most
    tiers = f". {STATES_STAY}" if traced.options.cluster.off_device_tiers else ""
    raise InfeasibleError(
        f"{room.described(smallest, needed)}, and there is {bytes_text(budget.memory_bytes)}.\n"
        f"  Use more microbatches, which are smaller, {'more stages, ' * room.of_pipeline}or "
        f"at least {budget_text(smallest + needed)}{tiers}",
        budget_bytes=budget.memory_bytes, smallest_bytes=smallest + needed,
    )  # fmt: skip


def held_bytes(step: LoweredStep) -> int:
    """What the forward keeps for the backward, besides its arguments."""
    outputs: Any = step.forward.graph.output_node().args[0]
    kept = (x for x in outputs[len(step.results) :] if x.op != "placeholder")
    storages = {x: x.meta["val"].untyped_storage() for x in kept if "val" in x.meta}
    return sum({s._cdata: s.nbytes() for s in storages.values()}.values())


def step_memory(options: StepOptions, plan: ShardingPlan) -> float | None:
    """The budget that a schedule keeps to; None if the step keeps what eager PyTorch keeps."""
    if options.cluster.memory_bytes is None and plan.step is not None:
        return plan.budget_bytes
    return options.cluster.memory_bytes


def stage_programs(
    graph: ModelGraph, plan: ShardingPlan, local: LocalProgram, options: StepOptions,
    firsts: Sequence[int] = (),
) -> tuple[StageProgram, ...]:  # fmt: skip
    """The programs of all stages. Within a budget, every microbatch gathers parameters.

    Args:
        firsts: numbers of operators at which stages begin, without the first stage's.
    """
    gather_once = step_memory(options, plan) is None
    return cut(local, len(graph.parameters), firsts, gather_once=gather_once)


def _enter(
    program: StageProgram,
    parameters: Sequence[torch.Tensor],
    graph: ModelGraph,
    plan: ShardingPlan,
    place: Place,
    options: StepOptions,
) -> tuple[LoweredStep | None, list[torch.Tensor]]:
    """What runs once per step, and tensors like those it gives."""
    if program.enter is None:
        return None, list(parameters)
    with FakeTensorMode(), torch.enable_grad():
        fakes = [
            torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=p.device)
            .requires_grad_(p.requires_grad)
            for p in parameters
        ]  # fmt: skip
        given = fx.Interpreter(program.enter).run(*fakes)
        entered = [
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
            .requires_grad_(x.requires_grad)
            for x in given
        ]  # fmt: skip
    names = list(graph.parameters)
    lowering = LowerOptions.of(
        graph, plan, frozenset(), device_type=place.device_type,
        cluster=options.cluster, compile=options.compile, dump=options.dump_passes,
    )  # fmt: skip
    casts = {
        k: graph.casts[names[position]].reductions
        for k, position in enumerate(program.parameters)
        if names[position] in graph.casts
    }
    lowering = replace(lowering, sum_dtypes=casts, reshard_after_forward=frozenset())
    lowered = lower(trace_step(program.enter, parameters, lowering))
    for gm in (program.enter, lowered.forward):
        return_arguments(gm)  # microbatches read parameters where they are
    return lowered, entered


def _wider_sums(graph: ModelGraph, entered: Sequence[torch.Tensor]) -> dict[int, torch.dtype]:
    """By position of what enters as a parameter, the dtype in which its gradient is summed over
    ranks within a microbatch, where that is wider than its own."""
    sums = (cast.reductions for cast in graph.casts.values())
    widest = max(sums, key=attrgetter("itemsize"), default=None)
    if widest is None:
        return {}
    return {k: widest for k, x in enumerate(entered) if x.dtype.itemsize < widest.itemsize}


def _gathered_again(graph: ModelGraph, plan: ShardingPlan, program: StageProgram) -> frozenset[int]:
    """Positions of the parameters that the body gathers again for its backward."""
    again = {k for k, name in graph.parameters.items() if name in plan.reshard_after_forward}
    nodes = program.body.graph.find_nodes(op="placeholder")
    return frozenset(k for k, n in enumerate(nodes) if str(n.target) in again)


def _fake(node: fx.Node) -> torch.Tensor:
    """A tensor like the value that a stage receives."""
    crossing = Crossing.of(node)
    with FakeTensorMode():
        return crossing.empty().requires_grad_(crossing.differentiable)
