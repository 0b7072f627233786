"""Calls of views and of other pure data movement."""

from __future__ import annotations

import math

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import (
    Several,
    any_kind,
    at_times,
    calls,
    dim,
    dims,
    integer,
    new_dim,
    normal,
    one_of,
    with_ones,
)  # fmt: skip


def _two(draw: Draw, shape: list[int]) -> list[torch.Tensor]:
    """Of this shape, or broadcast to it."""
    same = draw.chance()
    return [draw.normal(*(shape if same else draw.broadcast(shape))) for _ in range(2)]


def _up_to_three(draw: Draw, shape: list[int]) -> list[torch.Tensor]:
    return [draw.normal(*shape) for _ in range(draw.integer(1, 3))]


def _one_per_dim(draw: Draw, shape: list[int]) -> list[torch.Tensor]:
    return [draw.normal(n) for n in shape]


def _first_and_last(draw: Draw, shape: list[int]) -> Several:
    """A range of dims."""
    start = draw.integer(0, len(shape) - 1)
    end = draw.integer(start, len(shape) - 1)
    return Several((start, end - len(shape) if draw.chance() else end))


calls("unsqueeze.default", (0, 4), any_kind, new_dim)
calls("squeeze.dim", with_ones(1, 4), any_kind, dim)
calls("squeeze.dims", with_ones(1, 4), any_kind, dims)
calls("squeeze.default", with_ones(0, 4), any_kind)
calls("transpose.int swapaxes.default movedim.int", (1, 4), any_kind, dim, dim)
calls("t.default", (0, 2), any_kind)
calls("contiguous.default alias.default detach.default", (0, 4), any_kind)
calls(
    "_to_copy.default", (0, 4), any_kind,
    dtype=one_of(torch.float64, torch.float32, torch.int64, torch.bool, torch.bfloat16),
)  # fmt: skip
calls("chunk.default", (1, 4), any_kind, integer(1, 4), dim)
calls("unbind.int", (1, 4), any_kind, dim)
calls("flip.default", (1, 4), any_kind, dims)
calls("tril.default triu.default", (2, 4), any_kind, integer(-2, 2))
calls("diag.default diagonal.default diag_embed.default", (2, 2), normal)
calls("fft_fftn.default", (1, 3), normal, None, at_times(70, dims))
calls("broadcast_tensors.default", (0, 4), _two)
calls("meshgrid.indexing", (1, 3), _one_per_dim, indexing=one_of("ij", "ij", "xy"))
calls("stack.default", (0, 3), _up_to_three, new_dim)
calls("flatten.using_ints", (1, 4), any_kind, _first_and_last)
calls("expand_as.default", (0, 4), lambda draw, shape: draw.normal(*draw.broadcast(shape)), normal)


def _padding(draw: Draw, shape: list[int]) -> list[int]:
    """Amounts per padded dim, from the last on."""
    amounts: list[int] = []
    for _ in range(draw.integer(1, len(shape))):
        amounts += [0, 0] if draw.chance(40) else [draw.integer(0, 3), draw.integer(0, 3)]
    return amounts


calls("constant_pad_nd.default", (1, 4), normal, _padding, at_times(66, one_of(0.0, -1.5)))


@sampler("aten.pad.default")
def _pad(draw: Draw) -> Arguments:
    if draw.chance(70):
        shape = draw.shape(1, 4)
        value = draw.choice([{}, {"value": 0.0}, {"value": -1.5}])
        return (draw.normal(*shape), _padding(draw, shape)), value
    shape = [draw.size(), draw.size(), draw.size(3)]
    mode = draw.choice(["reflect", "replicate", "circular"])
    return (draw.normal(*shape), [draw.integer(0, 2), draw.integer(0, 2)], mode), {}


