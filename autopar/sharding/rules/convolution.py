"""Convolutions, pooling and resampling: over batch, channels, groups and space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from autopar.sharding.lowerings import norms, windows
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call


def _space(name: str, count: int, mark: str = "") -> str:
    return " ".join(f"[{name}{i}]" if mark == "[]" else f"{name}{i}{mark}" for i in range(count))


def _conv(call: Call) -> OpRule:
    """[n, c, space], [o, c / groups, window], [o]; split space fetches its halo."""
    weight = call.inputs[1]
    assert weight is not None
    rank = len(weight) - 2
    groups = call.arguments.get("groups", 1)
    lead = len(call.outputs[0]) - rank - 1  # a single image has no batch
    n = "n" if lead else ""
    window = _space("x", rank, "[]")
    # "same" pads unevenly for even windows: leave that to torch
    uneven = call.arguments.get("padding") == "same" and any(k % 2 == 0 for k in weight[2:])
    s = _space("s", rank, "[]") if uneven else _space("s", rank, "~")
    t = _space("t", rank, "[]") if uneven else s
    if groups == 1:
        notation = f"{n} c {s}, o c {window}, +o -> {n} o {t}"
        row = Row(notation, linear=((0,), (1,)), lowering=windows.convolution)
        return row.bind(call.inputs, call.outputs)
    notation = f"{n} g! {s}, g! [i] {window}, g! -> {n} g! {t}"
    row = Row(notation, lowering=windows.convolution)
    return _by_groups(row.bind(call.inputs, call.outputs), "g", groups)


def _by_groups(rule: OpRule, name: str, groups: int) -> OpRule:
    """Channels are split by whole groups only."""
    if name not in rule.factors:
        return rule
    if groups == 1:
        return rule.without(name)
    factor = replace(rule.factors[name], size=groups, even=True)
    return replace(rule, factors={**rule.factors, name: factor})


def _conv_transpose(call: Call) -> OpRule:
    """[n, c, space], [c, o / groups, window], [o]."""
    weight = call.inputs[1]
    assert weight is not None
    rank = len(weight) - 2
    n = "n" if len(call.outputs[0]) == rank + 2 else ""
    s, x, t = (_space(name, rank, "[]") for name in "sxt")
    if call.arguments.get("groups", 1) == 1:
        notation = f"{n} c {s}, c o {x}, +o -> {n} o {t}"
        return Row(notation, linear=((0,), (1,))).bind(call.inputs, call.outputs)
    return Row(f"{n} [c] {s}, [c] [o] {x}, [p] -> {n} [p] {t}").bind(call.inputs, call.outputs)


def _no_ceil(arguments: Mapping[str, Any]) -> bool:
    return not arguments.get("ceil_mode")


def _plain_average(arguments: Mapping[str, Any]) -> bool:
    padded = arguments.get("padding", 0)
    padded = any(padded) if isinstance(padded, list | tuple) else bool(padded)
    return _no_ceil(arguments) and not (padded and not arguments.get("count_include_pad", True))


def _to_one(arguments: Mapping[str, Any]) -> bool:
    return math.prod(arguments["output_size"]) == 1


_UNSPLIT = {1: Row("*b [h] -> *b [i]"), 2: Row("*b [h] [w] -> *b [i] [j]")}

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.max_pool1d.default": _UNSPLIT[1],
    "aten.max_pool2d.default": (
        Row("*b s0~ s1~ -> *b s0~ s1~", lowering=windows.max_pool, when=_no_ceil),
        _UNSPLIT[2],
    ),
    "aten.avg_pool1d.default": replace(_UNSPLIT[1], linear=((0,),)),
    "aten.avg_pool2d.default": (
        Row(
            "*b s0~ s1~ -> *b s0~ s1~",
            linear=((0,),),
            lowering=windows.avg_pool,
            when=_plain_average,
        ),
        replace(_UNSPLIT[2], linear=((0,),)),
    ),
    "aten.adaptive_avg_pool1d.default": (
        Row("*b r0! -> *b [i]", linear=((0,),), lowering=norms.pool_to_one, when=_to_one),
        replace(_UNSPLIT[1], linear=((0,),)),
    ),
    "aten.adaptive_avg_pool2d.default": (
        Row("*b r0! r1! -> *b [i] [j]", linear=((0,),), lowering=norms.pool_to_one, when=_to_one),
        replace(_UNSPLIT[2], linear=((0,),)),
    ),
    "aten._adaptive_avg_pool2d.default": _UNSPLIT[2],
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
            "aten.pixel_shuffle.default",
        ),
        Row("n c [h] [w] -> n c [i] [j]", linear=((0,),)),
    ),
    "aten.pixel_shuffle.default": Row("*b [c] [h] [w] -> *b [d] [i] [j]", linear=((0,),)),
    "aten.pixel_unshuffle.default": Row("*b [c] [h] [w] -> *b [d] [i] [j]", linear=((0,),)),
    "aten.grid_sampler.default": Row("n c [h] [w], n i j [x] -> n c i j", linear=((0,),)),
    # channels are the leading part of the columns
    "aten.im2col.default": Row("n c [h] [w] -> n c [l]", linear=((0,),)),
    "aten.col2im.default": Row("n c [l] -> n c [h] [w]", linear=((0,),)),
}

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    **{
        f"aten.conv{rank}d.{overload}": _conv
        for rank in (1, 2, 3)
        for overload in ("default", "padding")
    },
    "aten.conv_transpose1d.default": _conv_transpose,
    "aten.conv_transpose2d.input": _conv_transpose,
    "aten.conv_transpose3d.input": _conv_transpose,
}
