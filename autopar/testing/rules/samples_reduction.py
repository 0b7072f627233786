"""Calls of reductions, scans, sorts and normalizations."""

from __future__ import annotations

from typing import Any

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import (
    at_times,
    calls,
    dim,
    dims,
    distinct,
    flag,
    integers,
    normal,
    one_of,
    with_two,
)  # fmt: skip


def _dims_or_all(*every: Any) -> Any:
    """Dims, or one of the ways to name all of them."""
    return lambda draw, shape: draw.choice(every) if draw.chance(10) else draw.dims(len(shape))


def _with_ties(draw: Draw, shape: list[int]) -> torch.Tensor:
    """At times with ties, which share the gradient."""
    if draw.chance(70):
        return draw.permutation(shape)
    ties = draw.integers(shape, -2, 3)
    return ties.to(draw.choice([torch.float64, torch.float64, torch.int64]))


def _at_times_zero(draw: Draw, shape: list[int]) -> torch.Tensor:
    """At times zeros, where a norm has no slope."""
    return draw.normal(*shape) * draw.choice([1, 1, 1, 0])


def _seldom_or_often(draw: Draw, shape: list[int]) -> torch.Tensor:
    return draw.booleans(shape, draw.choice([0.05, 0.5, 0.95]))


_SINGLE = one_of(None, None, None, None, None, torch.float32)

calls("sum.dim_IntList mean.dim", (1, 4), normal, _dims_or_all(None, []), flag, dtype=_SINGLE)
calls("amax.default amin.default", (1, 4), _with_ties, _dims_or_all([]), flag)
calls("sum.default mean.default prod.default", (0, 4), normal)
calls("max.default min.default", (0, 4), _with_ties)
calls("median.default", (0, 4), distinct)
calls(
    "var.correction std.correction var_mean.correction",
    with_two(1, 3), normal, _dims_or_all([]), correction=one_of(None, 0), keepdim=flag,
)  # fmt: skip
calls("var.dim std.dim", with_two(1, 3), normal, dims, flag, flag)
calls("max.dim min.dim median.dim", (1, 4), distinct, dim, flag)
calls(
    "argmax.default argmin.default sort.default argsort.default",
    (1, 4), distinct, at_times(80, dim, flag),
)  # fmt: skip
calls("any.default all.default", (0, 3), _seldom_or_often)
calls("any.dim all.dim", (1, 3), Draw.booleans, dim, flag)
calls("any.dims all.dims", (1, 3), Draw.booleans, dims, flag)
calls("logsumexp.default", (1, 4), normal, dims, flag)
calls("prod.dim_int", (1, 4), normal, dim, flag)
calls(
    "linalg_vector_norm.default",
    (1, 4), _at_times_zero, one_of(2, 2.0, 1, 3.0), _dims_or_all(None), flag,
)  # fmt: skip
calls(
    "linalg_norm.default",
    (1, 4), normal, None, lambda draw, shape: [draw.dim(len(shape))], flag,
)  # fmt: skip
calls("norm.ScalarOpt_dim", (1, 4), normal, one_of(2, 1), dims, flag)
calls("norm.Scalar", (0, 3), normal, 2)
calls("softmax.int log_softmax.int", (0, 4), normal, dim, dtype=_SINGLE)
calls("cumsum.default cumprod.default logcumsumexp.default", (1, 4), normal, dim)
calls("cummax.default cummin.default", (1, 4), distinct, dim)
calls("sort.stable argsort.stable", (1, 4), integers(0, 5), stable=True, dim=dim)


