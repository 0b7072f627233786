"""Calls of products, attention, convolutions, pooling and resampling."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from autopar.operators.quantized_linear import GROUP
from autopar.testing.rules.draw import Arguments, Draw, sampler
from autopar.testing.rules.rows import Argument, calls, distinct, flag, normal, one_of
from autopar.tracer import packed  # noqa: F401  (it defines the packed products)


@sampler("aten.matmul.default")
def _matmul(draw: Draw) -> Arguments:
    m, k, n = draw.size(), draw.size(), draw.size()
    batch = draw.shape(0, 2)
    left = [k] if draw.chance(15) else [*draw.broadcast(batch), m, k]
    right = [k] if draw.chance(15) else [*draw.broadcast(batch), k, n]
    return (draw.normal(*left), draw.normal(*right)), {}


def _added_product(draw: Draw, *batch: int) -> Arguments:
    """The term may have the last dims only, and broadcast; both may be scaled."""
    m, k, n = draw.size(), draw.size(), draw.size()
    term = [n] if draw.chance(30) else draw.broadcast([*batch, m, n])
    scales = {"beta": 0.5, "alpha": 2.0} if draw.chance(30) else {}
    return (draw.normal(*term), draw.normal(*batch, m, k), draw.normal(*batch, k, n)), scales


@sampler("aten.addmm.default")
def _addmm(draw: Draw) -> Arguments:
    return _added_product(draw)


@sampler("aten.baddbmm.default")
def _baddbmm(draw: Draw) -> Arguments:
    return _added_product(draw, draw.size())


def _other_points(draw: Draw, shape: list[int]) -> torch.Tensor:
    """As many batches and coordinates, and another number of points."""
    return draw.normal(*shape[:-2], draw.size(), shape[-1])


calls("cdist.default", (2, 3), normal, _other_points, one_of(1.0, 2.0))


@sampler("autopar.int8_linear.default")
def _int8_linear(draw: Draw) -> Arguments:
    batch, k, n = draw.shape(0, 3), draw.size(), draw.size()
    weight = draw.integers([n, k], -127, 128).to(torch.int8)
    return (draw.normal(*batch, k), weight, draw.normal(n)), {}


@sampler("autopar.float8_linear.default")
def _float8_linear(draw: Draw) -> Arguments:
    batch, k, n = draw.shape(0, 3), draw.size(), draw.size()
    weight = draw.normal(n, k).detach().to(torch.float8_e4m3fn).view(torch.uint8)
    return (draw.normal(*batch, k), weight, draw.normal(n)), {}


@sampler("autopar.int4_linear.default")
def _int4_linear(draw: Draw) -> Arguments:
    batch, groups, n = draw.shape(0, 3), draw.size(), draw.size()
    weight = draw.integers([n, groups, GROUP // 2], 0, 256).to(torch.uint8)
    return (draw.normal(*batch, groups, GROUP), weight, draw.normal(n, groups)), {}


@sampler("autopar.int8_mm.default")
def _int8_mm(draw: Draw) -> Arguments:
    batch, k, n = draw.shape(0, 3), draw.size(), draw.size()
    x, weight = (draw.integers(s, -127, 128).to(torch.int8) for s in ([*batch, k], [n, k]))
    return (x, weight), {}


@sampler("autopar.packed_linear.default")
def _packed_linear(draw: Draw) -> Arguments:
    k, parts, n = draw.size(), draw.integer(2, 3), draw.size()
    bias = [draw.normal(parts, n)] if draw.chance(70) else []
    return (draw.normal(*draw.shape(0, 2), k), draw.normal(parts, n, k), *bias), {}


@sampler("autopar.packed_addmm.default")
def _packed_addmm(draw: Draw) -> Arguments:
    m, k, parts, n = draw.size(), draw.size(), draw.integer(2, 3), draw.size()
    return (draw.normal(parts, n), draw.normal(m, k), draw.normal(k, parts, n)), {}


@sampler("aten.einsum.default")
def _einsum(draw: Draw) -> Arguments:
    equation = draw.choice(
        [
            "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "bnd,de->bne", "ij,jk->ik", "bi,bj->bij",
            "bclhn,bcshn->bclsh", "ij,ij->", "bij->bi", "nctkv,kvw->nctw", "i,j->ij",
            "bqd, bkd -> bqk", "bhlt,bhtD->bhlD", "ab,bc,cd->ad", "bij,bij->bi", "ij->ji",
            "...qhd,...khd->...hqk", "...hqk,...khd->...qhd", "...ij,jk->...ik",
        ]
    )  # fmt: skip
    left = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {c: draw.size() for c in sorted({*"".join(left)} - {"."})}
    dots = draw.shape(0, 2) if "..." in equation else ()
    shapes = [
        (*dots * ("..." in term), *(sizes[c] for c in term.removeprefix("..."))) for term in left
    ]
    return (equation, [draw.normal(*shape) for shape in shapes]), {}


@sampler("transformers.grouped_mm_fallback.default")
def _grouped_mm(draw: Draw) -> Arguments:
    rows, k, n, experts = draw.size(), draw.size(), draw.size(), draw.size()
    ends = sorted(draw.integer(0, rows) for _ in range(experts - 1))
    offsets = torch.tensor([*ends, rows], dtype=torch.int32)
    return (draw.normal(rows, k), draw.normal(experts, k, n), offsets), {}


@sampler("aten.scaled_dot_product_attention.default")
def _attention(draw: Draw) -> Arguments:
    batch, heads, groups = draw.size(), draw.size(), draw.integer(1, 3)
    q, k, d, e = draw.size(), draw.size(), draw.size(), draw.size()
    if draw.chance(15):  # a token to a cache
        q, k = 1, draw.integer(8, 12)
    kind = draw.integer(0, 9)
    causal = kind < 3
    kwargs: dict[str, Any] = {"is_causal": True} if causal else {}
    gqa = draw.chance(30)
    if draw.chance(30):
        kwargs["scale"] = 0.3
    mask = None
    if 3 <= kind < 6:
        shape = draw.choice([[q, k], [1, 1, q, k], [batch, 1, q, k], [batch, 1, 1, k]])
        mask = draw.booleans(shape, 0.7) if draw.chance() else draw.normal(*shape)
        if mask.dtype == torch.bool:
            mask[..., 0] = True  # a row without a key has no value
        kwargs["attn_mask"] = mask
    few_dims = mask is None or mask.ndim < 4
    lead = [batch] if few_dims and draw.chance(20) else [batch, heads]
    gqa = gqa and len(lead) == 2
    if gqa:
        kwargs["enable_gqa"] = True
    query_lead = [batch, heads * groups] if gqa else lead
    if draw.chance(25):
        # what was dropped is seen in the result if the values are an identity
        kwargs["dropout_p"] = draw.choice([0.1, 0.5])
        value = torch.eye(k, dtype=torch.float64).expand(*lead, k, k).clone()
    else:
        value = draw.normal(*lead, k, e)
    return (draw.normal(*query_lead, q, d), draw.normal(*lead, k, d), value), kwargs


@sampler("autopar.banded_attention.default")
def _banded_attention(draw: Draw) -> Arguments:
    batch, heads, groups = draw.size(), draw.size(), draw.integer(1, 3)
    q, d, e = draw.size(), draw.size(), draw.size()
    k = q if draw.chance(75) else draw.size()
    before, after = (draw.choice([None, draw.integer(-2, 9), draw.integer(0, 3)]) for _ in range(2))
    if draw.chance(30):
        before, after, k = None, 0, q
    kwargs: dict[str, Any] = {}
    if draw.chance(40):
        shape = draw.choice([[batch, 1, 1, k], [1, k], [1, heads * groups, 1, k]])
        kwargs["key_mask"] = draw.booleans(shape, 0.6)
    if draw.chance(30):
        kwargs["scale"] = 0.3
    if groups > 1 or draw.chance(20):
        kwargs["enable_gqa"] = True
    query = draw.normal(batch, heads * groups, q, d)
    key, value = draw.normal(batch, heads, k, d), draw.normal(batch, heads, k, e)
    return (query, key, value, before, after), kwargs


def _window(draw: Draw, rank: int, biggest: int) -> list[int]:
    return [draw.integer(1, biggest) for _ in range(rank)]


def _extent(draw: Draw, window: int, dilation: int = 1) -> int:
    return draw.integer((window - 1) * dilation + 1, 12 if draw.largest > 5 else 7)


def _convolution(draw: Draw, rank: int) -> Arguments:
    groups = draw.choice([1, 1, 2, 4, 3])
    window = _window(draw, rank, 3)
    dilation = [draw.choice([1, 1, 2]) for _ in range(rank)]
    padding: Any = [draw.integer(0, 2) for _ in range(rank)]
    stride = [draw.integer(1, 3) for _ in range(rank)]
    size = lambda: draw.integer(1, 4 if rank == 3 else 6)  # noqa: E731
    if draw.chance(20):  # as patches are cut: windows side by side
        stride, padding, dilation = window, [0] * rank, [1] * rank
    space = [_extent(draw, k, d) for k, d in zip(window, dilation, strict=True)]
    one, out = (size(), size()) if groups == 1 else (draw.integer(1, 2), draw.integer(1, 2))
    lead = [size()] if draw.chance(90) else []
    x = draw.normal(*lead, one * groups, *space)
    weight = draw.normal(out * groups, one, *window)
    bias = draw.normal(out * groups) if draw.chance() else None
    if draw.chance(20):
        return (x, weight, bias), {"groups": groups}
    return (x, weight, bias, stride, padding, dilation, groups), {}


def _same_convolution(draw: Draw, rank: int) -> Arguments:
    (x, weight, bias, *rest), _ = _convolution(draw, rank)
    groups = rest[3] if rest else x.shape[-rank - 1] // weight.shape[1]
    return (x, weight, bias, [1] * rank, draw.choice(["same", "valid"]), [1] * rank, groups), {}


for _rank in (1, 2, 3):
    sampler(f"aten.conv{_rank}d.default")(partial(_convolution, rank=_rank))
    sampler(f"aten.conv{_rank}d.padding")(partial(_same_convolution, rank=_rank))


def _conv_transpose(draw: Draw, rank: int) -> Arguments:
    groups = draw.choice([1, 1, 2])
    window = _window(draw, rank, 3)
    space = [draw.integer(2, 5) for _ in range(rank)]
    channels, out = groups * draw.integer(1, 4), draw.integer(1, 4)
    lead = [draw.integer(1, 5)]
    x, weight = draw.normal(*lead, channels, *space), draw.normal(channels, out, *window)
    bias = draw.normal(out * groups) if draw.chance() else None
    stride = window if draw.chance(40) else [draw.integer(1, 2) for _ in range(rank)]
    return (x, weight, bias, stride, [0] * rank, [0] * rank, groups), {}


for _rank, _overload in ((1, "default"), (2, "input"), (3, "input")):
    sampler(f"aten.conv_transpose{_rank}d.{_overload}")(partial(_conv_transpose, rank=_rank))


def _pooling(draw: Draw, rank: int, average: bool) -> Arguments:
    window = _window(draw, rank, 3)
    padding = [draw.integer(0, k // 2) for k in window]
    space = [_extent(draw, k) for k in window]
    lead = draw.shape(1, 1) + ([draw.size()] if draw.chance(80) else [])
    x = draw.permutation([*lead, *space])
    if draw.chance(25):
        return (x, window), {}
    stride = [draw.integer(1, 3) for _ in range(rank)]
    kwargs: dict[str, Any] = {"ceil_mode": True} if draw.chance(20) else {}
    if average and draw.chance(30):
        kwargs["count_include_pad"] = False
    return (x, window, stride, padding), kwargs


for _rank, _average, _names in (
    (1, False, "max_pool1d"),
    (2, False, "max_pool2d max_pool2d_with_indices"),
    (3, False, "max_pool3d"),
    (1, True, "avg_pool1d"),
    (2, True, "avg_pool2d"),
    (3, True, "avg_pool3d"),
):
    sampler(*(f"aten.{name}.default" for name in _names.split()))(
        partial(_pooling, rank=_rank, average=_average)
    )


def _sizes(count: int, most: int) -> Argument:
    return lambda draw, shape: [draw.integer(1, most) for _ in range(count)]


def _to_few(draw: Draw, shape: list[int], rank: int) -> list[int]:
    return [1] * rank if draw.chance() else [draw.integer(1, 4) for _ in range(rank)]


calls("adaptive_avg_pool1d.default", (2, 3), distinct, partial(_to_few, rank=1))
calls(
    "adaptive_avg_pool2d.default _adaptive_avg_pool2d.default adaptive_max_pool2d.default",
    (3, 4), distinct, partial(_to_few, rank=2),
)  # fmt: skip


for _rank, _corners, _names in (
    (1, False, "upsample_nearest1d"),
    (1, True, "upsample_linear1d"),
    (2, False, "upsample_nearest2d"),
    (2, True, "upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa "
              "_upsample_bicubic2d_aa"),
):  # fmt: skip
    calls(
        " ".join(f"{name}.vec" for name in _names.split()), (_rank + 2, _rank + 2), normal,
        _sizes(_rank, 8), *([flag] if _corners else []), None,
    )  # fmt: skip


@sampler("aten.pixel_shuffle.default")
def _pixel_shuffle(draw: Draw) -> Arguments:
    r = draw.integer(2, 3)
    shape = [*draw.shape(0, 2), draw.integer(1, 4) * r * r, draw.size(), draw.size()]
    return (draw.normal(*shape), r), {}


@sampler("aten.pixel_unshuffle.default")
def _pixel_unshuffle(draw: Draw) -> Arguments:
    r = draw.integer(2, 3)
    shape = [*draw.shape(0, 2), draw.size(), draw.integer(1, 4) * r, draw.integer(1, 4) * r]
    return (draw.normal(*shape), r), {}


@sampler("aten.grid_sampler.default")
def _grid_sampler(draw: Draw) -> Arguments:
    n, c = draw.size(), draw.size()
    x = draw.normal(n, c, draw.size(), draw.size())
    grid = draw.uniform([n, draw.size(), draw.size(), 2], -1.1, 1.1)
    return (x, grid, draw.integer(0, 1), draw.integer(0, 1), draw.chance()), {}


@sampler("aten.im2col.default")
def _im2col(draw: Draw) -> Arguments:
    window = _window(draw, 2, 3)
    lead = draw.shape(2, 2)[draw.integer(0, 1) :]  # one image has no batch
    x = draw.normal(*lead, *(_extent(draw, k) for k in window))
    return (x, window, [1, 1], [draw.integer(0, 1)] * 2, [draw.integer(1, 2)] * 2), {}


@sampler("aten.col2im.default")
def _col2im(draw: Draw) -> Arguments:
    window, size = _window(draw, 2, 2), [draw.integer(3, 5), draw.integer(3, 5)]
    blocks = (size[0] - window[0] + 1) * (size[1] - window[1] + 1)
    lead = [draw.size()][draw.integer(0, 1) :]
    channels = draw.size() if draw.chance() else 1
    x = draw.normal(*lead, channels * window[0] * window[1], blocks)
    return (x, size, window, [1, 1], [0, 0], [1, 1]), {}
