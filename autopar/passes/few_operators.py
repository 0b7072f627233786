"""Fewer operators, for programs that wait for Python and the dispatcher more than for memory.

The program of one token runs small operators by the hundred. What several layers compute alike (a
mask as numbers, the angles of positions) is computed once, and a product with a transposed weight
is one operator again. Numbers stay the same to the bit.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.randomness import draws

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default)


def share_equal_operators(gm: fx.GraphModule) -> fx.GraphModule:
    """Compute once what operators of equal arguments compute; of a graph without writes."""
    graph = gm.graph
    known: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        key = _key(node)
        if key is None:
            continue
        first = known.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first, delete_user_cb=lambda user: user.op != "output")
            if not node.users:
                graph.erase_node(node)
    return gm


def _key(node: fx.Node) -> Hashable | None:
    """Equal for operators that give the same; None where that is not known."""
    if node.target is operator.getitem:
        return node.args
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target._schema.is_mutable or draws(node) or "empty" in target._opname:
        return None
    return target, repr(node.args), repr(sorted(node.kwargs.items()))


def whole_products(gm: fx.GraphModule) -> fx.GraphModule:
    """Write a product of flattened rows with a transposed weight as the linear layer that it is."""
    graph = gm.graph
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            _as_linear(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        _without_batch(graph, node)
    return gm


def _without_batch(graph: fx.Graph, node: fx.Node) -> None:
    """A product of rows that are not dense with a weight that is repeated for each of the batch,
    which kernels copy: of dense rows with the one weight."""
    arguments: Any = node.args
    rows, weights = arguments
    if rows.target is not aten.expand.default or weights.target is not aten.expand.default:
        return
    x, transposed = rows.args[0], weights.args[0]
    if transposed.target is not aten.t.default or x.meta["val"].shape != rows.meta["val"].shape:
        return
    with graph.inserting_before(node):
        dense = graph.call_function(
            aten.clone.default, (x,), {"memory_format": torch.contiguous_format}
        )
        linear = graph.call_function(aten.linear.default, (dense, transposed.args[0]))
    dense.meta, linear.meta = dict(x.meta), dict(node.meta)
    dense.meta["val"] = x.meta["val"].contiguous()
    node.replace_all_uses_with(linear)
    for unused in (node, rows, weights, transposed):
        if not unused.users:
            graph.erase_node(unused)


def _as_linear(graph: fx.Graph, node: fx.Node) -> None:
    arguments: Any = node.args
    *bias, flat, transposed = arguments
    if node.kwargs or len(node.users) != 1 or transposed.target is not aten.t.default:
        return
    (result,) = node.users
    if flat.target not in _VIEWS or result.target not in _VIEWS:
        return
    x, weight = flat.args[0], transposed.args[0]
    if not x.meta["val"].is_contiguous():  # torch would repeat the weight for a batched product
        return
    shape = (*x.meta["val"].shape[:-1], weight.meta["val"].shape[0])
    if tuple(result.meta["val"].shape) != shape or (bias and bias[0].meta["val"].ndim != 1):
        return
    with graph.inserting_before(node):
        linear = graph.call_function(aten.linear.default, (x, weight, *bias))
    linear.meta = dict(result.meta)
    result.replace_all_uses_with(linear)
    for unused in (result, node, flat, transposed):
        if not unused.users:
            graph.erase_node(unused)
