"""Calls of reductions, scans, sorts and normalizations."""

from __future__ import annotations

from typing import Any

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler


def _named(*names: str) -> list[str]:
    return [f"aten.{name}" for name in names]


def _several(draw: Draw, shape: list[int]) -> tuple[list[Any], dict[str, Any]]:
    """dim (a list, or none of them) and keepdim."""
    dims: Any = draw.dims(len(shape)) if shape else []
    if draw.chance(10):
        dims = draw.choice([None, []])
    return [dims], {"keepdim": True} if draw.chance(40) else {}


@sampler(*_named("sum.dim_IntList", "mean.dim"))
def _sum(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    args, kwargs = _several(draw, shape)
    if draw.chance(15):
        kwargs["dtype"] = torch.float32
    return (draw.normal(*shape), *args), kwargs


def _extreme(draw: Draw, shape: list[int]) -> torch.Tensor:
    """At times with ties, which share the gradient."""
    if draw.chance(70):
        return draw.permutation(shape)
    ties = draw.integers(shape, -2, 3)
    return ties.to(draw.choice([torch.float64, torch.float64, torch.int64]))


@sampler(*_named("amax.default", "amin.default"))
def _amax(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    args, kwargs = _several(draw, shape)
    args = [[] if args[0] is None else args[0]]
    return (_extreme(draw, shape), *args), kwargs


@sampler(*_named("sum.default", "mean.default", "prod.default"))
def _sum_of_all(draw: Draw) -> Arguments:
    return (draw.normal(*draw.shape(0, 4)),), {}


@sampler(*_named("max.default", "min.default"))
def _max_of_all(draw: Draw) -> Arguments:
    return (_extreme(draw, draw.shape(0, 4)),), {}


@sampler(*_named("median.default"))
def _median_of_all(draw: Draw) -> Arguments:
    return (draw.permutation(draw.shape(0, 4)),), {}


@sampler(*_named("var.correction", "std.correction", "var_mean.correction"))
def _var(draw: Draw) -> Arguments:
    shape = [n + 1 for n in draw.shape(1, 3)]
    args, kwargs = _several(draw, shape)
    if args[0] is None:
        args = [draw.dims(len(shape))]
    return (draw.normal(*shape), *args), kwargs | draw.choice([{}, {"correction": 0}])


@sampler(*_named("var.dim", "std.dim"))
def _var_dim(draw: Draw) -> Arguments:
    shape = [n + 1 for n in draw.shape(1, 3)]
    return (draw.normal(*shape), draw.dims(len(shape)), draw.chance(), draw.chance()), {}


@sampler(*_named("max.dim", "min.dim", "median.dim"))
def _max_dim(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.permutation(shape), draw.dim(len(shape)), draw.chance()), {}


@sampler(*_named("argmax.default", "argmin.default", "sort.default", "argsort.default"))
def _along_a_dim(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    if draw.chance(20):
        return (draw.permutation(shape),), {}
    return (draw.permutation(shape), draw.dim(len(shape)), draw.chance()), {}


@sampler(*_named("any.default", "all.default"))
def _any(draw: Draw) -> Arguments:
    return (draw.booleans(draw.shape(0, 3), draw.choice([0.05, 0.5, 0.95])),), {}


@sampler(*_named("any.dim", "all.dim"))
def _any_dim(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    return (draw.booleans(shape), draw.dim(len(shape)), draw.chance()), {}


@sampler(*_named("any.dims", "all.dims"))
def _any_dims(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    return (draw.booleans(shape), draw.dims(len(shape)), draw.chance()), {}


@sampler(*_named("logsumexp.default"))
def _logsumexp(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.normal(*shape), draw.dims(len(shape)), draw.chance()), {}


@sampler(*_named("prod.dim_int"))
def _prod(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.normal(*shape), draw.dim(len(shape)), draw.chance()), {}


@sampler(*_named("linalg_vector_norm.default"))
def _vector_norm(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    args, kwargs = _several(draw, shape)
    args = [None if args[0] == [] else args[0]]
    x = draw.normal(*shape) * draw.choice([1, 1, 1, 0])  # without a slope at 0
    return (x, draw.choice([2, 2.0, 1, 3.0]), *args), kwargs


@sampler(*_named("linalg_norm.default"))
def _linalg_norm(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.normal(*shape), None, [draw.dim(len(shape))], draw.chance()), {}


@sampler(*_named("norm.ScalarOpt_dim"))
def _norm(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.normal(*shape), draw.choice([2, 1]), draw.dims(len(shape)), draw.chance()), {}


@sampler(*_named("norm.Scalar"))
def _norm_of_all(draw: Draw) -> Arguments:
    return (draw.normal(*draw.shape(0, 3)), 2), {}


# -- along one dim ------------------------------------------------------------------------------


@sampler(*_named("softmax.int", "log_softmax.int"))
def _softmax(draw: Draw) -> Arguments:
    shape = draw.shape(0, 4)
    kwargs = {"dtype": torch.float32} if draw.chance(15) else {}
    return (draw.normal(*shape), draw.dim(max(len(shape), 1))), kwargs


@sampler(*_named("cumsum.default", "cumprod.default", "logcumsumexp.default"))
def _cumsum(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.normal(*shape), draw.dim(len(shape))), {}


@sampler(*_named("cummax.default", "cummin.default"))
def _cummax(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    return (draw.permutation(shape), draw.dim(len(shape))), {}


@sampler(*_named("topk.default"))
def _topk(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = -1 if draw.chance(40) else draw.dim(len(shape))
    k = draw.integer(1, shape[dim])
    rest = () if dim == -1 and draw.chance() else (dim, draw.chance())
    return (draw.permutation(shape), k, *rest), {}


@sampler(*_named("kthvalue.default"))
def _kthvalue(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    dim = draw.dim(len(shape))
    return (draw.permutation(shape), draw.integer(1, shape[dim]), dim), {}


@sampler(*_named("sort.stable", "argsort.stable"))
def _sort_stable(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    kwargs: dict[str, Any] = {"stable": True, "dim": draw.dim(len(shape))}
    return (draw.integers(shape, 0, 5).double(),), kwargs


@sampler(*_named("glu.default"))
def _glu(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    shape[dim] *= 2
    return (draw.normal(*shape), dim), {}


@sampler(*_named("diff.default"))
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


@sampler(*_named("layer_norm.default", "native_layer_norm.default"))
def _layer_norm(draw: Draw) -> Arguments:
    shape = draw.shape(0, 2) + [n + 1 for n in draw.shape(1, 2)]
    count = 1 if draw.chance(60) else draw.integer(1, min(2, len(shape)))
    h = shape[-count:]
    weight, bias = _maybe(draw, draw.normal(*h)), _maybe(draw, draw.normal(*h))
    return (draw.normal(*shape), h, weight, bias, 1e-5), {}


@sampler(*_named("rms_norm.default"))
def _rms_norm(draw: Draw) -> Arguments:
    (x, h, weight, _, _), _ = _layer_norm(draw)
    return (x, h, weight, *draw.choice([(), (1e-6,)])), {}


@sampler(*_named("group_norm.default"))
def _group_norm(draw: Draw) -> Arguments:
    groups = draw.choice([1, 2, 4, 3])
    channels = groups * draw.integer(1, 3)
    x = draw.normal(draw.size(), channels, *(n + 1 for n in draw.shape(0, 2)))
    if x.ndim == 2 and channels == groups:
        x = x.unsqueeze(-1).repeat(1, 1, 2) * draw.normal(*x.shape, 2)
    weight, bias = _maybe(draw, draw.normal(channels)), _maybe(draw, draw.normal(channels))
    return (x, groups, weight, bias, 1e-5), {}


def _batch(draw: Draw) -> tuple[torch.Tensor, list[torch.Tensor]]:
    channels = draw.size()
    x = draw.normal(draw.size() + 1, channels, *draw.shape(0, 2))
    return x, [draw.uniform([channels]) for _ in range(4)]


@sampler(
    *_named("_native_batch_norm_legit_functional.default"), fixed=("running_mean", "running_var")
)
def _batch_norm_functional(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    affine = draw.chance(80)
    pair = (weight, bias) if affine else (None, None)
    return (x, *pair, mean, var, draw.chance(60), 0.1, 1e-5), {}


@sampler(*_named("_native_batch_norm_legit.no_stats"))
def _batch_norm_no_stats(draw: Draw) -> Arguments:
    x, (weight, bias, _, _) = _batch(draw)
    return (x, _maybe(draw, weight), _maybe(draw, bias), True, 0.0, 1e-5), {}


@sampler(*_named("batch_norm.default"), fixed=("running_mean", "running_var"))
def _batch_norm(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    if draw.chance(20):
        return (x, weight, bias, None, None, True, 0.1, 1e-5, False), {}
    return (x, weight, bias, mean, var, False, 0.1, 1e-5, False), {}


@sampler(
    *_named("_native_batch_norm_legit_no_training.default"), fixed=("running_mean", "running_var")
)
def _batch_norm_no_training(draw: Draw) -> Arguments:
    x, (weight, bias, mean, var) = _batch(draw)
    return (x, weight, bias, mean, var, 0.1, 1e-5), {}


@sampler(*_named("instance_norm.default"))
def _instance_norm(draw: Draw) -> Arguments:
    channels = draw.size()
    x = draw.normal(draw.size(), channels, draw.size() + 1)
    weight, bias = draw.normal(channels), draw.normal(channels)
    return (x, weight, bias, None, None, True, 0.1, 1e-5, False), {}


@sampler(*_named("_weight_norm.default"))
def _weight_norm(draw: Draw) -> Arguments:
    shape = draw.shape(2, 3)
    dim = draw.integer(0, len(shape) - 1)
    g = [n if d == dim else 1 for d, n in enumerate(shape)]
    return (draw.normal(*shape), draw.uniform(g), dim), {}
