"""Writes the parts of a concatenation into its result as they are made.

A concatenation needs all of its parts and its result at once, which is twice their memory. A part
that nothing reads afterwards is copied where it belongs as soon as it is made, and freed. Slices of
a region (`split_regions.py`) depend on that. The copies are those that the concatenation makes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.aliasing import last_writers, lifetimes

aten = torch.ops.aten


def fill_concatenations(gm: fx.GraphModule) -> fx.GraphModule:
    """Copy the parts of concatenations into place where they are made."""
    graph = gm.graph
    for node in graph.find_nodes(op="call_function", target=aten.cat.default):
        dying = _dying(graph, node)
        if dying:
            _fill(graph, node, dying)
    return gm


def _dying(graph: fx.Graph, node: fx.Node) -> dict[int, tuple[fx.Node, list[fx.Node]]]:
    """By position, the parts that nothing reads besides the concatenation: the node after which
    each is complete, and the views that lead to it."""
    where, last, held = lifetimes(graph)
    written = last_writers(graph, where)
    return {
        k: (written.get(source, source[0]), chain)
        for k, x in enumerate(cat_parts(node))
        if (source := where[x]) is not None
        and last[source] is node
        and source not in held
        and (chain := _views(x, source[0])) is not None
        and sum(where[n] == source for n in node.all_input_nodes) == 1
    }


def cat_parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation takes."""
    parts: Any = node.args[0]
    return list(parts)


def _views(x: fx.Node, maker: fx.Node) -> list[fx.Node] | None:
    """Views that lead from what an operator makes to a part, in order; None if anything else
    does."""
    chain: list[fx.Node] = []
    while x is not maker:
        pure = x.target is operator.getitem or not x.target._schema.is_mutable  # type: ignore[union-attr]
        if len(x.all_input_nodes) != 1 or not pure:
            return None
        chain.append(x)
        x = x.all_input_nodes[0]
    return chain[::-1] if maker.op == "call_function" else None


def _fill(graph: fx.Graph, node: fx.Node, dying: dict[int, tuple[fx.Node, list[fx.Node]]]) -> None:
    value, parts = node.meta["val"], cat_parts(node)
    along: Any = node.args[1] if len(node.args) > 1 else 0
    dim = along % value.ndim
    position = {n: k for k, n in enumerate(graph.nodes)}
    first = min((complete for complete, _ in dying.values()), key=position.__getitem__)
    with graph.inserting_before(first):
        result = graph.call_function(
            aten.empty_strided.default, (list(value.shape), list(value.stride())),
            {"dtype": value.dtype, "device": value.device},
        )  # fmt: skip
    result.meta = dict(node.meta)
    start = 0
    for k, x in enumerate(parts):
        size = x.meta["val"].shape[dim]
        at = node
        if k in dying:
            at, chain = dying[k]
            for view in chain:
                if position[view] > position[dying[k][0]]:
                    at.append(view)
                    at = view
            at = at.next
        with graph.inserting_before(at):
            place = graph.call_function(aten.slice.Tensor, (result, dim, start, start + size))
            graph.call_function(aten.copy_.default, (place, x))
        start += size
    node.replace_all_uses_with(result)
    graph.erase_node(node)
