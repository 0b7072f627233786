"""Calls of lookups, gathers, scatters, losses and creations."""

from __future__ import annotations

from typing import Any

import torch

from autopar.sharding.proof.draw import Arguments, Draw, sampler


@sampler("aten.embedding.default")
def _embedding(draw: Draw) -> Arguments:
    rows, width = draw.size(), draw.size()
    args: list[Any] = [draw.normal(rows, width), draw.integers(draw.shape(0, 3), 0, rows)]
    if draw.chance(30):
        args.append(draw.integer(0, rows - 1))
        if draw.chance(30):
            args += [True]  # gradients scaled by frequency: the index is whole in the batch
    return tuple(args), {}


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
        indices = [draw.booleans(shape[:1])]
        if not indices[0].any():  # type: ignore[union-attr]
            indices[0][0] = True  # type: ignore[index]
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
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    return (draw.normal(*shape), dim, draw.integers([draw.size()], 0, shape[dim])), {}


def _smaller(draw: Draw, shape: list[int], dim: int) -> list[int]:
    """As large as `shape`, or at times smaller, and of any size along `dim`."""
    found = [draw.integer(1, n) if draw.chance(20) else n for n in shape]
    found[dim] = draw.integer(1, shape[dim])
    return found


@sampler("aten.gather.default")
def _gather(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
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


@sampler("aten.scatter.value")
def _scatter_value(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    return (draw.normal(*shape), dim, _places(draw, shape, dim), draw.choice([1, -0.5])), {}


@sampler("aten.scatter.src", "aten.scatter_add.default")
def _scatter(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    index = _places(draw, shape, dim)
    source = list(index.shape)
    if draw.chance(15):
        source = [n + draw.integer(0, 2) for n in source]
    return (draw.normal(*shape), dim, index, draw.normal(*source)), {}


@sampler("aten.scatter.reduce")
def _scatter_with(draw: Draw) -> Arguments:
    args, _ = _scatter(draw)
    return args, {"reduce": draw.choice(["add", "multiply"])}


@sampler("aten.scatter_reduce.two")
def _scatter_reduce(draw: Draw) -> Arguments:
    args, _ = _scatter(draw)
    how = draw.choice(["sum", "mean", "amax", "amin", "prod"])
    return (*args, how), {"include_self": draw.chance()}


@sampler("aten.slice_scatter.default")
def _slice_scatter(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    start = draw.integer(0, shape[dim] - 1)
    source = list(shape)
    source[dim] = draw.integer(1, shape[dim] - start)
    end = start + source[dim]
    return (draw.normal(*shape), draw.normal(*source), dim, start, end), {}


@sampler("aten.select_scatter.default")
def _select_scatter(draw: Draw) -> Arguments:
    shape = draw.shape(1, 4)
    dim = draw.dim(len(shape))
    source = [n for d, n in enumerate(shape) if d != dim % len(shape)]
    return (draw.normal(*shape), draw.normal(*source), dim, draw.dim(shape[dim])), {}


@sampler("aten.index_add.default")
def _index_add(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    dim = draw.dim(len(shape))
    index = draw.integers([draw.size()], 0, shape[dim])
    source = list(shape)
    source[dim] = len(index)
    return (draw.normal(*shape), dim, index, draw.normal(*source)), {}


@sampler("aten.masked_scatter.default")
def _masked_scatter(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    x = draw.normal(*shape)
    return (x, draw.booleans(shape), draw.normal(x.numel() + 1)), {}


@sampler("aten.bucketize.Tensor")
def _bucketize(draw: Draw) -> Arguments:
    return (draw.normal(*draw.shape(0, 3)), draw.normal(draw.size()).sort().values), {}


@sampler("aten.searchsorted.Tensor")
def _searchsorted(draw: Draw) -> Arguments:
    n = draw.size()
    if draw.chance():
        return (draw.normal(n).sort().values, draw.normal(*draw.shape(1, 3))), {"right": True}
    lead = draw.shape(1, 2)
    return (draw.normal(*lead, n).sort().values, draw.normal(*lead, draw.size())), {}


@sampler("aten.histc.default")
def _histc(draw: Draw) -> Arguments:
    return (draw.uniform(draw.shape(0, 3)), draw.integer(1, 5), 0, 1), {}


@sampler("aten.nonzero_static.default")
def _nonzero(draw: Draw) -> Arguments:
    return (draw.booleans(draw.shape(1, 3)),), {"size": draw.integer(1, 5)}


# -- losses -------------------------------------------------------------------------------------


def _classes(draw: Draw, ignored: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [b, v, space] and classes [b, space], some of them ignored but not all."""
    batch, classes, space = draw.size(), draw.size(2), draw.shape(0, 2)
    if draw.chance(50):
        space = []
    target = draw.integers([batch, *space], 0, classes)
    target = target.masked_fill(draw.booleans(target.shape, 0.2), ignored)
    target.view(-1)[0] = 0
    return draw.normal(batch, classes, *space), target


def _class_arguments(draw: Draw) -> tuple[list[Any], dict[str, Any]]:
    reduction = draw.integer(0, 2)
    ignored = draw.choice([-100, -100, 1])
    logits, target = _classes(draw, ignored)
    weight = draw.uniform([logits.shape[1]]) if draw.chance(30) else None
    if reduction == 1 and ignored == -100 and weight is None and draw.chance():
        return [logits, target], {}
    return [logits, target, weight, reduction, ignored], {}


@sampler("aten.cross_entropy_loss.default", fixed=("weight",))
def _cross_entropy(draw: Draw) -> Arguments:
    args, kwargs = _class_arguments(draw)
    if draw.chance(10):  # probabilities for targets
        return (args[0], draw.normal(*args[0].shape).softmax(1)), {}
    if len(args) > 2 and draw.chance(30):
        kwargs["label_smoothing"] = 0.1
    return tuple(args), kwargs


@sampler("aten.nll_loss_nd.default", fixed=("weight",))
def _nll(draw: Draw) -> Arguments:
    args, kwargs = _class_arguments(draw)
    return (args[0].log_softmax(1), *args[1:]), kwargs


@sampler("aten.nll_loss.default", fixed=("weight",))
def _nll_rows(draw: Draw) -> Arguments:
    classes = draw.size(2)
    target = draw.integers([draw.size()], 0, classes)
    return (draw.normal(len(target), classes), target, None, draw.integer(0, 2)), {}


@sampler("aten.nll_loss2d.default", fixed=("weight",))
def _nll_images(draw: Draw) -> Arguments:
    classes, target = draw.size(2), draw.integers(draw.shape(3, 3), 0, 3)
    classes = max(classes, 3)
    shape = [target.shape[0], classes, *target.shape[1:]]
    return (draw.normal(*shape), target, None, draw.integer(0, 2)), {}


def _pair(draw: Draw) -> list[Any]:
    shape = draw.shape(0, 4)
    rest: list[Any] = [] if draw.chance() else [draw.integer(0, 2)]
    return [draw.normal(*shape), draw.normal(*shape), *rest]


@sampler("aten.mse_loss.default", "aten.l1_loss.default")
def _elementwise_loss(draw: Draw) -> Arguments:
    return tuple(_pair(draw)), {}


@sampler("aten.smooth_l1_loss.default", "aten.huber_loss.default")
def _smooth_loss(draw: Draw) -> Arguments:
    args = _pair(draw)
    return tuple(args), {}


@sampler("aten.kl_div.default")
def _kl_div(draw: Draw) -> Arguments:
    shape = draw.shape(1, 3)
    a, b = draw.normal(*shape).log_softmax(-1), draw.normal(*shape).softmax(-1)
    if draw.chance():
        return (a, b.log(), draw.integer(0, 2)), {"log_target": True}
    return (a, b, draw.integer(0, 2)), {}


@sampler("aten.binary_cross_entropy.default", fixed=("target", "weight"))
def _bce(draw: Draw) -> Arguments:
    shape = draw.shape(0, 3)
    weight = draw.uniform(shape) if draw.chance(30) else None
    return (draw.uniform(shape), draw.uniform(shape), weight, draw.integer(0, 2)), {}


@sampler("aten.binary_cross_entropy_with_logits.default", fixed=("target", "weight", "pos_weight"))
def _bce_logits(draw: Draw) -> Arguments:
    shape = draw.shape(0, 3)
    weight = draw.uniform(draw.broadcast(shape)) if draw.chance(30) else None
    pos = draw.uniform(shape[-1:]) if draw.chance(30) and shape else None
    return (draw.normal(*shape), draw.uniform(shape), weight, pos, draw.integer(0, 2)), {}


@sampler("aten.ctc_loss.Tensor")
def _ctc(draw: Draw) -> Arguments:
    batch, classes = draw.size(), draw.size(3)
    probabilities = draw.normal(8, batch, classes).log_softmax(-1)
    targets = draw.integers([batch, 3], 1, classes)
    lengths = torch.full([batch], 8), torch.full([batch], 3)
    return (probabilities, targets, *lengths, 0, draw.integer(0, 2)), {}


# -- creation -----------------------------------------------------------------------------------


@sampler("aten.new_zeros.default", "aten.new_ones.default", "aten.new_empty.default")
def _new(draw: Draw) -> Arguments:
    shape = draw.shape(0, 3)
    size = shape if draw.chance() else draw.shape(0, 3)
    return (draw.any_kind(shape), size), draw.choice([{}, {"dtype": torch.int64}])


@sampler("aten.new_full.default")
def _new_full(draw: Draw) -> Arguments:
    return (draw.normal(*draw.shape(0, 3)), draw.shape(0, 3), 1.5), {}


@sampler(
    *(f"aten.{n}.default" for n in ("zeros", "ones", "rand", "randn")), "aten.empty.memory_format"
)
def _sized(draw: Draw) -> Arguments:
    return (draw.shape(0, 3),), {"dtype": torch.float64}


@sampler("aten.full.default")
def _full(draw: Draw) -> Arguments:
    return (draw.shape(0, 3), draw.choice([2, -1.5])), {"dtype": torch.float64}


@sampler("aten.arange.default", "aten.randperm.default", "aten.eye.default")
def _counted(draw: Draw) -> Arguments:
    return (draw.size(),), {}


@sampler("aten.eye.m")
def _eye(draw: Draw) -> Arguments:
    return (draw.size(), draw.size()), {}


@sampler("aten.tril_indices.default", "aten.triu_indices.default")
def _triangle(draw: Draw) -> Arguments:
    return (draw.size(), draw.size()), {}


@sampler("aten.arange.start", "aten.arange.start_step")
def _arange(draw: Draw) -> Arguments:
    start = draw.integer(0, 3)
    return (start, start + draw.size()), {}


@sampler("aten.linspace.default")
def _linspace(draw: Draw) -> Arguments:
    return (0.0, 1.0, draw.size()), {"dtype": torch.float64}


@sampler("aten.scalar_tensor.default")
def _scalar(draw: Draw) -> Arguments:
    return (draw.choice([1.5, 2.0]),), {"dtype": torch.float64}


@sampler("aten.hann_window.default")
def _hann(draw: Draw) -> Arguments:
    return (draw.size(),), {"dtype": torch.float64}


@sampler("aten.randint.default")
def _randint(draw: Draw) -> Arguments:
    return (9, draw.shape(0, 3)), {}


@sampler("aten.randint.low")
def _randint_low(draw: Draw) -> Arguments:
    return (2, 9, draw.shape(0, 3)), {}
