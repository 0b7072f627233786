"""Custom autograd functions: pointwise if all that their forward and backward run is pointwise.

The tracer keeps such a function as one operator, so no row can know it by name.
"""

from __future__ import annotations

import operator
from functools import cache

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from autopar.sharding.rule import OpRule, Shape
from autopar.sharding.rules.call import Call
from autopar.sharding.rules.pointwise import is_pointwise

NAMESPACE = "autopar_functions"

# Neither tagged as pointwise nor anything else.
_NEUTRAL = frozenset({"aten.detach.default", "aten.clone.default", "aten.alias.default",
                      "aten._to_copy.default", "aten.full_like.default", "aten.ones_like.default",
                      "aten.zeros_like.default"})  # fmt: skip


def bind_function(call: Call) -> OpRule | None:
    """The rule of a custom function's call, or None unless it is pointwise throughout."""
    if torch.Tag.nondeterministic_seeded in call.op.tags or None in call.inputs:
        return None
    shapes = tuple(s for s in call.inputs if s is not None)
    if not _is_pointwise_throughout(call.op, shapes, call.masks):
        return None
    notation = ", ".join(["*d"] * len(shapes)) + " -> " + ", ".join(["*d"] * len(call.outputs))
    return call.bind(notation)


@cache
def _is_pointwise_throughout(
    op: torch._ops.OpOverload, shapes: tuple[Shape, ...], masks: tuple[bool, ...]
) -> bool:
    def step(*operands: torch.Tensor) -> list[torch.Tensor]:
        value = op(*operands)
        results = list(value) if isinstance(value, tuple | list) else [value]
        carried = [r for r in results if r.requires_grad]
        inputs = [x for x in operands if x.requires_grad]
        cotangents = [torch.ones_like(r) for r in carried]
        grads = torch.autograd.grad(carried, inputs, cotangents, allow_unused=True)
        return results + [g for g in grads if g is not None]

    with FakeTensorMode():
        operands = [
            torch.empty(s, dtype=torch.bool) if m else torch.empty(s, requires_grad=True)
            for s, m in zip(shapes, masks, strict=True)
        ]
        try:
            traced = make_fx(step)(*operands)
        except Exception:  # whatever a user's function does not take: it stays without a rule
            return False
    return all(_pointwise_node(node) for node in traced.graph.nodes)


def _pointwise_node(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output") or node.target is operator.getitem:
        return True
    op = node.target
    if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
        return False  # a constant with a shape of its own
    return is_pointwise(op) or str(op) in _NEUTRAL
