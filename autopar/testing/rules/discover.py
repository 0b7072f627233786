"""Strategies that are right, found by trying: operands split, or given as terms of a sum, the op
run on the parts, and its results put together again.

A rule that leaves out what is right costs time on every mesh; an op without a rule can be given the
one that is found.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.ir.graph import bound_arguments
from autopar.ir.spec import ShardingSpec, fills_every_rank, local_shape
from autopar.sharding.rules.view import RESHAPES
from autopar.testing.rules.draw import Draw
from autopar.testing.rules.one_op import OneOp, call, flat_tensors, grad
from autopar.testing.rules.shards import largest_error, ranks, split, tolerance_of

PARTS = (2, 3)
_MOST = 4000  # ways to split a call that are tried
ABSENT = ""

# Per operand and per result: "R", "S<dim>", "P", and for results also "max" and "min".
States = tuple[str, ...]


@dataclass(frozen=True, order=True)
class Way:
    """How the operands of a call may be held along one axis, and what the results then are."""

    inputs: States
    outputs: States

    def __str__(self) -> str:
        shown = [[s or "-" for s in states] for states in (self.inputs, self.outputs)]
        return f"{', '.join(shown[0])} -> {', '.join(shown[1])}"

    @property
    def special(self) -> bool:
        """Results are maxima or minima over the ranks, for which there is no layout."""
        return not {"max", "min"}.isdisjoint(self.outputs)


def ways(one: OneOp, parts: int, draw: Draw, *, careful: bool = False) -> set[Way]:
    """All ways that are right for the call, with its dims in so many parts.

    Args:
        careful: split dims of equal extents together only: torch does not check some ops' sizes.
    """
    options = [list(options_of(x, trained, parts)) for x, trained in zip(one.inputs, one.trained)]  # noqa: B905
    count = 1
    for choices in options:
        count *= len(choices)
    combinations: Iterator[States] = itertools.product(*options)
    if count > _MOST:
        chosen = set(draw.source.sample(range(count), _MOST))
        combinations = (c for i, c in enumerate(itertools.product(*options)) if i in chosen)
    found = set()
    for states in combinations:
        if all(s in ("R", ABSENT) for s in states) or not compatible(one, states, parts):
            continue
        if careful and not _alike(one, states):
            continue
        for dim in _told_sizes(one):
            outputs = _tried(one, states, parts, dim, draw)
            if outputs is not None and compatible(one, (*states, *outputs), parts):
                found.add(Way(states, outputs))
    return found


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
    """Dims split together, of operands and (if states are given) results, are equal, or are split
    evenly: uneven parts of different dims fit each other by chance at most."""
    extents = {
        x.shape[int(s[1:])]
        for x, s in zip((*one.inputs, *one.outputs), states, strict=False)
        if x is not None and s.startswith("S") and int(s[1:]) < x.ndim
    }
    return len(extents) < 2 or all(n % parts == 0 for n in extents)


def _alike(one: OneOp, states: States) -> bool:
    """One extent is split, in every operand that has it."""
    pairs = [(x, s) for x, s in zip(one.inputs, states, strict=True) if x is not None]
    extents = {x.shape[int(s[1:])] for x, s in pairs if s.startswith("S")}
    return len(extents) < 2 and all(
        s.startswith("S") or extents.isdisjoint(x.shape) for x, s in pairs
    )


def _told_sizes(one: OneOp) -> list[int | None]:
    """Result dims that are to be split, for ops that are told their result's size."""
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
    """What the results are, if this way of splitting is right in values and gradients."""
    mesh = (parts,)
    pieces = [
        None if x is None else split(x, _spec(s, x.ndim), mesh, draw)
        for x, s in zip(one.inputs, states, strict=True)
    ]
    leaves = [
        [
            None if p is None else p[c].clone().requires_grad_(trained)
            for p, trained in zip(pieces, one.trained, strict=True)
        ]
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
    for i, whole in enumerate(one.outputs):
        state = _state([r[i].detach() for r in results], whole, tolerance)
        if state is None or (dim is not None and i == 0 and state != f"S{dim}"):
            return None
        outputs.append(state)
    found = tuple(outputs)
    if Way(states, found).special:
        return found
    return found if _gradients_hold(one, states, found, leaves, results, tolerance) else None


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
    given = iter(leaves)
    values = {k: next(given) if hasattr(v, "users") else v for k, v in arguments.items()}
    return flat_tensors(one.sample.op(**values))


def _state(pieces: Sequence[torch.Tensor], whole: torch.Tensor, tolerance: float) -> str | None:
    """How the parts' results make up the whole one."""
    if any(p.dtype != whole.dtype or p.ndim != whole.ndim for p in pieces):
        return None
    for dim, size in enumerate(whole.shape):
        if not fills_every_rank(size, (0,), (len(pieces),)):
            continue
        chunks = whole.chunk(len(pieces), dim)
        if len(chunks) == len(pieces) and all(map(_near(tolerance), pieces, chunks)):
            return f"S{dim}"
    if any(p.shape != whole.shape for p in pieces):
        return None
    near = _near(tolerance)
    if all(near(p, whole) for p in pieces):
        return "R"
    stacked = torch.stack(list(pieces))
    if whole.dtype != torch.bool and near(stacked.sum(0).to(whole.dtype), whole):
        return "P" if whole.dtype.is_floating_point or whole.dtype.is_complex else None
    if whole.dtype.is_complex or not whole.numel():
        return None
    if near(stacked.amax(0), whole):
        return "max"
    return "min" if near(stacked.amin(0), whole) else None


def _near(tolerance: float) -> Any:
    def near(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and largest_error(a, b) <= tolerance

    return near


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
        [None] * parts if c is None else
        list(c.chunk(parts, int(s[1:]))) if s.startswith("S") else [c] * parts
        for c, s in zip(one.cotangents, outputs, strict=True)
    ]  # fmt: skip
    try:
        found = [
            grad(r, [s[i] for s in shares], leaf)
            for i, (r, leaf) in enumerate(zip(results, leaves, strict=True))
        ]
    except RuntimeError:
        return False
    for k, (whole, state) in enumerate(zip(one.gradients, states, strict=True)):
        if whole is None:
            continue
        local = [g for f in found if (g := f[k]) is not None]
        if state.startswith("S"):
            held = all(map(near, local, whole.chunk(parts, int(state[1:]))))
        elif state == "P":
            held = all(near(g, whole) for g in local)
        else:  # R, or V: then the gradients are terms of a sum
            held = all(near(g, whole) for g in local) or near(torch.stack(local).sum(0), whole)
        if not held:
            return False
    return True


def recheck(one: OneOp, way: Way, parts: int, draw: Draw) -> set[Way]:
    found = set()
    for dim in _told_sizes(one):
        outputs = _tried(one, way.inputs, parts, dim, draw)
        if outputs is not None:
            found.add(Way(way.inputs, outputs))
    return found
