"""Adds operator calls to graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx as fx


def add_call(graph: fx.Graph, target: Any, arguments: Sequence[Any]) -> fx.Node:
    """A call at the graph's insertion point, with its result on fake tensors in `meta["val"]`."""
    node = graph.call_function(target, tuple(arguments))
    values = fx.node.map_arg(tuple(arguments), lambda n: n.meta["val"])
    first = next(v for n in node.all_input_nodes if (v := n.meta["val"]) is not None)
    with first.fake_mode:
        node.meta["val"] = target(*values)
    return node
