"""Adds gradients of weights to those of earlier microbatches inside the products that make them.

A product `mm(a, b)` of which only the total is needed becomes `total.addmm_(a, b)`: BLAS adds as it
writes. Otherwise the product is written, read again, and the total read and written, for every
microbatch. Megatron-LM calls this gradient accumulation fusion. A schedule leaves room for the
totals, and for the gradients that are not added so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.joint_graph import JointGraph

aten = torch.ops.aten

_VIEWS = {aten.t.default, aten.view.default, aten.reshape.default}


def adding_backward(
    backward: fx.GraphModule, gradients: int
) -> tuple[fx.GraphModule, tuple[int, ...]] | None:
    """A backward that adds to gradients of an earlier run.

    Args:
        gradients: how many of its results, the first ones, are only added up.

    Returns:
        the graph, and positions of gradients: it takes their totals behind its other arguments, and
        returns None in their place. None if there are no such gradients. Those of two bytes are
        none of them: their totals are of a wider type.
    """
    graph = fx.Graph()
    outputs: Any = graph.graph_copy(backward.graph, {})
    last = next((n for n in reversed(graph.nodes) if n.op == "placeholder"), None)
    if last is None:
        return None
    taken = []
    results = list(outputs)
    for k, result in enumerate(outputs[:gradients]):
        views = _views_of_product(result, results)
        if views is None:
            continue
        product = views[-1]
        with graph.inserting_after(last):
            total = last = graph.placeholder(f"total_{k}")
        total.meta = dict(result.meta)
        with graph.inserting_before(product):
            for view in views[:-1]:
                total = _undone(graph, view, total)
            graph.call_function(aten.addmm_.default, (total, *product.args))
        results[k] = None
        for node in views:
            graph.erase_node(node)
        taken.append(k)
    if not taken:
        return None
    graph.output(tuple(results))
    return fx.GraphModule(backward, graph), tuple(taken)


def gradients_in_place(joint: JointGraph, gradients: int) -> list[fx.Node]:
    """The gradients that the backward of a joint graph will add in place.

    Args:
        gradients: as of `adding_backward`.
    """
    outputs = joint.gradients_too
    own = outputs[len(joint.results) :][:gradients]
    return [g for g in own if _views_of_product(g, outputs) is not None]


def _views_of_product(result: Any, results: Sequence[Any]) -> list[fx.Node] | None:
    """The views from a result to the product that it shows, and the product; None if anything else
    reads or returns one of them."""
    if not isinstance(result, fx.Node) or results.count(result) > 1:
        return None
    if any(user.op != "output" for user in result.users):
        return None
    views, node = [result], result
    while node.target in _VIEWS:
        node = node.args[0]  # type: ignore[assignment]
        views.append(node)
        if len(node.users) > 1 or node in results:
            return None
    like = result.meta.get("val")
    wide = isinstance(like, torch.Tensor) and like.dtype.itemsize > 2
    return views if node.target is aten.mm.default and wide else None


def _undone(graph: fx.Graph, view: fx.Node, total: fx.Node) -> fx.Node:
    if view.target is aten.t.default:
        return graph.call_function(aten.t.default, (total,))
    shape = list(view.args[0].meta["val"].shape)  # type: ignore[union-attr]
    return graph.call_function(aten.view.default, (total, shape))
