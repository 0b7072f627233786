"""From global tensors to shards, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from autopar.ir.spec import ShardingSpec, local_range
from autopar.runtime.distribute import shard_of
from autopar.sharding.node_rules import is_floating
from autopar.testing.rules.draw import Draw

Mesh = tuple[int, ...]
Coords = tuple[int, ...]
Pieces = Mapping[Coords, torch.Tensor]

# Largest error, relative to max(1, |global value|), by float type.
TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4}
COARSE = 5e-2  # half precision


@dataclass(frozen=True)
class Difference:
    """A rank's tensor that differs from what the strategy says.

    Args:
        value: "result 0", "gradient of operand 1", or the step that failed.
        coords: the rank, None for what concerns all of them.
        error: relative to max(1, |global value|); inf for shapes, dtypes and exceptions.
        detail: expected and actual value.
    """

    value: str
    coords: Coords | None
    error: float
    detail: str

    def __str__(self) -> str:
        rank = "" if self.coords is None else f" on rank {self.coords}"
        return f"{self.value}{rank}: {self.detail}"


def ranks(mesh: Mesh) -> Iterator[Coords]:
    """Coordinates of all ranks."""
    return itertools.product(*(range(size) for size in mesh))


def split(
    x: torch.Tensor, spec: ShardingSpec, mesh: Mesh, draw: Draw
) -> dict[Coords, torch.Tensor]:
    """Every rank's part of a global tensor: shards, and random terms of pending sums."""
    terms = _terms(x.detach(), [mesh[a] for a in spec.partial], draw)
    return {
        coords: shard_of(terms[tuple(coords[a] for a in spec.partial)], spec, mesh, coords)
        for coords in ranks(mesh)
    }


def _terms(x: torch.Tensor, sizes: Sequence[int], draw: Draw) -> dict[Coords, torch.Tensor]:
    where = list(itertools.product(*map(range, sizes)))
    if len(where) == 1:
        return {where[0]: x}
    holder = draw.choice(where)
    terms = {coords: _term(x, draw) for coords in where if coords != holder}
    rest = x
    if x.dtype != torch.bool:
        for term in terms.values():
            rest = rest - term
    return {**terms, holder: rest}


def _term(x: torch.Tensor, draw: Draw) -> torch.Tensor:
    if x.dtype == torch.bool:  # one rank holds the value, as after `inject`
        return torch.zeros_like(x)
    if is_floating(x):
        return draw.normal(*x.shape).to(x.dtype)
    return draw.integers(x.shape, -3, 4).to(x.dtype)


def joined(pieces: Pieces, spec: ShardingSpec, mesh: Mesh, shape: Sequence[int]) -> torch.Tensor:
    """The global tensor of the ranks' parts; of replicas, the first rank's."""
    first = next(iter(pieces.values()))
    full = first.new_zeros(tuple(shape))
    used = {a for axes in spec.dims for a in axes} | set(spec.partial)
    for coords, piece in pieces.items():
        if any(c for a, c in enumerate(coords) if a not in used):
            continue
        part = shard_of(full, spec, mesh, coords)
        part.copy_(part | piece if full.dtype == torch.bool else part + piece)
    return full


def differences(
    value: str,
    pieces: Pieces,
    spec: ShardingSpec,
    summed: Sequence[int],
    full: torch.Tensor,
    mesh: Mesh,
    tolerance: float,
) -> tuple[float, list[Difference]]:
    """Compare every rank's tensor with its shard of the global one, after sums over some axes.

    Args:
        spec: which dims are split; elsewhere every rank must hold the same.
        summed: axes along which the ranks hold terms.
    """
    sums: dict[Coords, torch.Tensor] = {}
    for coords, piece in pieces.items():
        expected = shard_of(full, spec, mesh, coords)
        if piece.shape != expected.shape or piece.dtype != expected.dtype:
            detail = (
                f"expected {expected.dtype} of shape {tuple(expected.shape)}, "
                f"got {piece.dtype} of shape {tuple(piece.shape)}"
            )
            return math.inf, [Difference(value, coords, math.inf, detail)]
        key = tuple(0 if a in summed else c for a, c in enumerate(coords))
        sums[key] = sums[key] + piece if key in sums else piece
    worst, off = 0.0, []
    for coords, piece in sums.items():
        expected = shard_of(full, spec, mesh, coords)
        error = largest_error(piece, expected)
        worst = max(worst, error)
        if not error <= tolerance:
            terms = f", summed over axes {list(summed)}," if summed else ""
            detail = f"off by {error:.3g}{terms} from the shard {_range(full, spec, mesh, coords)}"
            off.append(Difference(value, coords, error, detail))
    return worst, off


def _range(full: torch.Tensor, spec: ShardingSpec, mesh: Mesh, coords: Coords) -> str:
    parts = []
    for size, axes in zip(full.shape, spec.dims, strict=True):
        start, length = local_range(size, axes, mesh, coords)
        parts.append(":" if length == size else f"{start}:{start + length}")
    return f"[{', '.join(parts)}] of the global tensor"


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to max(1, |expected|); equal infinities and NaNs agree."""
    if not actual.numel() or torch.equal(actual, expected):
        return 0.0
    if not is_floating(actual):
        return float((actual != expected).double().max())
    both = (actual == expected) | (actual.isnan() & expected.isnan())
    if not (actual.isfinite() & expected.isfinite() | both).all():
        return math.inf
    off = (actual - expected).abs().masked_fill(both, 0)
    scale = expected.abs().masked_fill(both, 0).max().clamp(min=1)
    return float(off.max() / scale)


def tolerance_of(tensors: Sequence[torch.Tensor | None]) -> float:
    """By the narrowest float type among the tensors of a call."""
    floats = [t.dtype for t in tensors if t is not None and is_floating(t)]
    return max((TOLERANCE.get(dtype, COARSE) for dtype in floats), default=1e-10)
