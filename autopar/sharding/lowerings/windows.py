"""Sliding windows over split space: each rank fetches the rows its windows reach into (the halo).

A rank that computes the results [first, first + count) reads the inputs from first * stride -
padding on. An all-gather of the shards' edges brings the rows of other ranks. If a shard is
narrower than what its neighbors read of it, entire shards are gathered instead. Every rank computes
what every rank reads, so all make the same choice, and run the same operators: ranks at a border
have empty parts, and the others borders of no rows. One schedule then fits all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from autopar.comm import steps
from autopar.comm.groups import find_group
from autopar.ir.spec import local_range
from autopar.sharding.lowerings.declared import (
    Collective,
    Declaration,
    Declared,
    LocalCall,
    declares,
)
from autopar.sharding.lowerings.shard import Shard, share_of

Extent = int | Sequence[int]


@dataclass(frozen=True)
class _Window:
    """Extent, step and borders of a sliding window along one dim."""

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int

    def results(self, size: int) -> int:
        reach = self.dilation * (self.kernel - 1) + 1
        return (size + self.before + self.after - reach) // self.stride + 1

    def reads(self, first: int, count: int) -> tuple[int, int]:
        """Inputs [low, high) of results [first, first + count); may lie outside of the tensor."""
        low = first * self.stride - self.before
        reach = self.dilation * (self.kernel - 1) + 1
        return low, low + (count - 1) * self.stride + reach


@dataclass(frozen=True)
class _Halo:
    """What the ranks along a split dim hold of it and read of it.

    Args:
        held: start and length of every rank's shard.
        reads: inputs [low, high) of every rank's results.
        before, after: rows that ranks read of the shards before and after their own, at most.
    """

    held: list[tuple[int, int]]
    reads: list[tuple[int, int]]
    before: int
    after: int

    @property
    def within_neighbors(self) -> bool:
        """Whether every shard has all rows that its neighbors read of it."""
        return min(n for _, n in self.held) >= max(self.before, self.after)


def _halo(size: int, mesh: Sequence[int], window: _Window) -> _Halo:
    """Of a dim of extent `size` that axes of these sizes split, outermost first."""
    axes = range(len(mesh))
    ranks = list(product(*map(range, mesh)))
    held = [local_range(size, axes, mesh, r) for r in ranks]
    reads = [window.reads(*local_range(window.results(size), axes, mesh, r)) for r in ranks]
    pairs = list(zip(held, reads, strict=True))
    before = max(0, *(start - max(low, 0) for (start, _), (low, _) in pairs))
    after = max(0, *(min(high, size) - start - n for (start, n), (_, high) in pairs))
    return _Halo(held, reads, before, after)


def _position(mesh: Sequence[int], coords: Sequence[int]) -> int:
    """Number of a rank among those along the axes, as `_Halo` lists them."""
    return list(product(*map(range, mesh))).index(tuple(coords))


def _gathered_extents(
    halo: _Halo, size: int, mesh: Sequence[int], coords: Sequence[int]
) -> list[int]:
    """Extent of the dim after each all-gather of `_fetch`, innermost axis first."""
    depths = range(len(mesh) - 1, -1, -1)
    if not halo.within_neighbors:
        return [local_range(size, range(d), mesh[:d], coords[:d])[1] for d in depths]
    width = halo.before + halo.after
    return [width * math.prod(mesh[d:]) for d in depths] if width else []


def _fetch(
    x: torch.Tensor, dim: int, size: int, groups: Sequence[str], window: _Window, fill: float
) -> torch.Tensor:
    """The inputs of this rank's results along a split dim of extent `size`, borders filled."""
    members = [find_group(g) for g in groups]
    mesh, coords = [g.size for g in members], [g.index for g in members]
    halo, me = _halo(size, mesh, window), _position(mesh, coords)
    extents = _gathered_extents(halo, size, mesh, coords)
    start = halo.held[me][0]
    if not halo.within_neighbors:
        x, start = _gathered(x, dim, extents, groups), 0
    elif extents:
        x, start = _with_edges(x, dim, extents, groups, halo, me)
    low, high = halo.reads[me]
    length = min(high, size) - max(low, 0)
    # a window may lie in the border altogether
    x = x.narrow(dim, max(low, 0) - start, length) if length > 0 else x.narrow(dim, 0, 0)
    if all(low >= 0 and high <= size for low, high in halo.reads):
        return x
    return _border(x, dim, max(0, min(0, high) - low), max(0, high - max(size, low)), fill)


