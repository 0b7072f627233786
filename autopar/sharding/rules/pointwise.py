"""Pointwise ops: one rule for all of them, dims aligned from the right as broadcasting does.

Which operands they are linear in is the only thing to know per op.
"""

from __future__ import annotations

from collections.abc import Sequence

from autopar.sharding.rule import OpRule, Row, Shape

# Sets of operands in which the op is jointly linear (a pending sum passes through).
LINEAR: dict[str, tuple[tuple[int, ...], ...]] = {
    "aten.add.Tensor": ((0, 1),),
    "aten.sub.Tensor": ((0, 1),),
    "aten.mul.Tensor": ((0,), (1,)),
    "aten.div.Tensor": ((0,),),
    "aten.neg.default": ((0,),),
    "aten.mul.Scalar": ((0,),),
    "aten.div.Scalar": ((0,),),
    "aten.clone.default": ((0,),),
    "aten.alias.default": ((0,),),
    "aten.detach.default": ((0,),),
    "aten.where.self": ((1, 2),),
}


def bind_pointwise(name: str, inputs: Sequence[Shape | None], outputs: Sequence[Shape]) -> OpRule:
    operands = sum(shape is not None for shape in inputs)
    linear = LINEAR.get(name, ())
    # x + 1 is not linear in x: a set that names an absent operand does not apply
    linear = tuple(group for group in linear if max(group) < operands)
    notation = ", ".join(["*d"] * len(inputs)) + " -> " + ", ".join(["*d"] * len(outputs))
    return Row(notation, linear=linear).bind(inputs, outputs)
