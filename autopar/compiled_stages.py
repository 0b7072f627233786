"""One rank's step that runs once per microbatch: cut into stages, each compiled by itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.compiled_step import Arguments, Place, StepOptions
from autopar.ir.graph import ModelGraph
from autopar.passes.apply_sharding import LocalProgram
from autopar.passes.cut import Crossing, StageProgram, cut
from autopar.passes.lower import LoweredStep, lower, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.plan import ShardingPlan
from autopar.schedule.agreed import agreed_schedule
from autopar.schedule.budget import MemoryPlan, StepBudget


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
    plan: ShardingPlan,
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
            dump=options.dump_passes,
        )  # fmt: skip
        traced = trace_step(program.body, given, lowering)
        memory = None
        if memory_bytes is not None:
            copied = sum(
                graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders
            )
            budget = StepBudget.of(
                [*entering, *(tensors[k] for k in program.others)], memory_bytes,
                options.optimizer_state, copied,
            )  # fmt: skip
            memory = agreed_schedule(traced.program, budget, place.ranks, None)
        first = None
        if split_backward and number:
            first = range(len(given) - len(received), len(given))
        body = lower(traced, None if memory is None else memory.schedule, first=first)
        place.check_agreement(
            *(None if enter is None else enter.forward, None if enter is None else enter.backward),
            body.forward, body.backward, body.weights,
        )  # fmt: skip
        stages[number] = CompiledStage(program, enter, body, memory)
    return CompiledSlice(graph, local, programs, stages)


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
        graph, plan, frozenset(), device_type=place.device_type, cluster=options.cluster,
        compile=options.compile, dump=options.dump_passes,
    )  # fmt: skip
    casts = {
        k: graph.casts[names[position]].reductions
        for k, position in enumerate(program.parameters)
        if names[position] in graph.casts
    }
    lowering = replace(lowering, sum_dtypes=casts, reshard_after_forward=frozenset())
    return lower(trace_step(program.enter, parameters, lowering)), entered


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