def _gathered(
    x: torch.Tensor, dim: int, extents: Sequence[int], groups: Sequence[str]
) -> torch.Tensor:
    for extent, group in zip(extents, reversed(groups), strict=True):
        x = steps.all_gather_vary(x, dim, extent, group)
    return x


def _with_edges(
    x: torch.Tensor, dim: int, extents: Sequence[int], groups: Sequence[str], halo: _Halo, me: int
) -> tuple[torch.Tensor, int]:
    """This shard between the rows that its neighbors hold, and where that starts."""
    length, start, width = x.shape[dim], halo.held[me][0], halo.before + halo.after
    first, last = x.narrow(dim, 0, halo.after), x.narrow(dim, length - halo.before, halo.before)
    edges = _gathered(torch.cat([first, last], dim), dim, extents, groups)
    before = halo.before if me > 0 else 0
    after = halo.after if me < len(halo.held) - 1 else 0
    parts = [x]
    if halo.before:
        at = (me - 1) * width + halo.after if before else 0
        parts.insert(0, edges.narrow(dim, at, before))
    if halo.after:
        parts.append(edges.narrow(dim, (me + 1) * width if after else 0, after))
    return torch.cat(parts, dim), start - before


def _border(x: torch.Tensor, dim: int, low: int, high: int, fill: float) -> torch.Tensor:
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [low, high], value=fill)


def spread(value: int | Sequence[int], count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _windowed(
    x: torch.Tensor, shard: Shard, windows: Sequence[_Window], fill: float
) -> tuple[torch.Tensor, list[int]]:
    """Fetch along every split spatial dim (s0, s1, ...); returns the remaining padding."""
    remaining = [w.before for w in windows]
    for i, window in enumerate(windows):
        dim = x.ndim - len(windows) + i
        if f"s{i}" in shard:
            _, _, size, groups = shard[f"s{i}"]
            x = _fetch(x, dim, size, groups, window, fill)
            remaining[i] = 0
        elif window.before != window.after:
            x = _border(x, dim, window.before, window.after, fill)
            remaining[i] = 0
    return x, remaining


# Passes over the operand, forward and backward, of a halo that is joined and cut off again.
_PASSES = 5


def _declared(call: LocalCall, windows: Sequence[_Window]) -> Declared:
    """All-gathers of halos, and reduce-scatters of their gradients, as `_windowed` runs them."""
    shape, runs, passes = list(call.first), [], 0
    for i, window in enumerate(windows):
        dim = len(shape) - len(windows) + i
        axes = call.splits.get(f"s{i}")
        if axes is None:
            shape[dim] += window.before + window.after if window.before != window.after else 0
            continue
        size, mesh = call.sizes[f"s{i}"], [call.mesh[a] for a in axes]
        coords = [call.coords[a] for a in axes]
        halo = _halo(size, mesh, window)
        rest = math.prod(shape) // shape[dim]
        extents = _gathered_extents(halo, size, mesh, coords)
        for axis, extent in zip(reversed(axes), extents, strict=False):
            runs.append(Collective("all_gather", axis, rest * extent, forward=1))
            runs.append(Collective("reduce_scatter", axis, rest * extent, backward=1))
        passes += _PASSES if extents else 0
        low, high = halo.reads[_position(mesh, coords)]
        shape[dim] = high - low
    return Declared(tuple(runs), passes)


def _conv_windows(
    kernels: Sequence[int], stride: Extent, padding: Extent | str, dilation: Extent
) -> list[_Window]:
    strides, dilations = spread(stride, len(kernels)), spread(dilation, len(kernels))
    if isinstance(padding, str):  # "same" pads even windows by one more behind
        sums = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernels, strict=True)
        ]
        paddings = [(n // 2, n - n // 2) for n in sums]
    else:
        paddings = [(n, n) for n in spread(padding, len(kernels))]
    return [
        _Window(k, s, d, *border)
        for k, s, d, border in zip(kernels, strides, dilations, paddings, strict=True)
    ]


def _convolution(call: LocalCall) -> Declared:
    weight, arguments = call.operands[1], call.arguments
    assert weight is not None
    options = (arguments.get(k, v) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1)))
    return _declared(call, _conv_windows(weight[2:], *options))


