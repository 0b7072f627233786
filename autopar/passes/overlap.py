"""Overlap collectives with compute in graphs without a schedule: start each ahead of its wait.

A schedule has split them already (`autopar/schedule/prefetch.py`).
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from autopar.ir.aliasing import is_view
from autopar.ir.fx_calls import add_call
from autopar.passes.bucket import argument_views, bring_forward
from autopar.schedule.splits import halves_of

_OPS = torch.ops.autopar
_GATHERS = {_OPS.all_gather.default, _OPS.all_gather_many.default}


def overlap_collectives(gm: fx.GraphModule) -> fx.GraphModule:
    """Split collectives in two: wait for reductions before their first use, and start gathers of
    arguments (weights) before the first use of the gather before them.

    So one gather at a time is under way, with its buffer; where a weight is gathered twice, along
    two axes, one along each.
    """
    graph = gm.graph
    replaced = []
    for node in list(graph.nodes):
        if node.target not in _GATHERS and halves_of(node) is not None:
            replaced += _wait_later(graph, node)
    replaced += _start_earlier(graph)
    for node in reversed(replaced):
        graph.erase_node(node)
    return gm


def _wait_later(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Split a reduction; returns what took no part in that."""
    parts: dict[fx.Node, None] = {node: None}  # what shows the result, in order
    uses: list[fx.Node] = []
    for n in graph.nodes:
        if any(source in parts for source in n.all_input_nodes):
            if is_view(n) or n.target is operator.getitem:
                parts[n] = None
            else:
                uses.append(n)
    if not uses:
        return []
    first = uses[0]
    _split(graph, node, node, first)
    for part in list(parts)[1:]:
        first.prepend(part)
    return [node]


def _start_earlier(graph: fx.Graph) -> list[fx.Node]:
    """Split gathers; returns what stood for them."""
    position = {n: k for k, n in enumerate(graph.nodes)}
    chains = _chains(graph)
    first = [min(chain[-1].users, key=position.__getitem__) for chain in chains]
    order = sorted(range(len(chains)), key=lambda k: position[first[k]])
    arguments = argument_views(graph)
    begin = next(n for n in graph.nodes if n not in arguments)
    # a gather that others follow in its chain is done before they start: one place ahead of them
    places = [first[k] for k in order]
    for at, k in enumerate(order):
        for lead, node in reversed(list(enumerate(reversed(chains[k])))):
            start = places[at - lead - 1] if at > lead else begin
            done = places[at - lead] if at >= lead else begin
            bring_forward(start, [n for n in node.all_input_nodes if n in arguments])
            _split(graph, node, start, done)
    return [node for chain in chains for node in chain]


def _chains(graph: fx.Graph) -> list[list[fx.Node]]:
    """Gathers of arguments, each behind the gathers whose result it gathers."""
    arguments = argument_views(graph)
    chains: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.target not in _GATHERS or not node.users or halves_of(node) is None:
            continue
        sources = node.all_input_nodes
        if len(sources) == 1 and sources[0] in chains and len(sources[0].users) == 1:
            chains[node] = [*chains.pop(sources[0]), node]
        elif arguments.issuperset(sources):
            chains[node] = [node]
    return list(chains.values())


def _split(graph: fx.Graph, node: fx.Node, begin: fx.Node, end: fx.Node) -> None:
    """A collective that starts before one node and is waited for before another one."""
    halves = halves_of(node)
    assert halves is not None
    target, finish = halves
    with graph.inserting_before(begin):
        start = add_call(graph, target, node.args)
    with graph.inserting_before(end):
        if finish is None:
            graph.call_function(_OPS.wait_in_place.default, (start,))
            result = start
        else:
            result = add_call(graph, finish[0], (start, *finish[1]))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