def regrouped(draw: Draw, shape: list[int]) -> list[int]:
    """Another shape of as many elements: dims merged, split, and dims of size 1 put in."""
    sizes = list(shape)
    for _ in range(draw.integer(0, 3)):
        what = draw.integer(0, 2)
        if what == 0 and len(sizes) > 1:
            i = draw.integer(0, len(sizes) - 2)
            sizes[i : i + 2] = [sizes[i] * sizes[i + 1]]
        elif what == 1 and sizes:
            i = draw.integer(0, len(sizes) - 1)
            divisors = [d for d in range(1, sizes[i] + 1) if sizes[i] % d == 0]
            d = draw.choice(divisors)
            sizes[i : i + 1] = [d, sizes[i] // d]
        elif len(sizes) < 5:
            sizes.insert(draw.integer(0, len(sizes)), 1)
    return sizes


@sampler("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
def _reshape(draw: Draw) -> Arguments:
    shape = draw.shape(0, 4)
    target = regrouped(draw, shape)
    if target and draw.chance(30):
        target[draw.integer(0, len(target) - 1)] = -1
    return (draw.any_kind(shape), target), {}


@sampler("aten.unflatten.int")
def _unflatten(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 3)
    inner = [draw.size(), draw.size()]
    shape[dim] = math.prod(inner)
    if draw.chance(30):
        inner[draw.integer(0, 1)] = -1
    return (draw.any_kind(shape), dim, inner), {}


@sampler("aten.permute.default")
def _permute(draw: Draw) -> Arguments:
    shape = draw.shape(0, 4)
    order = list(range(len(shape)))
    draw.source.shuffle(order)
    return (draw.any_kind(shape), [d - len(shape) if draw.chance(30) else d for d in order]), {}


@sampler("aten.expand.default")
def _expand(draw: Draw) -> Arguments:
    shape = with_ones(0, 3)(draw)
    target = [draw.size() if n == 1 else n for n in shape]
    size = [-1 if s == n and draw.chance(30) else n for s, n in zip(shape, target, strict=True)]
    return (draw.any_kind(shape), [*draw.shape(0, 1), *size]), {}


@sampler("aten.slice.Tensor")
def _slice(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    size = shape[dim]
    start = draw.integer(0, size - 1)
    end = draw.choice([draw.integer(start + 1, size), 9223372036854775807])
    first = start - size if draw.chance(20) and start else start
    steps = (draw.integer(1, 3),) if draw.chance(30) else ()
    return (draw.any_kind(shape), dim, first, end, *steps), {}


@sampler("aten.narrow.default")
def _narrow(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    start = draw.integer(0, shape[dim] - 1)
    return (draw.any_kind(shape), dim, start, draw.integer(1, shape[dim] - start)), {}


@sampler("aten.select.int")
def _select(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    return (draw.any_kind(shape), dim, draw.dim(shape[dim])), {}


@sampler("aten.roll.default")
def _roll(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dims = () if draw.chance(20) else (draw.dims(len(shape)),)
    return (
        draw.any_kind(shape),
        [draw.integer(-2, 3) for _ in (dims[0] if dims else [0])],
        *dims,
    ), {}


@sampler("aten.split.Tensor", "aten.unsafe_split.Tensor")
def _split(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    rest = () if dim == 0 and draw.chance() else (dim,)
    return (draw.any_kind(shape), draw.integer(1, shape[dim]), *rest), {}


@sampler("aten.split_with_sizes.default")
def _split_with_sizes(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    sizes = [draw.integer(1, 4) for _ in range(draw.integer(1, 3))]
    shape[dim] = sum(sizes)
    return (draw.any_kind(shape), sizes, dim), {}


@sampler("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def _cat(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    sizes = [draw.size() for _ in range(draw.integer(1, 3))]
    shapes = [[n if d != dim % len(shape) else s for d, n in enumerate(shape)] for s in sizes]
    return ([draw.normal(*s) for s in shapes], dim), {}


@sampler("aten.repeat_interleave.self_int")
def _repeat_interleave(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    if draw.chance(15):
        return (draw.any_kind(shape), draw.integer(1, 3)), {}
    repeats, dim = draw.integer(1, 3), draw.dim(len(shape))
    size = {"output_size": shape[dim] * repeats} if draw.chance(40) else {}
    return (draw.any_kind(shape), repeats, dim), size


@sampler("aten.repeat.default", "aten.tile.default")
def _repeat(draw: Draw) -> Arguments:
    shape = with_ones(0, 3)(draw)
    times = [draw.choice([1, 1, 2, 3]) for _ in range(len(shape) + draw.integer(0, 1))]
    return (draw.any_kind(shape), times), {}


@sampler("aten.unfold.default")
def _unfold(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 3)
    if draw.chance(30):  # windows side by side
        size = draw.integer(1, 3)
        shape[dim] *= size
        return (draw.any_kind(shape), dim, size, size), {}
    return (draw.any_kind(shape), dim, draw.integer(1, shape[dim]), draw.integer(1, 2)), {}


@sampler("aten.as_strided.default")
def _as_strided(draw: Draw) -> Arguments:
    """Overlapping windows within each row, or the transpose."""
    rows, columns = draw.size(), draw.size()
    if draw.choice([True, False]):
        return (draw.normal(rows, columns), [columns, rows], [1, columns]), {}
    width = draw.integer(1, columns)
    return (draw.normal(rows, columns), [rows, columns - width + 1, width], [columns, 1, 1]), {}
