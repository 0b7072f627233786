"""Correct strategies of an op along one axis, found by trial.

Operands are split or replaced by terms of a sum, the op runs on the parts, and its results are
joined and compared. If a rule omits a correct strategy, every plan with the op may be slower. For
an op without a rule, a rule can be proposed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from autopar.ir.graph import bound_arguments
from autopar.ir.spec import ShardingSpec, fills_every_rank, local_shape
from autopar.sharding.node_rules import is_floating
from autopar.sharding.rules.view import RESHAPES
from autopar.testing.rules.draw import Draw
from autopar.testing.rules.one_op import OneOp, call, flat_tensors, grad, leaves_of
from autopar.testing.rules.shards import largest_error, ranks, split, tolerance_of

PARTS = (2, 3)
_MOST = 4000  # combinations tried per call
ABSENT = ""

# Per operand and per result: "R", "S<dim>", "P", and for results also "max" and "min".
States = tuple[str, ...]


@dataclass(frozen=True, order=True)
class AxisStrategy:
    """States of a call's operands along one axis, and the resulting states of its results."""

    inputs: States
    outputs: States

    def __str__(self) -> str:
        shown = [[s or "-" for s in states] for states in (self.inputs, self.outputs)]
        return f"{', '.join(shown[0])} -> {', '.join(shown[1])}"

    @property
    def special(self) -> bool:
        """Whether results are maxima or minima over the ranks, for which there is no layout."""
        return not {"max", "min"}.isdisjoint(self.outputs)


def correct_strategies(
    one: OneOp, parts: int, draw: Draw, *, careful: bool = False
) -> set[AxisStrategy]:
    """All strategies that are correct for the call with this number of parts.

    Args:
        careful: split dims of equal extents together, because torch does not check some ops' sizes.
    """
    options = [list(options_of(x, trained, parts)) for x, trained in zip(one.inputs, one.trained)]  # noqa: B905
    count = math.prod(map(len, options))
    chosen = set(draw.source.sample(range(count), min(count, _MOST)))
    correct = set()
    for number, states in enumerate(itertools.product(*options)):
        if (
            number not in chosen
            or all(s in ("R", ABSENT) for s in states)
            or not compatible(one, states, parts)
        ):
            continue
        if careful and not _together(one, states):
            continue
        for dim in _result_dims(one):
            outputs = _tried(one, states, parts, dim, draw)
            if outputs is not None and compatible(one, (*states, *outputs), parts):
                correct.add(AxisStrategy(states, outputs))
    return correct


def options_of(x: torch.Tensor | None, trained: bool, parts: int) -> Iterator[str]:
    if x is None:
        yield ABSENT
        return
    yield "R"
    for dim, size in enumerate(x.shape):
        if fills_every_rank(size, (0,), (parts,)):
            yield f"S{dim}"
    if trained:
        yield "P"


def compatible(one: OneOp, states: States, parts: int) -> bool:
    """Whether the split dims of operands and results are equal or split evenly.

    Uneven parts of different extents fit each other by chance only.
    """
    extents = {
        x.shape[int(s[1:])]
        for x, s in zip((*one.inputs, *one.outputs), states, strict=False)
        if x is not None and s.startswith("S") and int(s[1:]) < x.ndim
    }
    return len(extents) < 2 or all(n % parts == 0 for n in extents)


def _together(one: OneOp, states: States) -> bool:
    """Whether one extent is split, in every operand that has it."""
    pairs = [(x, s) for x, s in zip(one.inputs, states, strict=True) if x is not None]
    extents = {x.shape[int(s[1:])] for x, s in pairs if s.startswith("S")}
    return len(extents) < 2 and all(
        s.startswith("S") or extents.isdisjoint(x.shape) for x, s in pairs
    )


def _result_dims(one: OneOp) -> list[int | None]:
    """Result dims to split, for ops with an argument for the result's size."""
    if _size_argument(one) is None and str(one.sample.op) not in RESHAPES:
        return [None]
    return list(range(one.outputs[0].ndim)) or [None]


def _size_argument(one: OneOp) -> str | None:
    names = (a.name for a in one.sample.op._schema.arguments if "List[int]" in str(a.type))
    return next((n for n in names if n in ("size", "shape")), None)


def _spec(state: str, ndim: int) -> ShardingSpec:
    if state == "P":
        return ShardingSpec(((),) * ndim, (0,))
    dims = tuple((0,) if state == f"S{d}" else () for d in range(ndim))
    return ShardingSpec(dims)


