"""Convolutions, pooling and resampling: over batch, channels, groups and space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from autopar.sharding.lowerings import norms, windows
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call


def _space(count: int, word: str = "") -> str:
    """Dims of space: s0, s1, ..."""
    return " ".join(f"s{i}{word}" for i in range(count))


def _unsplit(count: int) -> str:
    return " ".join(f"[x{i}]" for i in range(count))


def _conv(call: Call) -> OpRule:
    """[n, c, space], [o, c / groups, window], [o]; split space fetches its halo."""
    weight = call.operand(1)
    rank = len(weight) - 2
    groups = call.arguments.get("groups", 1)
    lead = len(call.outputs[0]) - rank - 1  # a single image has no batch
    n = "n" if lead else ""
    window, s = _unsplit(rank), _space(rank)
    windows_over_s = _space(rank, ":window")
    if groups == 1:
        notation = f"{n} c {windows_over_s}, o c {window}, +o -> {n} o {s}"
        return call.bind(notation, linear=((0,), (1,)), lowering=windows.convolution)
    notation = f"{n} g:lowered {windows_over_s}, g [i] {window}, +g -> {n} g {s}"
    rule = call.bind(notation, linear=((0,),), lowering=windows.convolution)
    return rule.by_groups("g", groups)


def _columns(call: Call) -> OpRule:
    """Windows of an image as columns [n, c * window, l], and back; whole channels are split, which
    are the leading part of the columns."""
    image, columns = "c [h] [w]", "c [l]"
    to_columns = call.op is torch.ops.aten.im2col.default
    source, result = (image, columns) if to_columns else (columns, image)
    channels = (call.operand(0) if to_columns else call.outputs[0])[-3]
    n = "n" if len(call.outputs[0]) == len(result.split()) + 1 else ""
    return call.bind(f"{n} {source} -> {n} {result}", linear=((0,),)).by_groups("c", channels)


def _conv_transpose(call: Call) -> OpRule:
    """[n, c, space], [c, o / groups, window], [o]; space is split where windows do not overlap."""
    weight = call.operand(1)
    rank = len(weight) - 2
    n = "n" if len(call.outputs[0]) == rank + 2 else ""
    x = _unsplit(rank)
    extents = zip(call.operand(0)[-rank:], weight[2:], call.outputs[0][-rank:], strict=True)
    # windows do not overlap if the stride is the window and nothing is cut off or added
    stride = windows.spread(call.arguments.get("stride", 1), rank)
    separate = [
        s == k and n > 1 and out == n * k for (n, k, out), s in zip(extents, stride, strict=True)
    ]
    s = " ".join(f"s{i}" if alone else f"[s{i}]" for i, alone in enumerate(separate))
    if call.arguments.get("groups", 1) == 1:
        return call.bind(f"{n} c {s}, c o {x}, +o -> {n} o {s}", linear=((0,), (1,)))
    return call.bind(f"{n} [c] {s}, [c] [o] {x}, +[p] -> {n} [p] {s}", linear=((0,),))


def _no_ceil(arguments: Mapping[str, Any]) -> bool:
    return not arguments.get("ceil_mode")


def _plain_average(arguments: Mapping[str, Any]) -> bool:
    padded = arguments.get("padding", 0)
    padded = any(padded) if isinstance(padded, list | tuple) else bool(padded)
    return _no_ceil(arguments) and not (padded and not arguments.get("count_include_pad", True))


def _to_one(arguments: Mapping[str, Any]) -> bool:
    return math.prod(arguments["output_size"]) == 1


_SPACE = {rank: f"*b {_space(rank, ':window')} -> *b {_space(rank)}" for rank in (1, 2)}
_UNSPLIT_SPACE = {1: Row("*b [h] -> *b [i]"), 2: Row("*b [h] [w] -> *b [i] [j]")}

ROWS: dict[str, Row | tuple[Row, ...]] = {
    **{
        f"aten.max_pool{rank}d.default": (
            Row(_SPACE[rank], lowering=lowering, when=_no_ceil),
            _UNSPLIT_SPACE[rank],
        )
        for rank, lowering in ((1, windows.max_pool1d), (2, windows.max_pool2d))
    },
    **{
        f"aten.avg_pool{rank}d.default": (
            Row(_SPACE[rank], linear=((0,),), lowering=lowering, when=_plain_average),
            replace(_UNSPLIT_SPACE[rank], linear=((0,),)),
        )
        for rank, lowering in ((1, windows.avg_pool1d), (2, windows.avg_pool2d))
    },
    "aten.adaptive_avg_pool1d.default": (
        Row("*b r0:lowered -> *b [i]", linear=((0,),), lowering=norms.pool_to_one, when=_to_one),
        replace(_UNSPLIT_SPACE[1], linear=((0,),)),
    ),
    "aten.adaptive_avg_pool2d.default": (
        Row(
            "*b r0:lowered r1:lowered -> *b [i] [j]",
            linear=((0,),),
            lowering=norms.pool_to_one,
            when=_to_one,
        ),
        replace(_UNSPLIT_SPACE[2], linear=((0,),)),
    ),
    "aten._adaptive_avg_pool2d.default": replace(_UNSPLIT_SPACE[2], linear=((0,),)),
    "aten.adaptive_max_pool2d.default": Row("*b [h] [w] -> *b [i] [j], *b [i] [j]"),
    "aten.max_pool2d_with_indices.default": Row("*b [h] [w] -> *b [i] [j], *b [i] [j]"),
    **dict.fromkeys(
        ("aten.upsample_linear1d.vec", "aten.upsample_nearest1d.vec"),
        Row("n c [h] -> n c [i]", linear=((0,),)),
    ),
    **dict.fromkeys(
        (
            "aten.upsample_bilinear2d.vec",
            "aten.upsample_nearest2d.vec",
            "aten.upsample_bicubic2d.vec",
            "aten._upsample_bilinear2d_aa.vec",
            "aten._upsample_bicubic2d_aa.vec",
        ),
        Row("n c [h] [w] -> n c [i] [j]", linear=((0,),)),
    ),
    "aten.grid_sampler.default": Row("n c [h] [w], n i j [x] -> n c i j", linear=((0,),)),
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    **{
        f"aten.conv{rank}d.{overload}": _conv
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    "aten.im2col.default": _columns,
    "aten.col2im.default": _columns,
    "aten.conv_transpose1d.default": _conv_transpose,
    "aten.conv_transpose2d.input": _conv_transpose,
    "aten.conv_transpose3d.input": _conv_transpose,
}
