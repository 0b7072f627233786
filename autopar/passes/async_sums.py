"""Small sums over ranks that nothing waits for where they stand. Each would be a point at which all
ranks wait for the slowest, whatever its size.

Both passes work on the joint graph, before it is split.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from autopar.comm.cost import ASYNC_SUM_BYTES, communicates
from autopar.comm.groups import group_of_all
from autopar.ir.fx_calls import add_call
from autopar.ir.randomness import draws

_OPS = torch.ops.autopar
# Operators that may compute the operand of an early sum.
_FEW = 16


def returned_sums(gm: fx.GraphModule, *, results: int) -> fx.GraphModule:
    """Sum what is only returned (the loss) once over all ranks, not along axis after axis. The
    first `results` outputs are the model's; gradients follow, whose sums go into buckets."""
    output = gm.graph.output_node()
    outputs: Any = output.args[0]
    for node in outputs[:results]:
        if _is_small_sum(node) and set(node.users) == {output}:
            operand, group = _over_all(node)
            with gm.graph.inserting_before(node):
                start = add_call(
                    gm.graph, _OPS.start_all_reduce.default, (operand, node.args[1], group)
                )
                done = add_call(gm.graph, _OPS.finish_all_reduce.default, (start,))
            _replace(node, done)
    return gm


def early_sums(gm: fx.GraphModule) -> fx.GraphModule:
    """Start sums of arguments (the count of targets) with the program."""
    graph = gm.graph
    for node in reversed([n for n in graph.nodes if _is_small_sum(n)]):
        operand, group = _over_all(node)
        computation = _computation(operand) if node.users else None
        if computation is None:
            continue
        begin = next(n for n in graph.nodes if n.op != "placeholder" and n not in computation)
        for n in computation:
            begin.prepend(n)
        with graph.inserting_before(begin):
            start = add_call(graph, _OPS.start_all_reduce.default, (operand, node.args[1], group))
            start.meta = {**node.meta, "val": start.meta["val"]}
        with graph.inserting_before(node):
            _replace(node, add_call(graph, _OPS.finish_all_reduce.default, (start,)))
    return gm


def _is_small_sum(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not _OPS.all_reduce.default:
        return False
    value = node.meta["val"]
    return (
        value.dtype is not torch.bool
        and 0 < value.numel() * value.element_size() <= ASYNC_SUM_BYTES
    )


def _over_all(node: fx.Node) -> tuple[Any, str]:
    """The operand and the group of a sum. Sums over one axis after the other, of all axes of a
    mesh, are one sum over all ranks."""
    chain: list[Any] = [node]
    while _is_small_sum(before := chain[-1].args[0]) and len(before.users) == 1:
        chain.append(before)
    group = group_of_all([str(n.args[2]) for n in chain])
    if group is None or len({n.args[1] for n in chain}) > 1:
        return node.args[0], str(node.args[2])
    return chain[-1].args[0], group


def _computation(value: fx.Node) -> list[fx.Node] | None:
    """The operators that compute a value from arguments, in order; None if they are many,
    communicate or draw random numbers."""
    operators: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node in operators or (node.op == "placeholder" and "tangents" not in str(node.target)):
            continue
        if (
            node.op == "placeholder"
            or communicates(node)
            or draws(node)
            or node.is_impure()
            or len(operators) == _FEW
        ):
            return None
        operators.add(node)
        stack += node.all_input_nodes
    return [n for n in value.graph.nodes if n in operators]


def _replace(node: fx.Node, new: fx.Node) -> None:
    """Replace a sum, and erase it with the sums that only it read."""
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(new)
    unused: Any = node
    while _is_small_sum(unused) and not unused.users:
        unused.graph.erase_node(unused)
        unused = unused.args[0]