def _tried(one: OneOp, states: States, parts: int, dim: int | None, draw: Draw) -> States | None:
    """States of the results, if values and gradients are correct; else None."""
    mesh = (parts,)
    pieces = [
        None if x is None else split(x, _spec(s, x.ndim), mesh, draw)
        for x, s in zip(one.inputs, states, strict=True)
    ]
    leaves = [
        leaves_of([None if p is None else p[c].clone() for p in pieces], one.trained)
        for c in ranks(mesh)
    ]
    try:
        results = [_run(one, leaf, dim, parts, i) for i, leaf in enumerate(leaves)]
    except (RuntimeError, IndexError, ValueError):
        return None
    if any(len(r) != len(one.outputs) for r in results):
        return None
    tolerance = tolerance_of([*one.inputs, *one.outputs])
    outputs = []
    for i, full in enumerate(one.outputs):
        state = _state([r[i].detach() for r in results], full, tolerance)
        if state is None or (dim is not None and i == 0 and state != f"S{dim}"):
            return None
        outputs.append(state)
    out = tuple(outputs)
    if AxisStrategy(states, out).special:
        return out
    return out if _gradients_hold(one, states, out, leaves, results, tolerance) else None


def _run(
    one: OneOp, leaves: Sequence[torch.Tensor | None], dim: int | None, parts: int, index: int
) -> list[torch.Tensor]:
    if dim is None:
        return flat_tensors(call(one.node, leaves))
    shape = list(one.outputs[0].shape)
    if not fills_every_rank(shape[dim], (0,), (parts,)):
        raise ValueError("too small")
    shape = list(local_shape(shape, _spec(f"S{dim}", len(shape)), (parts,), (index,)))
    if str(one.sample.op) in RESHAPES:
        assert leaves[0] is not None
        return [leaves[0].reshape(shape)]
    name = _size_argument(one)
    assert name is not None
    arguments = bound_arguments(one.node) | {name: shape}
    tensors = iter(leaves)
    values = {k: next(tensors) if hasattr(v, "users") else v for k, v in arguments.items()}
    return flat_tensors(one.sample.op(**values))


def _state(pieces: Sequence[torch.Tensor], full: torch.Tensor, tolerance: float) -> str | None:
    """State of a result, by its parts and its global value; None if none fits."""
    if any(p.dtype != full.dtype or p.ndim != full.ndim for p in pieces):
        return None
    near = _near(tolerance)
    for dim, size in enumerate(full.shape):
        if not fills_every_rank(size, (0,), (len(pieces),)):
            continue
        chunks = full.chunk(len(pieces), dim)
        if len(chunks) == len(pieces) and all(map(near, pieces, chunks)):
            return f"S{dim}"
    if any(p.shape != full.shape for p in pieces):
        return None
    if all(near(p, full) for p in pieces):
        return "R"
    stacked = torch.stack(list(pieces))
    if full.dtype != torch.bool and near(stacked.sum(0).to(full.dtype), full):
        return "P" if is_floating(full) else None
    if full.dtype.is_complex or not full.numel():
        return None
    if near(stacked.amax(0), full):
        return "max"
    return "min" if near(stacked.amin(0), full) else None


def _near(tolerance: float) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return lambda a, b: a.shape == b.shape and largest_error(a, b) <= tolerance


def _gradients_hold(
    one: OneOp,
    states: States,
    outputs: States,
    leaves: Sequence[Sequence[torch.Tensor | None]],
    results: Sequence[Sequence[torch.Tensor]],
    tolerance: float,
) -> bool:
    parts = len(leaves)
    near = _near(tolerance)
    shares = [
        list(c.chunk(parts, int(s[1:]))) if c is not None and s.startswith("S") else [c] * parts
        for c, s in zip(one.cotangents, outputs, strict=True)
    ]
    try:
        gradients = list(map(grad, results, zip(*shares, strict=True), leaves))
    except RuntimeError:
        return False
    for k, (full, state) in enumerate(zip(one.gradients, states, strict=True)):
        if full is None:
            continue
        local = [g for f in gradients if (g := f[k]) is not None]
        if state.startswith("S"):
            held = all(map(near, local, full.chunk(parts, int(state[1:]))))
        elif state == "P":
            held = all(near(g, full) for g in local)
        else:  # R, or V, whose gradients are terms of a sum
            held = all(near(g, full) for g in local) or near(torch.stack(local).sum(0), full)
        if not held:
            return False
    return True


def recheck(one: OneOp, strategy: AxisStrategy, parts: int, draw: Draw) -> set[AxisStrategy]:
    """The correct strategies of a call that have the operands' states of this one."""
    tried = (_tried(one, strategy.inputs, parts, dim, draw) for dim in _result_dims(one))
    return {AxisStrategy(strategy.inputs, outputs) for outputs in tried if outputs is not None}
