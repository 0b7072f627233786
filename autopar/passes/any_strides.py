"""Lets a graph run whatever strides its kernels give.

A graph is traced on fake tensors, whose strides are not those of the kernels for some operators:
the derivatives of `elu`, `softplus` and `hardtanh` if one operand is transposed, that of
`log_softmax`, batch norms on CPUs (torch 2.13), and whatever users register. So a `view` that
tracing took for possible may not be, and a `contiguous` that tracing left out as redundant may be
needed. Here views may copy, and what needs contiguous operands makes sure of them. Both do nothing
where strides are as foretold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from autopar.kernels.linear import linear_operator

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)
# They read memory by its strides, or refuse some. Other operators of these namespaces take any.
_BY_STRIDES = {aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default}
_TAKE_ANY = ("aten", "prims", "autopar", "_c10d_functional")


def any_strides(gm: fx.GraphModule) -> fx.GraphModule:
    """Let views copy if they must, and give contiguous operands to what may depend on that."""
    for node in list(gm.graph.nodes):
        if node.target in _VIEWS:
            node.target = aten.reshape.default
        elif _depends_on_strides(node.target):
            for operand in _read_by_strides(node):
                if _is_contiguous(operand):
                    node.replace_input_with(operand, contiguous(node, operand))
    return gm


def contiguous(user: fx.Node, operand: fx.Node) -> fx.Node:
    """An operand of a node as a contiguous tensor: itself, if its strides are as its fake's."""
    with user.graph.inserting_before(user):
        node = user.graph.call_function(aten.contiguous.default, (operand,))
    node.meta = dict(operand.meta)
    return node


def _depends_on_strides(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return target in _BY_STRIDES or target.namespace not in _TAKE_ANY


def _read_by_strides(node: fx.Node) -> list[fx.Node]:
    if node.target is not linear_operator():
        return node.all_input_nodes
    bias = node.args[2]  # the only operand that it takes for contiguous; parameters are as foretold
    return [bias] if isinstance(bias, fx.Node) and bias.op != "placeholder" else []


def _is_contiguous(operand: fx.Node) -> bool:
    value = operand.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_contiguous()