@declares(_convolution)
def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Extent = 1,
    padding: Extent | str = 0,
    dilation: Extent = 1,
    groups: int = 1,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Convolution with space (s0, ...) or groups of channels (g) split."""
    rank = weight.ndim - 2
    run = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    local = round(groups * share_of(shard, ["g"]))
    strides, dilations = spread(stride, rank), spread(dilation, rank)
    if isinstance(padding, str) and not any(f"s{i}" in shard for i in range(rank)):
        return run(x, weight, bias, strides, padding, dilations, local)
    windows = _conv_windows(weight.shape[2:], strides, padding, dilations)
    x, remaining = _windowed(x, shard, windows, 0.0)
    return run(x, weight, bias, strides, remaining, dilations, local)


def _pool_windows(
    rank: int, kernel_size: Extent, stride: Extent, padding: Extent, dilation: Extent
) -> list[_Window]:
    kernels, paddings = spread(kernel_size, rank), spread(padding, rank)
    strides = spread(stride, rank) if stride != () and stride != [] else kernels
    dilations = spread(dilation, rank)
    return [_Window(*w) for w in zip(kernels, strides, dilations, paddings, paddings, strict=True)]


def _pool(rank: int) -> Declaration:
    def declaration(call: LocalCall) -> Declared:
        defaults: dict[str, Extent] = {"stride": (), "padding": 0, "dilation": 1}
        options = (call.arguments.get(k, v) for k, v in defaults.items())
        return _declared(call, _pool_windows(rank, call.arguments["kernel_size"], *options))

    return declaration


def _pooled(
    run: Callable[..., torch.Tensor],
    rank: int,
    fill: float,
    x: torch.Tensor,
    kernel_size: Extent,
    stride: Extent,
    padding: Extent,
    dilation: Extent,
    shard: Shard,
) -> torch.Tensor:
    """`run` (of x, kernel, stride, padding) with its windows fetched."""
    windows = _pool_windows(rank, kernel_size, stride, padding, dilation)
    x, remaining = _windowed(x, shard, windows, fill)
    return run(x, [w.kernel for w in windows], [w.stride for w in windows], remaining)


def _max_pool(rank: int) -> Callable[..., torch.Tensor]:
    """Max pooling of [..., s0, ...] with space split."""
    run = F.max_pool1d if rank == 1 else F.max_pool2d

    @declares(_pool(rank))
    def lowering(
        x: torch.Tensor,
        kernel_size: Extent,
        stride: Extent = (),
        padding: Extent = 0,
        dilation: Extent = 1,
        ceil_mode: bool = False,
        *,
        shard: Shard,
    ) -> torch.Tensor:
        dilated = partial(run, dilation=dilation)
        return _pooled(
            dilated, rank, float("-inf"), x, kernel_size, stride, padding, dilation, shard
        )

    lowering.__name__ = f"max_pool{rank}d"
    return lowering


def _avg_pool(rank: int) -> Callable[..., torch.Tensor]:
    """Average pooling of [..., s0, ...] with space split; padding counts as zeros."""

    @declares(_pool(rank))
    def lowering(
        x: torch.Tensor,
        kernel_size: Extent,
        stride: Extent = (),
        padding: Extent = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        shard: Shard,
    ) -> torch.Tensor:
        divided = partial(F.avg_pool2d, divisor_override=divisor_override)
        run = F.avg_pool1d if rank == 1 else divided
        return _pooled(run, rank, 0.0, x, kernel_size, stride, padding, 1, shard)

    lowering.__name__ = f"avg_pool{rank}d"
    return lowering


max_pool1d, max_pool2d = _max_pool(1), _max_pool(2)
avg_pool1d, avg_pool2d = _avg_pool(1), _avg_pool(2)


def as_strided(
    x: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """A strided reading with one dim split (d0, or d1, ...): steps over that dim are shorter."""
    ((name, (_, length, size_of_dim, _)),) = shard.items()
    dim = int(name[1:])
    period = stride[dim] * size_of_dim
    steps = [s // size_of_dim * length if s >= period else s for s in stride]
    steps[dim] = stride[dim]
    extents = [length if d == dim else n for d, n in enumerate(size)]
    return torch.as_strided(x, extents, steps)
