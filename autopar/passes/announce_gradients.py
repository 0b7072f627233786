"""Gradients that are stored on the host are announced as soon as they are, so that the optimizer's
step may begin beside the rest of the backward."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from autopar.comm.host_copies import ANNOUNCE, ON_HOST


def announce_gradients(gm: fx.GraphModule) -> fx.GraphModule:
    """Announce results of a backward graph by their positions, behind what finishes the copy."""
    graph = gm.graph
    results: Any = graph.output_node().args[0]
    order = {node: k for k, node in enumerate(graph.nodes)}
    for argument, node in enumerate(results):
        if not isinstance(node, fx.Node) or node.target not in ON_HOST:
            continue
        uses = [node, *(user for user in node.users if user.op != "output")]
        with graph.inserting_after(max(uses, key=order.__getitem__)):
            graph.call_function(ANNOUNCE, (node, argument))
    return gm


def announced(gm: fx.GraphModule) -> frozenset[int]:
    """Positions of the gradients that a backward graph announces."""
    nodes = gm.graph.find_nodes(op="call_function", target=ANNOUNCE)
    return frozenset(node.args[1] for node in nodes)
