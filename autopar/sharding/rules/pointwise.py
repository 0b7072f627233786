"""Pointwise ops: one rule for all of them, dims aligned from the right as broadcasting does.

The table `LINEAR` says per op which operands it is linear in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache

import torch

from autopar.sharding.lowerings import random
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call

# Sets of operands in which the op is jointly linear (a pending sum passes through).
LINEAR: dict[str, tuple[tuple[int, ...], ...]] = {
    "aten.add.Tensor": ((0, 1),),
    "aten.sub.Tensor": ((0, 1),),
    "aten.subtract.Tensor": ((0, 1),),
    "aten.divide.Tensor": ((0,),),
    "aten.true_divide.Tensor": ((0,),),
    "aten.multiply.Scalar": ((0,),),
    "aten.lerp.Scalar": ((0, 1),),
    "aten.lerp.Tensor": ((0, 1),),
    "aten.mul.Tensor": ((0,), (1,)),
    "aten.multiply.Tensor": ((0,), (1,)),
    "aten.div.Tensor": ((0,),),
    "aten.neg.default": ((0,),),
    "aten.mul.Scalar": ((0,),),
    "aten.div.Scalar": ((0,),),
    "aten.clone.default": ((0,),),
    "aten.alias.default": ((0,),),
    "aten.detach.default": ((0,),),
    "aten.where.self": ((1, 2),),
    "aten.type_as.default": ((0,),),
    "aten.addcmul.default": ((0, 1), (0, 2)),
    "aten.addcdiv.default": ((0, 1),),
    "aten.fill.Tensor": ((0, 1),),
    "aten.masked_fill.Tensor": ((0, 2),),
    **{
        f"aten.{name}": ((0,),)
        for name in (
            "positive.default conj_physical.default deg2rad.default rad2deg.default ldexp.Tensor "
            "gelu_backward.default sigmoid_backward.default tanh_backward.default "
            "threshold_backward.default native_dropout_backward.default"
        ).split()
    },
}

# Pointwise, though torch does not tag them so.
_UNTAGGED = frozenset(
    f"aten.{name}"
    for name in (
        "__and__.Tensor __and__.Scalar __or__.Tensor __or__.Scalar __xor__.Tensor "
        "where.ScalarOther where.ScalarSelf where.Scalar floor_divide.default "
        "floor_divide.Scalar fill.Scalar fill.Tensor multiply.Tensor multiply.Scalar "
        "divide.Tensor subtract.Tensor hardswish.default log_sigmoid.default "
        "special_logit.default masked_fill.Tensor selu.default celu.default rrelu.default "
        "isin.Tensor_Scalar true_divide.Tensor lerp.Scalar lerp.Tensor square.default "
        "bitwise_and.Tensor bitwise_or.Tensor polar.default nan_to_num.default "
        "feature_alpha_dropout.default"
    ).split()
)

# The result has the operand's shape and none of its values, or another layout of its elements.
_NEW = ("zeros_like", "ones_like", "full_like", "empty_like")

ROWS: dict[str, Row | tuple[Row, ...]] = {
    **{f"aten.{name}.default": Row("*d -> *d") for name in _NEW},
    # the second operand only determines the dtype
    "aten.type_as.default": Row("*d, *e:complete -> *d", linear=((0,),)),
    "aten.isin.Tensor_Tensor": Row("*d, ... -> *d"),
    "aten.prelu.default": (
        Row("*d, [w] -> *d", when=lambda a: a["weight"] == (1,)),
        Row("n c *d, c -> n c *d"),
    ),
    "aten.view_as_real.default": Row("*d -> *d [two]", linear=((0,),)),
    "aten.view_as_complex.default": Row("*d [two] -> *d", linear=((0,),)),
    "aten.native_dropout.default": Row("*d -> *d, *d", lowering=random.native_dropout, always=True),
    "aten.dropout.default": Row("*d -> *d", linear=((0,),), lowering=random.dropout, always=True),
    "aten.bernoulli.p": Row("*d -> *d", lowering=random.bernoulli, always=True),
}


@cache
def is_pointwise(op: torch._ops.OpOverload) -> bool:
    """By torch's tag; in-place variants and random ops are none."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return False
    return torch.Tag.pointwise in op.tags or str(op) in _UNTAGGED


def bind_pointwise(call: Call) -> OpRule:
    """Dims of operands and results aligned from the right."""
    inputs = call.inputs
    operands = sum(shape is not None for shape in inputs)
    # x + 1 is not linear in x: a set that names an absent operand does not apply
    linear = tuple(
        group for group in _linear(str(call.op), call.arguments) if max(group) < operands
    )
    notation = ", ".join(["*d"] * len(inputs)) + " -> " + ", ".join(["*d"] * len(call.outputs))
    return Row(notation, linear=linear).bind(inputs, call.outputs)


def _linear(name: str, arguments: Mapping[str, object]) -> Sequence[tuple[int, ...]]:
    if name == "aten.masked_fill.Scalar":  # filling a pending sum adds up the fillings
        return ((0,),) if arguments["value"] in (0, math.inf, -math.inf) else ()
    if name in ("aten.where.ScalarOther", "aten.where.ScalarSelf"):
        scalar = arguments["other" if name.endswith("Other") else "self"]
        return ((1,),) if scalar == 0 else ()
    if name in ("aten.div.Tensor_mode", "aten.div.Scalar_mode"):
        return ((0,),) if arguments["rounding_mode"] is None else ()
    return LINEAR.get(name, ())
