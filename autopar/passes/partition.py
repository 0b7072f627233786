"""Split a joint graph into forward and backward as eager PyTorch does.

The backward keeps what eager autograd would keep, except gathered copies of the parameters that the
plan gathers again (ZeRO-3): the gather and the views on it move into the backward. Where a schedule
decides what is kept, `autopar/schedule/realize.py` splits the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.ir.aliasing import is_view
from autopar.ir.joint_graph import JointGraph
from autopar.passes.subgraph import subgraph

_GATHERS = {torch.ops.autopar.all_gather.default}
_CAST = torch.ops.aten._to_copy.default


def split_as_eager(
    joint: JointGraph, *, reshard_after_forward: Collection[int] = frozenset()
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward graph, which returns the results and what it saves; and the backward graph, which
    takes what is saved and the gradients of results.

    Args:
        reshard_after_forward: positions of arguments whose gathered copies the backward gathers
            again.
    """
    graph, outputs, count = joint.gm.graph, joint.outputs, len(joint.results)
    tangents, primals = joint.tangents, joint.primals
    forward = _forward_nodes(graph, outputs[:count], tangents)
    again = _recomputed(forward, primals, reshard_after_forward)
    body, saved = _backward_body(outputs[count:], forward, again, set(tangents))
    saved_nodes = [n for n in graph.nodes if n in saved]
    forward_gm = subgraph(joint.gm, primals, forward, outputs[:count] + saved_nodes)
    backward_gm = subgraph(joint.gm, saved_nodes + tangents, body, outputs[count:])
    return forward_gm, backward_gm


def forward_nodes(joint: JointGraph) -> set[fx.Node]:
    """What the forward computes."""
    results = joint.outputs[: len(joint.results)]
    return _forward_nodes(joint.gm.graph, results, joint.tangents)


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _forward_nodes(
    graph: fx.Graph, outputs: Iterable[Any], tangents: Sequence[fx.Node]
) -> set[fx.Node]:
    """What the forward computes: ancestors of its results, with all results of those operators."""
    forward: set[fx.Node] = set()
    stack = [n for n in outputs if _is_node(n)]
    while stack:
        node = stack.pop()
        if node not in forward:
            forward.add(node)
            stack += node.all_input_nodes
    of_backward = set(tangents)
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if any(n in of_backward for n in node.all_input_nodes):
            of_backward.add(node)
            continue
        is_result = node.target is operator.getitem and node.args[0] in forward
        tagged = node.meta.get("partitioner_tag") == "is_forward"
        # sources of a forward operator come before it, so they were decided already
        ready = all(n in forward or n.op == "placeholder" for n in node.all_input_nodes)
        if ready and (is_result or tagged):
            forward.add(node)
    return forward


def _recomputed(
    forward: set[fx.Node], primals: Sequence[fx.Node], reshard_after_forward: Collection[int]
) -> set[fx.Node]:
    """Gathers of the chosen primals, and the casts and views before and after them."""
    chain = {primals[i] for i in reshard_after_forward}
    again: set[fx.Node] = set()
    for node in primals[0].graph.nodes if primals else ():
        if node not in forward or node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        moves = is_view(node) or node.target in _GATHERS or node.target is _CAST
        if len(inputs) == 1 and inputs[0] in chain and moves:
            chain.add(node)
            again.add(node)
    return again


def _backward_body(
    outputs: Iterable[Any],
    forward: set[fx.Node],
    again: set[fx.Node],
    tangents: set[fx.Node],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that the backward computes, and the forward's values that it needs for that."""
    body: set[fx.Node] = set()
    saved: set[fx.Node] = set()
    stack = [n for n in outputs if _is_node(n)]
    while stack:
        node = stack.pop()
        if node in body or node in saved or node in tangents:
            continue
        if node.op == "placeholder" or (node in forward and node not in again):
            saved.add(node)
        else:
            body.add(node)
            stack += node.all_input_nodes
    return body, saved
