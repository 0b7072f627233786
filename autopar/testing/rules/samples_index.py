"""Calls of lookups, gathers and scatters."""

from __future__ import annotations

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import at_times, calls, integer, normal


@sampler("aten.embedding.default")
def _embedding(draw: Draw) -> Arguments:
    rows, width = draw.size(2), draw.size()
    indices = draw.integers(draw.shape(0, 3), 0, rows)
    padding = draw.integer(0, rows - 1) if draw.chance(30) else -1
    by_frequency = draw.chance(10)  # gradients scaled by it: the batch is not split
    return (draw.normal(rows, width), indices, padding, by_frequency), {}


@sampler("aten.one_hot.default")
def _one_hot(draw: Draw) -> Arguments:
    classes = draw.size()
    return (draw.integers(draw.shape(0, 3), 0, classes), classes), {}


@sampler("aten.index.Tensor")
def _index(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    chosen = {d % len(shape) for d in draw.dims(len(shape))}
    common = draw.shape(0, 2)
    indices = [
        draw.integers(draw.broadcast(common), -shape[d], shape[d]) if d in chosen else None
        for d in range(max(chosen) + 1)
    ]
    if draw.chance(10):
        mask = draw.booleans(shape[:1])
        mask[0] |= ~mask.any()
        indices = [mask]
    return (draw.normal(*shape), indices), {}


@sampler("aten.index_put.default")
def _index_put(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    dims = draw.integer(1, len(shape))
    count = draw.integer(1, 4)
    if draw.chance(25):
        return (draw.normal(*shape), [draw.booleans(shape)], draw.normal()), {}
    # distinct places: writing one twice leaves either value
    first = torch.randperm(shape[0], generator=draw.generator)[:count]
    indices = [first] + [draw.integers([len(first)], 0, shape[d]) for d in range(1, dims)]
    rest = [len(first), *shape[dims:]]
    values = draw.normal(*(draw.broadcast(rest) if draw.chance(30) else rest))
    return (draw.normal(*shape), indices, values, *([True] if draw.chance() else [])), {}


@sampler("aten.index_select.default")
def _index_select(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    return (draw.normal(*shape), dim, draw.integers([draw.size()], 0, shape[dim])), {}


def _smaller(draw: Draw, shape: list[int], dim: int) -> list[int]:
    """As large as `shape`, or at times smaller, and of any size along `dim`."""
    sizes = [draw.integer(1, n) if draw.chance(20) else n for n in shape]
    sizes[dim] = draw.integer(1, shape[dim])
    return sizes


@sampler("aten.gather.default")
def _gather(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    index = _smaller(draw, shape, dim)
    if draw.chance(40):
        index[dim] = draw.size()
    return (draw.normal(*shape), dim, draw.integers(index, 0, shape[dim])), {}


def _places(draw: Draw, shape: list[int], dim: int) -> torch.Tensor:
    """Indices along `dim`, none of them twice."""
    index = _smaller(draw, shape, dim)
    unit = draw.permutation(
        [shape[dim] if d == dim % len(shape) else n for d, n in enumerate(index)]
    )
    return unit.argsort(dim).narrow(dim, 0, index[dim]).contiguous()


@sampler("aten.scatter.src", "aten.scatter_add.default")
def _scatter(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    index = _places(draw, shape, dim)
    source = list(index.shape)
    if draw.chance(15):
        source = [n + draw.integer(0, 2) for n in source]
    return (draw.normal(*shape), dim, index, draw.normal(*source)), {}


@sampler("aten.scatter.value")
def _scatter_value(draw: Draw) -> Arguments:
    (x, dim, index, _), _ = _scatter(draw)
    return (x, dim, index, draw.choice([1, -0.5])), {}


@sampler("aten.scatter.reduce")
def _scatter_with(draw: Draw) -> Arguments:
    return _scatter(draw)[0], {"reduce": draw.choice(["add", "multiply"])}


@sampler("aten.scatter_reduce.two")
def _scatter_reduce(draw: Draw) -> Arguments:
    how = draw.choice(["sum", "mean", "amax", "amin", "prod"])
    return (*_scatter(draw)[0], how), {"include_self": draw.chance()}


@sampler("aten.slice_scatter.default")
def _slice_scatter(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    start = draw.integer(0, shape[dim] - 1)
    source = list(shape)
    source[dim] = draw.integer(1, shape[dim] - start)
    end = start + source[dim]
    return (draw.normal(*shape), draw.normal(*source), dim, start, end), {}


@sampler("aten.select_scatter.default")
def _select_scatter(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    source = [n for d, n in enumerate(shape) if d != dim % len(shape)]
    return (draw.normal(*shape), draw.normal(*source), dim, draw.dim(shape[dim])), {}


@sampler("aten.index_add.default")
def _index_add(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 3)
    index = draw.integers([draw.size()], 0, shape[dim])
    source = list(shape)
    source[dim] = len(index)
    return (draw.normal(*shape), dim, index, draw.normal(*source)), {}


@sampler("aten.index_copy.default")
def _index_copy(draw: Draw) -> Arguments:
    (x, dim, index, source), _ = _index_add(draw)
    index = index.unique()  # the last of equal ones would stay
    return (x, dim, index, source.narrow(dim, 0, len(index))), {}


@sampler("aten.masked_scatter.default")
def _masked_scatter(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    x = draw.normal(*shape)
    return (x, draw.booleans(shape), draw.normal(x.numel() + 1)), {}


@sampler("aten.searchsorted.Tensor")
def _searchsorted(draw: Draw) -> Arguments:
    n = draw.size()
    if draw.chance():
        return (draw.normal(n).sort().values, draw.normal(*draw.shape(1, 3))), {"right": True}
    lead = draw.shape(1, 2)
    return (draw.normal(*lead, n).sort().values, draw.normal(*lead, draw.size())), {}


calls("bucketize.Tensor", (0, 3), normal, lambda draw, _: draw.normal(draw.size()).sort().values)
calls("histc.default", (0, 3), Draw.uniform, integer(2, 5), at_times(70, 0, 1))
calls("nonzero_static.default", (1, 3), Draw.booleans, size=integer(1, 5))
