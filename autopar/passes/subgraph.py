"""A part of a graph as a graph of its own.

`torch.fx._lazy_graph_module._LazyGraphModule` is private (the same in torch 2.11 and 2.13). Its
code is written when it is first called, and not whenever a pass has changed the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch.fx as fx
from torch.fx._lazy_graph_module import _LazyGraphModule


def ancestors(
    values: Iterable[Any], given: Callable[[fx.Node], bool] = lambda node: False
) -> set[fx.Node]:
    """Nodes among some values, and what they are computed from.

    Args:
        given: whether a node is at hand, so that nothing before it counts.
    """
    found: set[fx.Node] = set()
    stack = [x for x in values if isinstance(x, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not given(node):
                stack += node.all_input_nodes
    return found


def subgraph(
    root: fx.GraphModule,
    inputs: Iterable[fx.Node],
    body: Collection[fx.Node],
    outputs: Sequence[Any],
) -> fx.GraphModule:
    """A graph that takes some values of another one and computes some of its nodes.

    Args:
        inputs: what it takes, in order.
        body: what it computes of them, unless it is an input.
        outputs: what it returns; what is no node, as it is.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in root.graph.nodes:
        if node in body and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[x] if isinstance(x, fx.Node) else x for x in outputs))
    graph.eliminate_dead_code()
    return _LazyGraphModule(root, graph)
