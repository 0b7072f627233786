"""The plans people write by hand, as constraints on the same search space.

An expert objects to the candidates and conversions that it would not use; the solver completes what
is left, under the same costs as autopar's own plan. What differs between the two is therefore the
choice, not the cost model.

    plan            weights are stored              and consumed
    DDP             whole                           whole
    FSDP            split over every axis           whole, gathered again for backward
    Megatron TP     split over the last axis where  as stored on the last axis,
                    the solver likes, whole         whole over the others
                    over the others
    Megatron, FSDP  as Megatron TP, and split       as Megatron TP, gathered again
                    over the other axes

Objections are priced, not forbidden: an operator without a rule must run replicated in whatever
plan, and costs its expert one objection instead of the whole plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.ir.spec import ShardingSpec
from autopar.plan import MemoryEstimate, TimeEstimate
from autopar.planner.constraints import Allowed, restricted
from autopar.planner.decisions import Decision, Edge
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.memory_rows import SharedRows
from autopar.planner.space import SearchSpace
from autopar.solver import Problem, solve
from autopar.solver.reductions import Shared

# Above any step time that could be saved by overruling an expert, below where doubles get coarse.
OBJECTION_US = 1e8

_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")


@dataclass(frozen=True)
class BaselinePlan:
    """A hand-written plan, costed.

    Args:
        name: as people call it.
        choices: candidate per decision of the space.
        time, memory: predictions.
        fits: whether the memory is within the cluster's budget.
    """

    name: str
    choices: tuple[int, ...]
    time: TimeEstimate
    memory: MemoryEstimate
    fits: bool


@dataclass(frozen=True)
class _Expert:
    """What one expert insists on.

    Args:
        name: as people call it.
        data: mesh axes over which the batch is split and weights are consumed whole.
        tensor: the axis of tensor parallelism, if any.
        sharded: whether parameters are stored split over the data axes.
    """

    name: str
    data: tuple[int, ...]
    tensor: int | None
    sharded: bool


def baseline_plans(
    space: SearchSpace,
    *,
    time_limit: float = 60.0,
    only: Allowed | None = None,
    named: str = "",
) -> list[BaselinePlan]:
    """Every hand-written plan that exists on the mesh, solved without a memory limit.

    Args:
        time_limit: seconds for the solver, per expert.
        only: candidates per decision, where the experts may not use all of them.
        named: only those whose name begins so.
    """
    return [
        _completed(space, expert, time_limit, only or {})
        for expert in _experts(space.mesh)
        if expert.name.startswith(named)
    ]


def _completed(space: SearchSpace, expert: _Expert, limit: float, only: Allowed) -> BaselinePlan:
    problem, classes = restricted(*space.problem(), only)
    shared = Shared(_with_penalties(space, expert, problem), classes)
    liveness = Liveness(space, np.inf)
    solution = solve(shared.problem, separate=SharedRows(liveness, shared), time_limit=limit)
    choices = shared.expand(solution.choices)
    memory = estimate_memory(space, choices, liveness)
    fits = memory.total_bytes <= space.cluster.budget_bytes
    return BaselinePlan(expert.name, choices, estimate_time(space, choices, liveness), memory, fits)


def _experts(mesh: Sequence[int]) -> list[_Expert]:
    axes = tuple(axis for axis, size in enumerate(mesh) if size > 1)
    if not axes:
        return []
    *outer, last = axes
    data = tuple(outer)
    megatron = "Megatron TP, data parallel" if data else "Megatron TP"
    found = [
        _Expert("DDP", axes, None, sharded=False),
        _Expert("FSDP (ZeRO-3)", axes, None, sharded=True),
        _Expert(megatron, data, last, sharded=False),
    ]
    if data:
        found.append(_Expert("Megatron TP, FSDP", data, last, sharded=True))
    return found


# -- penalties ---------------------------------------------------------------------------------


def _with_penalties(space: SearchSpace, expert: _Expert, problem: Problem) -> Problem:
    """The problem in which everything the expert would not do costs `OBJECTION_US` more."""
    weights = _weight_operands(space)
    time_us = tuple(
        t + OBJECTION_US * _decision_penalties(expert, decision, operands)
        for t, decision, operands in zip(problem.time_us, space.decisions, weights, strict=True)
    )
    edges = tuple(
        replace(e, time_us=e.time_us + OBJECTION_US * _edge_penalties(space, expert, edge))
        for e, edge in zip(problem.edges, space.edges, strict=True)
    )
    return replace(problem, time_us=time_us, edges=edges)


def _weight_operands(space: SearchSpace) -> list[list[int]]:
    """Per decision the operands that are parameters, or views of one."""
    found: list[list[int]] = [[] for _ in space.decisions]
    for edge in space.edges:
        if edge.weight:
            found[edge.target].append(edge.operand)
    return found


def _decision_penalties(expert: _Expert, decision: Decision, weights: Sequence[int]) -> np.ndarray:
    """How many penalties the expert has to each candidate."""
    if decision.kind == "parameter":
        return _to_storage(expert, decision)
    if decision.kind == "input":
        return _to_batch_split(expert, decision)
    count = np.zeros(len(decision.candidates))
    tensor = expert.tensor
    for i, c in enumerate(decision.candidates):
        for spec in (c.inputs[operand] for operand in weights):
            if spec is not None:
                # each rank uses all of the weight, for samples of its own along the data axes ...
                count[i] += sum(axis not in spec.varying for axis in expert.data)
                count[i] += len(_split_over(spec, expert.data) | {*spec.partial} & {*expert.data})
                # ... and for the same samples along the tensor axis
                count[i] += tensor in spec.varying
        if tensor is not None and decision.kind == "op" and _is_norm(decision):
            # the residual stream is whole along the tensor axis
            count[i] += sum(
                spec is not None and spec.state(tensor) != "R"
                for spec in (c.inputs[0], c.outputs[0])
            )
    return count


def _is_norm(decision: Decision) -> bool:
    return any(name in str(decision.node.target) for name in _NORMS)


def _to_storage(expert: _Expert, decision: Decision) -> np.ndarray:
    """To splits over the data axes; or, if parameters are sharded, to all but the widest split."""
    specs = [c.outputs[0] for c in decision.candidates]
    split = [_split_over(spec, expert.data) for spec in specs]
    if not expert.sharded:
        return np.array([float(len(axes)) for axes in split])
    # FSDP splits dim 0; beside tensor parallelism, the dim that this leaves free
    preference = [
        (
            len(axes),
            len(spec.dims[0]) if expert.tensor is None and spec.dims else 0,
            c.reshard_after_forward,
        )
        for axes, spec, c in zip(split, specs, decision.candidates, strict=True)
    ]
    return np.array([float(p < max(preference)) for p in preference])


def _to_batch_split(expert: _Expert, decision: Decision) -> np.ndarray:
    """To all but dim 0, the batch, split over as many data axes as can be."""
    specs = [c.outputs[0] for c in decision.candidates]
    parts = [
        len(spec.dims[0])
        if not any(spec.dims[1:]) and {*spec.dims[0]} <= {*expert.data}
        else -1
        if spec.dims
        else 0
        for spec in specs
    ]
    return np.array([float(p < max(parts)) for p in parts])


def _edge_penalties(space: SearchSpace, expert: _Expert, edge: Edge) -> np.ndarray:
    """To conversions that gather or move a split: of a weight along the tensor axis (slicing
    neither), of samples along a data axis. [source candidate, target candidate]"""
    source, target = space.decisions[edge.source], space.decisions[edge.target]
    outs = [c.outputs[edge.result] for c in source.candidates]
    ins = [c.inputs[edge.operand] for c in target.candidates]
    count = np.zeros((len(outs), len(ins)))
    if edge.weight and expert.tensor is not None:
        before, after = _split_dims(outs, expert.tensor), _split_dims(ins, expert.tensor)
        count += before[:, None] != after[None, :]
    if not edge.weight and target.kind != "output":
        for axis in expert.data:
            before, after = _split_dims(outs, axis), _split_dims(ins, axis)
            count += (before[:, None] >= 0) & (before[:, None] != after[None, :])
    return count


def _split_over(spec: ShardingSpec, axes: Sequence[int]) -> set[int]:
    return {axis for dim in spec.dims for axis in dim} & {*axes}


def _split_dims(specs: Sequence[ShardingSpec | None], axis: int) -> np.ndarray:
    """Per spec the tensor dim that the axis splits, or -1."""
    found = []
    for spec in specs:
        dims = spec.dims if spec is not None else ()
        found.append(next((d for d, axes in enumerate(dims) if axis in axes), -1))
    return np.array(found)
