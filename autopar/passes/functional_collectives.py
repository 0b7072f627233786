"""Write collectives as `torch.ops._c10d_functional` operators with `wait_tensor`.

Up to here an operator of `autopar.comm` stands for each collective with its padding and layout, so
that buckets and schedules move one node. In the graphs that run, its implementation takes its
place, so that Inductor, profilers and flight recorders see the collectives they know.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from autopar.comm.implementations import call_key, implementation
from autopar.comm.operators import IMPLEMENTATIONS

_WAIT = torch.ops._c10d_functional.wait_tensor.default
_WAIT_IN_PLACE = "autopar.wait_in_place.default"


def functional_collectives(gm: fx.GraphModule, *, mutate: bool = True) -> fx.GraphModule:
    """Replace every collective by its implementation. Works in place.

    Args:
        mutate: let a collective write to its own buffer, which saves a copy; Inductor's graphs may
            not.
    """
    known: dict[Any, fx.Graph] = {}  # equal calls, of repeated blocks, are written once
    for node in list(gm.graph.nodes):
        if node.target not in IMPLEMENTATIONS:
            continue
        if str(node.target) == _WAIT_IN_PLACE:
            _wait_in_place(node)
            continue
        key = call_key(node)
        if key not in known:
            known[key] = implementation(node, mutate=mutate)
        _inline(node, known[key])
    return gm


def _inline(node: fx.Node, body: fx.Graph) -> None:
    """Replace a node by a graph; its result takes over the metadata of the node."""
    placeholders = body.find_nodes(op="placeholder")
    env = dict(zip(placeholders, node.all_input_nodes, strict=True))
    with node.graph.inserting_before(node):
        for inner in body.nodes:
            if inner.op == "call_function":
                env[inner] = node.graph.node_copy(inner, lambda n: env[n])
    (result,) = body.output_node().args
    if isinstance(result, fx.Node):
        new = env[result]
        if new.op == "call_function":
            new.meta = _described(node)
        node.replace_all_uses_with(new)
    else:  # several results, which `getitem`s take apart
        for user in list(node.users):
            _, k = user.args
            new = env[result[k]]  # type: ignore[index]
            new.meta = _described(user)
            user.replace_all_uses_with(new)
            user.graph.erase_node(user)
    node.graph.erase_node(node)


def _described(node: fx.Node) -> dict[str, Any]:
    """The metadata of a node, but for what describes its operator."""
    return {k: v for k, v in node.meta.items() if k != "makes"}


def _wait_in_place(node: fx.Node) -> None:
    """What reads the buffer after the wait reads the wait's result."""
    (buffer,) = node.args
    position = {n: k for k, n in enumerate(node.graph.nodes)}
    with node.graph.inserting_before(node):
        done = node.graph.call_function(_WAIT, (buffer,))
    done.meta = dict(buffer.meta)  # type: ignore[union-attr]
    buffer.replace_all_uses_with(  # type: ignore[union-attr]
        done,
        delete_user_cb=lambda user: user is not done and position.get(user, -1) > position[node],
    )
    node.graph.erase_node(node)
