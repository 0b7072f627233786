"""One case of the proof: a call, a mesh and a strategy, run on shards and compared rank by rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import planning_groups
from autopar.ir.graph import operands
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.plan import ShardingPlan
from autopar.plan_records import MemoryEstimate, SolverRecord, TimeEstimate
from autopar.sharding.node_rules import declared_of
from autopar.sharding.rule import Strategy
from autopar.testing.rules.collectives import Run, counted, undeclared
from autopar.testing.rules.draw import Draw
from autopar.testing.rules.one_op import OneOp, call, flat_tensors, grad, leaves_of, substituted
from autopar.testing.rules.random_ops import RANDOM, UNDEFINED, kept_mask, seed_torch
from autopar.testing.rules.shards import (
    TOLERANCE,
    Coords,
    Difference,
    Mesh,
    differences,
    joined,
    ranks,
    split,
    tolerance_of,
)
from autopar.testing.simulated_ranks import SimulatedMesh

_TIMEOUT_S = 20.0
_SEED = 1234


@dataclass(frozen=True)
class Outcome:
    """Result of a case: its largest error (0 if not in float64), and the differences."""

    worst: float
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class _RankResult:
    """Results of one rank.

    Args:
        results: of the forward.
        gradients: of its operands; None for those that take none.
        forward, backward: the collectives that each ran.
    """

    results: Sequence[torch.Tensor]
    gradients: Sequence[torch.Tensor | None]
    forward: Counter[Run]
    backward: Counter[Run]


def check_case(
    one: OneOp, mesh: Mesh, strategy: Strategy, draw: Draw, *, transposed: bool | None = None
) -> Outcome:
    """Run the call on every rank's shards, by the production path, and compare.

    Args:
        transposed: whether shards have the strides that a transposition leaves; drawn if None.
    """
    if transposed is None:
        transposed = draw.chance(25)
    try:
        by_rank = _run(one, mesh, strategy, draw, transposed)
    except Exception as error:  # any exception of a rank is a failure
        if transposed and not _takes_any_strides(one):
            return check_case(one, mesh, strategy, draw, transposed=False)
        lines = str(error).strip().splitlines() or [""]
        text = f"{type(error).__name__}: {lines[0]}"
        return Outcome(math.inf, (Difference("the ranks' program", None, math.inf, text),))
    return _compared(one, mesh, strategy, by_rank)


# -- the ranks ----------------------------------------------------------------------------------


def _run(
    one: OneOp, mesh: Mesh, strategy: Strategy, draw: Draw, transposed: bool
) -> dict[Coords, _RankResult]:
    plan = plan_of(one, mesh, strategy)
    inputs: list[Mapping[Coords, torch.Tensor] | None] = [
        None if x is None or spec is None else split(x, spec, mesh, draw)
        for x, spec in zip(one.inputs, strategy.inputs, strict=True)
    ]
    cotangents = [
        None if c is None else split(c, ShardingSpec(spec.dims), mesh, draw)
        for c, spec in zip(one.cotangents, strategy.outputs, strict=True)
    ]
    groups = _simulated(mesh).groups if strategy.lowered else _silent_groups(mesh)

    def rank(coords: Coords) -> _RankResult:
        program = apply_sharding(
            one.graph, plan, coords=coords, groups=groups[coords], output_specs=strategy.outputs
        )
        shards = [None if x is None else _with_strides(x[coords], transposed) for x in inputs]
        leaves = leaves_of(shards, one.trained)
        local = [None if c is None else c[coords] for c in cotangents]
        return _step(one, program, leaves, local)

    if not strategy.lowered:
        return {coords: rank(coords) for coords in ranks(mesh)}
    return _simulated(mesh).run(rank)


def _step(
    one: OneOp,
    program: LocalProgram,
    leaves: Sequence[torch.Tensor | None],
    cotangents: Sequence[torch.Tensor | None],
) -> _RankResult:
    """Forward and backward of one rank."""
    name_of = {n.name: x for n, x in zip(operands(one.node), leaves, strict=True) if n is not None}
    arguments = [name_of[name] for name in one.placeholders]
    if program.takes_seed:
        arguments.append(torch.tensor(_SEED))
    seed_torch(str(one.sample.op))
    with counted() as forward:
        results = program.gm(*arguments)
    with counted() as backward:
        gradients = grad(results, cotangents, leaves)
    return _RankResult([r.detach() for r in results], gradients, forward, backward)


def _with_strides(x: torch.Tensor, transposed: bool) -> torch.Tensor:
    """A copy; if `transposed`, with the strides of a transposed producer, since shards may have
    any."""
    if transposed and x.ndim > 2:
        return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    return x.clone(memory_format=torch.contiguous_format)


def _takes_any_strides(one: OneOp) -> bool:
    """Whether the op supports such strides on global tensors."""
    inputs = [None if x is None else _with_strides(x, True) for x in one.inputs]
    leaves = leaves_of(inputs, one.trained)
    try:
        grad(flat_tensors(call(one.node, leaves)), one.cotangents, leaves)
    except RuntimeError:
        return False
    return True


def plan_of(one: OneOp, mesh: Mesh, strategy: Strategy) -> ShardingPlan:
    """A plan with exactly this strategy, so that no conversions are necessary."""
    choices = {one.node.name: strategy.name}
    for operand, spec, trained in zip(
        operands(one.node), strategy.inputs, one.trained, strict=True
    ):
        if operand is not None and spec is not None:
            choices[operand.name] = str(spec if trained else spec.data()) or "scalar"
    return ShardingPlan(
        model="OneOp",
        fingerprint="",
        mesh=mesh,
        cluster=_cluster(mesh),
        choices=choices,
        parameters={},
        reshard_after_forward=(),
        time=TimeEstimate(0, 0, 0),
        memory=MemoryEstimate(0, 0, 0, 0, 0, 0),
        solver=SolverRecord("", 0, 0, 0),
        budget_bytes=0,
    )


@lru_cache
def _cluster(mesh: Mesh) -> Mapping[str, Any]:
    return ClusterInfo.of("x".join(map(str, mesh)), "A100-80G").to_dict()


@lru_cache
def _simulated(mesh: Mesh) -> SimulatedMesh:
    return SimulatedMesh(mesh, timeout_s=_TIMEOUT_S)


@lru_cache
def _silent_groups(mesh: Mesh) -> dict[Coords, tuple[str, ...]]:
    """Groups whose collectives raise: without a lowering there is no communication."""
    prefix = f"proof-silent/{'x'.join(map(str, mesh))}"
    return {coords: planning_groups(mesh, coords, prefix) for coords in ranks(mesh)}


# -- the comparison -----------------------------------------------------------------------------


def _compared(
    one: OneOp, mesh: Mesh, strategy: Strategy, by_rank: Mapping[Coords, _RankResult]
) -> Outcome:
    name = str(one.sample.op)
    results = [{c: r.results[i] for c, r in by_rank.items()} for i in range(len(one.outputs))]
    outputs, gradients = one.outputs, one.gradients
    differing: list[Difference] = []
    if one.rule[0].always:  # compare with the op for the ranks' draw
        drawn = [
            joined(pieces, spec, mesh, full.shape)
            for pieces, spec, full in zip(results, strategy.outputs, outputs, strict=True)
        ]
        differing += _draw_differences(one, strategy, mesh, drawn, results)
        leaves = leaves_of(one.inputs, one.trained)
        outputs = tuple(RANDOM[name](drawn, substituted(one.node, leaves)))
        gradients = grad(outputs, one.cotangents, leaves)
    if name in UNDEFINED:
        outputs = tuple(x.new_zeros(x.shape) for x in outputs)
        results = [{c: torch.zeros_like(p) for c, p in pieces.items()} for pieces in results]
    compared = [
        (f"result {i}", results[i], spec, spec.partial, outputs[i].detach())
        for i, spec in enumerate(strategy.outputs)
    ]
    for i, (gradient, layout) in enumerate(zip(gradients, strategy.inputs, strict=True)):
        if gradient is not None and layout is not None:
            pieces = {c: g for c, r in by_rank.items() if (g := r.gradients[i]) is not None}
            value = f"gradient of operand {i}"
            compared.append((value, pieces, layout, layout.varying, gradient))
    tolerance = tolerance_of([*one.inputs, *one.outputs])
    worst = 0.0
    for value, pieces, spec, summed, full in compared:
        error, off = differences(value, pieces, spec, summed, full, mesh, tolerance)
        worst, differing = max(worst, error), differing + off
    if strategy.lowered:
        carries = any(one.trained[:1]) and any(c is not None for c in one.cotangents)
        for coords, rank in by_rank.items():
            declared = declared_of(one.node, strategy, mesh, coords)
            for detail in undeclared(declared, rank.forward, rank.backward, carries=carries):
                differing.append(Difference("the collectives", coords, math.inf, detail))
    return Outcome(worst if tolerance == TOLERANCE[torch.float64] else 0.0, tuple(differing))


def _draw_differences(
    one: OneOp,
    strategy: Strategy,
    mesh: Mesh,
    full: Sequence[torch.Tensor],
    results: Sequence[Mapping[Coords, torch.Tensor]],
) -> list[Difference]:
    """Errors of the draw: a wrong share of kept elements, or the same draw on different shards."""
    name, arguments = str(one.sample.op), substituted(one.node, list(one.inputs))
    differing: list[Difference] = []
    drawn = kept_mask(name, full, arguments)
    if drawn is None:
        return []
    mask, share = drawn
    count = mask.numel()
    spread = 6 * math.sqrt(share * (1 - share) / max(count, 1)) + 1e-9
    if abs(float(mask.double().mean()) - share) > spread:
        detail = f"{float(mask.double().mean()):.3f} of {count} kept, expected {share:.3f}"
        differing.append(Difference("the draw", None, math.inf, detail))
    seen: dict[tuple[int, ...], tuple[Coords, torch.Tensor]] = {}
    for coords in ranks(mesh):
        local = kept_mask(name, [pieces[coords] for pieces in results], arguments)
        assert local is not None
        key = tuple(coords[a] for axes in strategy.splits.values() for a in axes)
        for other, (where, earlier) in seen.items():
            # so many equal draws do not occur by chance
            likely = min(share, 1 - share) > 0.2 and earlier.numel() >= 150
            if other != key and likely and torch.equal(earlier, local[0]):
                detail = f"the same draw as on rank {where}, which holds another shard"
                differing.append(Difference("the draw", coords, math.inf, detail))
        seen.setdefault(key, (coords, local[0]))
    return differing
