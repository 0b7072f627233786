"""Splits a backward into gradients of inputs and of weights (zero bubble, arXiv:2401.10241).

The stage before waits for the gradients of this stage's inputs. Those of its weights can be
computed at any time until the optimizer's step, and fill what would be idle time.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch.fx as fx

from autopar.passes.subgraph import ancestors, subgraph


def split_backward(
    backward: fx.GraphModule, inputs: Collection[int]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Two graphs that together give what a backward gives.

    Args:
        inputs: positions of the gradients that come first.

    Returns:
        the first part, which takes what the backward takes and returns those gradients, in their
        order, and then what the second part takes; and the second part, which returns the other
        gradients.
    """
    outputs: list[Any] = list(backward.graph.output_node().args[0])  # type: ignore[arg-type]
    first = [x for k, x in enumerate(outputs) if k in inputs]
    second = [x for k, x in enumerate(outputs) if k not in inputs]
    early = ancestors(first)
    late = ancestors(second)
    nodes = list(backward.graph.nodes)
    own = {n for n in late if n not in early and n.op != "placeholder"}
    read = {n for node in own for n in node.all_input_nodes}
    read |= {x for x in second if isinstance(x, fx.Node)}
    kept = [n for n in nodes if n in read and n not in own]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    body = {n for n in early if n.op != "placeholder"}
    return (
        subgraph(backward, placeholders, body, [*first, *kept]),
        subgraph(backward, kept, own, second),
    )