@sampler("aten.topk.default")
def _topk(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = -1 if draw.chance(40) else draw.dim(len(shape))
    k = draw.integer(1, shape[dim])
    rest = () if dim == -1 and draw.chance() else (dim, draw.chance())
    return (draw.permutation(shape), k, *rest), {}


@sampler("aten.glu.default")
def _glu(draw: Draw) -> Arguments:
    shape, dim = draw.along(1, 4)
    shape[dim] *= 2
    return (draw.normal(*shape), dim), {}


@sampler("aten.diff.default")
def _diff(draw: Draw) -> Arguments:
    shape = [n + 1 for n in draw.shape(1, 3)]
    dim = draw.dim(len(shape))
    args = (draw.normal(*shape), 1, dim)
    if draw.chance(20):
        shape[dim] = 1
        return args, {"prepend": draw.normal(*shape)}
    return args, {}


# -- normalizations -----------------------------------------------------------------------------


def _maybe(draw: Draw, tensor: torch.Tensor) -> torch.Tensor | None:
    return tensor if draw.chance(70) else None


@sampler("aten.layer_norm.default", "aten.native_layer_norm.default")
def _layer_norm(draw: Draw) -> Arguments:
    shape = draw.shape(0, 2) + [n + 1 for n in draw.shape(1, 2)]
    count = 1 if draw.chance(60) else draw.integer(1, min(2, len(shape)))
    h = shape[-count:]
    weight, bias = _maybe(draw, draw.normal(*h)), _maybe(draw, draw.normal(*h))
    return (draw.normal(*shape), h, weight, bias, 1e-5), {}


@sampler("aten.rms_norm.default")
def _rms_norm(draw: Draw) -> Arguments:
    (x, h, weight, _, _), _ = _layer_norm(draw)
    return (x, h, weight, *draw.choice([(), (1e-6,)])), {}


@sampler("aten.group_norm.default")
def _group_norm(draw: Draw) -> Arguments:
    groups = draw.choice([1, 2, 4, 3])
    channels = groups * draw.integer(1, 3)
    x = draw.normal(draw.size(), channels, *(n + 1 for n in draw.shape(0, 2)))
    if x.ndim == 2 and channels == groups:
        x = x.unsqueeze(-1).repeat(1, 1, 2) * draw.normal(*x.shape, 2)
    weight, bias = _maybe(draw, draw.normal(channels)), _maybe(draw, draw.normal(channels))
    return (x, groups, weight, bias, 1e-5), {}


_RUNNING = ("running_mean", "running_var")


def _batch(draw: Draw) -> tuple[torch.Tensor, list[torch.Tensor]]:
    channels = draw.size()
    x = draw.normal(draw.size() + 1, channels, *draw.shape(0, 2))
    return x, [draw.uniform([channels]) for _ in range(4)]


@sampler("aten._native_batch_norm_legit_functional.default", fixed=_RUNNING)
def _batch_norm_functional(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    affine = (weight, bias) if draw.chance(80) else (None, None)
    return (x, *affine, mean, var, draw.chance(60), 0.1, 1e-5), {}


@sampler("aten._native_batch_norm_legit.no_stats")
def _batch_norm_no_stats(draw: Draw) -> Arguments:
    x, (weight, bias, _, _) = _batch(draw)
    return (x, _maybe(draw, weight), _maybe(draw, bias), True, 0.0, 1e-5), {}


@sampler("aten.batch_norm.default", fixed=_RUNNING)
def _batch_norm(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    if draw.chance(20):
        return (x, weight, bias, None, None, True, 0.1, 1e-5, False), {}
    return (x, weight, bias, mean, var, False, 0.1, 1e-5, False), {}


@sampler("aten._native_batch_norm_legit_no_training.default", fixed=_RUNNING)
def _batch_norm_no_training(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    return (x, weight, bias, mean, var, 0.1, 1e-5), {}


@sampler("aten.instance_norm.default")
def _instance_norm(draw: Draw) -> Arguments:
    channels = draw.size()
    x = draw.normal(draw.size(), channels, draw.size() + 1)
    weight, bias = draw.normal(channels), draw.normal(channels)
    return (x, weight, bias, None, None, True, 0.1, 1e-5, False), {}


@sampler("aten._weight_norm.default")
def _weight_norm(draw: Draw) -> Arguments:
    shape = draw.shape(2, 3)
    dim = draw.integer(0, len(shape) - 1)
    g = [n if d == dim else 1 for d, n in enumerate(shape)]
    return (draw.normal(*shape), draw.uniform(g), dim), {}
