"""Baselines: the plans of DDP, FSDP and Megatron as constraints on the same search space.

A baseline penalizes the candidates and conversions that it would not use, and the solver completes
it under the same costs as autopar's own plan. So the two differ in the choice, not in the cost
model.

    baseline        parameters are stored           and consumed
    DDP             replicated                      replicated
    FSDP            split over every axis           replicated, re-gathered for backward
    Megatron TP     split over the last axis where  as stored on the last axis,
                    that is faster, replicated      replicated over the others
                    over the others
    Megatron, FSDP  as Megatron TP, and split       as Megatron TP, re-gathered for backward
                    over the other axes

Of a forward they are the same without gradients, and DDP is called replicas.

Penalties are finite: an operator without a rule must run replicated in every plan, which costs a
baseline one penalty instead of the whole plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autopar.ir.spec import ShardingSpec
from autopar.plan_records import MemoryEstimate, TimeEstimate
from autopar.planner.constraints import Allowed, masked
from autopar.planner.decisions import Decision, Edge
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.liveness import Liveness
from autopar.planner.liveness_rows import LivenessRows
from autopar.planner.space import SearchSpace
from autopar.solver import solve
from autopar.solver.reductions import TiedProblem

# More than any step time that ignoring a penalty could save, less than where doubles get coarse.
PENALTY_US = 1e8

MOST_BASELINES = 4  # on any mesh

_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")


@dataclass(frozen=True)
class BaselinePlan:
    """The plan of a baseline: a candidate per decision, and predictions."""

    name: str
    choices: tuple[int, ...]
    time: TimeEstimate
    memory: MemoryEstimate


@dataclass(frozen=True)
class _Baseline:
    """What a baseline prescribes.

    Args:
        data: mesh axes over which the batch is split and weights are consumed replicated.
        tensor: the axis of tensor parallelism, if any.
        sharded: whether parameters are stored split over the data axes.
        sequence: between products of tensor parallelism, activations are split by tokens over the
            tensor axis, instead of replicated (Korthikanti et al. 2022).
        gathers_again: parameters that are split over the data axes are gathered a second time for
            the backward, as by ZeRO-3, instead of kept from the forward on.
        context: the one of the data axes that splits the tokens of a sample, not the batch, if any.
    """

    name: str
    data: tuple[int, ...]
    tensor: int | None
    sharded: bool
    sequence: bool = False
    gathers_again: bool = True
    context: int | None = None


def baseline_plans(
    space: SearchSpace,
    *,
    time_limit: float = 60.0,
    mask: Allowed | None = None,
    named: str = "",
    sequence: bool = False,
    gathers_again: bool = True,
    context: int | None = None,
) -> list[BaselinePlan]:
    """The plans of all baselines that exist on the mesh, solved without a memory limit.

    Args:
        time_limit: seconds for the solver, per baseline.
        mask: candidates per decision, where not all of them are allowed.
        named: only baselines whose name begins so.
        sequence: with tensor parallelism, also split activations by tokens.
        gathers_again: whether FSDP gathers a second time, for the backward.
        context: the data axis that splits dim 1 of inputs, the tokens, instead of the batch.
    """
    chosen: dict[str, Any] = {
        "sequence": sequence, "gathers_again": gathers_again, "context": context,
    }  # fmt: skip
    return [
        _completed(space, replace(baseline, **chosen), time_limit, mask or {})
        for baseline in _baselines(space.mesh, space.workload.forward)
        if baseline.name.startswith(named)
    ]


def _completed(
    space: SearchSpace, baseline: _Baseline, time_limit: float, mask: Allowed
) -> BaselinePlan:
    tied = _penalized(space, baseline, masked(space.problem(), mask)).tied()
    liveness = Liveness(space, np.inf)
    solution = solve(tied.problem, separate=LivenessRows(liveness, tied), time_limit=time_limit)
    choices = tied.expand(solution.choices)
    time = estimate_time(space, choices, liveness)
    return BaselinePlan(baseline.name, choices, time, estimate_memory(space, choices, liveness))


def _baselines(mesh: Sequence[int], forward: bool) -> list[_Baseline]:
    axes = tuple(axis for axis, size in enumerate(mesh) if size > 1)
    if not axes:
        return []
    *outer, last = axes
    data = tuple(outer)
    megatron = "Megatron TP, data parallel" if data else "Megatron TP"
    baselines = [
        _Baseline("replicas" if forward else "DDP", axes, None, sharded=False),
        _Baseline("FSDP" if forward else "FSDP (ZeRO-3)", axes, None, sharded=True),
        _Baseline(megatron, data, last, sharded=False),
    ]
    if data:
        baselines.append(_Baseline("Megatron TP, FSDP", data, last, sharded=True))
    return baselines


# -- penalties ---------------------------------------------------------------------------------


def _penalized(space: SearchSpace, baseline: _Baseline, ties: TiedProblem) -> TiedProblem:
    """The problem in which everything that the baseline would not do costs `PENALTY_US` more."""
    problem, weights = ties.problem, space.weight_operands()
    time_us = tuple(
        t + PENALTY_US * _decision_penalties(baseline, decision, operands)
        for t, decision, operands in zip(problem.time_us, space.decisions, weights, strict=True)
    )
    edges = tuple(
        replace(e, time_us=e.time_us + PENALTY_US * _edge_penalties(space, baseline, edge))
        for e, edge in zip(problem.edges, space.edges, strict=True)
    )
    return TiedProblem(replace(problem, time_us=time_us, edges=edges), ties.classes)


def _decision_penalties(
    baseline: _Baseline, decision: Decision, weights: Sequence[int]
) -> np.ndarray:
    """The number of penalties of each candidate."""
    if decision.kind == "parameter":
        return _storage_penalties(baseline, decision)
    if decision.kind == "input":
        return _batch_penalties(baseline, decision)
    count = np.zeros(len(decision.candidates))
    tensor, target = baseline.tensor, str(decision.node.target)
    norm = decision.kind == "op" and any(name in target for name in _NORMS)
    for i, c in enumerate(decision.candidates):
        for spec in (c.inputs[operand] for operand in weights):
            if spec is not None:
                # each rank uses all of the weight, for samples of its own along the data axes ...
                count[i] += sum(axis not in spec.varying for axis in baseline.data)
                axes = _split_over(spec, baseline.data) | {*spec.partial} & {*baseline.data}
                count[i] += len(axes)
                # ... and for the same samples along the tensor axis
                count[i] += tensor in spec.varying
        if tensor is not None and norm:
            # the residual stream is replicated along the tensor axis, or split by tokens
            specs = [spec for spec in (c.inputs[0], c.outputs[0]) if spec is not None]
            if baseline.sequence:
                count[i] += sum(tensor not in spec.dims[-2] for spec in specs)
            else:
                count[i] += sum(spec.state(tensor) != "R" for spec in specs)
    return count


def _storage_penalties(baseline: _Baseline, decision: Decision) -> np.ndarray:
    """Of splits over the data axes; or, if parameters are sharded, of all but the widest split."""
    specs = [c.outputs[0] for c in decision.candidates]
    split = [_split_over(spec, baseline.data) for spec in specs]
    if not baseline.sharded:
        return np.array([float(len(axes)) for axes in split])
    # FSDP splits dim 0; beside tensor parallelism, the dim that this leaves free
    first = [len(s.dims[0]) if baseline.tensor is None and s.dims else 0 for s in specs]
    again = [c.reshard_after_forward == baseline.gathers_again for c in decision.candidates]
    preference = list(zip(map(len, split), first, again, strict=True))
    return np.array([float(p < max(preference)) for p in preference])


def _batch_penalties(baseline: _Baseline, decision: Decision) -> np.ndarray:
    """Of all but dim 0, the batch, split over as many data axes as possible, and dim 1 over that
    of tokens."""
    parts = []
    context = {axis for axis in baseline.data if axis == baseline.context}
    for dims in (c.outputs[0].dims for c in decision.candidates):
        split: list[set[int]] = [*map(set, dims), set(), set()]
        batch, tokens, *rest = split
        other = batch - ({*baseline.data} - context) or tokens - context or any(rest)
        parts.append(-1 if other else len(batch) + len(tokens))
    return np.array([float(p < max(parts)) for p in parts])


def _edge_penalties(space: SearchSpace, baseline: _Baseline, edge: Edge) -> np.ndarray:
    """Of conversions that gather or move a split: of a weight along the tensor axis, of samples
    along a data axis. [source candidate, target candidate]"""
    source, target = space.decisions[edge.source], space.decisions[edge.target]
    outs = [c.outputs[edge.result] for c in source.candidates]
    ins = [c.inputs[edge.operand] for c in target.candidates]
    count = np.zeros((len(outs), len(ins)))
    if edge.weight and baseline.tensor is not None:
        before, after = _split_dims(outs, baseline.tensor), _split_dims(ins, baseline.tensor)
        count += before[:, None] != after[None, :]
    if not edge.weight and target.kind != "output":
        for axis in baseline.data:
            before, after = _split_dims(outs, axis), _split_dims(ins, axis)
            count += (before[:, None] >= 0) & (before[:, None] != after[None, :])
    return count


def _split_over(spec: ShardingSpec, axes: Sequence[int]) -> set[int]:
    return {axis for dim in spec.dims for axis in dim} & {*axes}


def _split_dims(specs: Sequence[ShardingSpec | None], axis: int) -> np.ndarray:
    """Per spec the tensor dim that the axis splits, or -1."""
    dims = [spec.dims if spec is not None else () for spec in specs]
    return np.array([next((d for d, axes in enumerate(ds) if axis in axes), -1) for ds in dims])
