"""Sliding windows over split space: each rank fetches the rows its windows reach into (the halo).

A rank that makes the results [first, first + count) reads the inputs from first * stride - padding
on. What lies on other ranks comes by an all-gather of the shards' edges; where a shard is narrower
than what its neighbours need of it, whole shards are gathered instead. Every rank can compute every
rank's needs, so all take the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F

from autopar.comm import steps
from autopar.comm.groups import find_group
from autopar.ir.spec import local_range
from autopar.sharding.lowerings.shard import Shard, share_of


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


def _fetch(
    x: torch.Tensor, dim: int, size: int, groups: Sequence[str], window: _Window, fill: float
) -> torch.Tensor:
    """The inputs of this rank's results along a split dim of extent `size`, borders filled."""
    members = [find_group(g) for g in groups]
    mesh = [g.size for g in members]
    axes = range(len(mesh))
    ranks = list(product(*(range(n) for n in mesh)))
    me = ranks.index(tuple(g.index for g in members))
    held = [local_range(size, axes, mesh, r) for r in ranks]
    made = [local_range(window.results(size), axes, mesh, r) for r in ranks]
    wanted = [window.reads(*m) for m in made]
    before = max(0, *(s - max(low, 0) for (s, _), (low, _) in zip(held, wanted, strict=True)))
    after = max(
        0, *(min(high, size) - s - n for (s, n), (_, high) in zip(held, wanted, strict=True))
    )
    start = held[me][0]
    if min(n for _, n in held) >= max(before, after):
        x, start = _with_edges(x, dim, groups, me, len(ranks), before, after, start)
    else:
        for depth in reversed(axes):
            outer = local_range(size, axes[:depth], mesh, ranks[me])[1]
            x = steps.all_gather_vary(x, dim, outer, groups[depth])
        start = 0
    low, high = wanted[me]
    length = min(high, size) - max(low, 0)
    # a window may lie in the border altogether
    x = x.narrow(dim, max(low, 0) - start, length) if length > 0 else x.narrow(dim, 0, 0)
    return _border(x, dim, max(0, min(0, high) - low), max(0, high - max(size, low)), fill)


def _with_edges(
    x: torch.Tensor,
    dim: int,
    groups: Sequence[str],
    me: int,
    count: int,
    before: int,
    after: int,
    start: int,
) -> tuple[torch.Tensor, int]:
    """This shard with the last `before` rows of the one before it and the first `after` rows of
    the one after it, and where that starts."""
    width = before + after
    if not width:
        return x, start
    length = x.shape[dim]
    edges = torch.cat([x.narrow(dim, 0, after), x.narrow(dim, length - before, before)], dim)
    extent = width
    for group in reversed(groups):
        extent *= find_group(group).size
        edges = steps.all_gather_vary(edges, dim, extent, group)
    parts = [x]
    if me > 0:
        parts.insert(0, edges.narrow(dim, (me - 1) * width + after, before))
        start -= before
    if me < count - 1:
        parts.append(edges.narrow(dim, (me + 1) * width, after))
    return torch.cat(parts, dim), start


def _border(x: torch.Tensor, dim: int, low: int, high: int, fill: float) -> torch.Tensor:
    if not low and not high:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [low, high], value=fill)


def spread(value: int | Sequence[int], count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _windowed(
    x: torch.Tensor,
    shard: Shard,
    windows: Sequence[_Window],
    fill: float,
) -> tuple[torch.Tensor, list[int]]:
    """Fetch along every split spatial dim (s0, s1, ...); returns the padding that is left to do."""
    left = [w.before for w in windows]
    for i, window in enumerate(windows):
        dim = x.ndim - len(windows) + i
        if f"s{i}" in shard:
            _, _, size, groups = shard[f"s{i}"]
            x = _fetch(x, dim, size, groups, window, fill)
            left[i] = 0
        elif window.before != window.after:
            x = _border(x, dim, window.before, window.after, fill)
            left[i] = 0
    return x, left


def convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Convolution with space (s0, ...) or whole groups of channels (g) split."""
    rank = weight.ndim - 2
    run = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    local = round(groups * share_of(shard, ["g"]))
    strides, dilations = spread(stride, rank), spread(dilation, rank)
    if isinstance(padding, str) and not any(f"s{i}" in shard for i in range(rank)):
        return run(x, weight, bias, strides, padding, dilations, local)
    if isinstance(padding, str):  # "same" pads even windows by one more behind
        sums = [
            d * (k - 1) if padding == "same" else 0
            for d, k in zip(dilations, weight.shape[2:], strict=True)
        ]
        paddings = [(n // 2, n - n // 2) for n in sums]
    else:
        paddings = [(n, n) for n in spread(padding, rank)]
    windows = [
        _Window(k, s, d, *border)
        for k, s, d, border in zip(weight.shape[2:], strides, dilations, paddings, strict=True)
    ]
    x, left = _windowed(x, shard, windows, 0.0)
    return run(x, weight, bias, strides, left, dilations, local)


Extent = int | Sequence[int]


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
    kernels = spread(kernel_size, rank)
    strides = spread(stride, rank) if stride != () and stride != [] else kernels
    paddings = spread(padding, rank)
    dilations = spread(dilation, rank)
    windows = [
        _Window(*w) for w in zip(kernels, strides, dilations, paddings, paddings, strict=True)
    ]
    x, left = _windowed(x, shard, windows, fill)
    return run(x, kernels, strides, left)


def max_pool2d(
    x: torch.Tensor,
    kernel_size: Extent,
    stride: Extent = (),
    padding: Extent = 0,
    dilation: Extent = 1,
    ceil_mode: bool = False,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Max pooling of [n, c, s0, s1] with space split."""
    run = partial(F.max_pool2d, dilation=dilation)
    return _pooled(run, 2, float("-inf"), x, kernel_size, stride, padding, dilation, shard)


def max_pool1d(
    x: torch.Tensor,
    kernel_size: Extent,
    stride: Extent = (),
    padding: Extent = 0,
    dilation: Extent = 1,
    ceil_mode: bool = False,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Max pooling of [n, c, s0] with space split."""
    run = partial(F.max_pool1d, dilation=dilation)
    return _pooled(run, 1, float("-inf"), x, kernel_size, stride, padding, dilation, shard)


def avg_pool2d(
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
    """Average pooling of [n, c, s0, s1] with space split; padding counts as zeros."""
    run = partial(F.avg_pool2d, divisor_override=divisor_override)
    return _pooled(run, 2, 0.0, x, kernel_size, stride, padding, 1, shard)


def avg_pool1d(
    x: torch.Tensor,
    kernel_size: Extent,
    stride: Extent = (),
    padding: Extent = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *,
    shard: Shard,
) -> torch.Tensor:
    """Average pooling of [n, c, s0] with space split; padding counts as zeros."""
    return _pooled(F.avg_pool1d, 1, 0.0, x, kernel_size, stride, padding, 1, shard)


def as_strided(
    x: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    storage_offset: int | None = None,
    *,
    shard: Shard,
) -> torch.Tensor:
    """A strided reading with one dim split (d0, or d1, ...): steps over that dim are shorter."""
    ((name, (_, length, whole, _)),) = shard.items()
    dim = int(name[1:])
    turn = stride[dim] * whole
    steps = [s // whole * length if s >= turn else s for s in stride]
    steps[dim] = stride[dim]
    extents = [length if d == dim else n for d, n in enumerate(size)]
    return torch.as_strided(x, extents, steps)
