"""In-place operators as their functional variants, and what is written into buffers as results.

A value that nothing else sees may as well be computed anew. A buffer is seen after the program: its
last value becomes a result (`buffer_results`). Writes through views, into parameters and into
inputs are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from autopar.ir.guards import storage_of

aten = torch.ops.aten

# What buffers hold after the program, by placeholder.
Written = dict[fx.Node, fx.Node]


def buffers_of(program: torch.export.ExportedProgram) -> dict[fx.Node, str]:
    """The placeholders of buffers that share no storage with other inputs, and their names."""
    names = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.BUFFER
    }
    placeholders = program.graph.find_nodes(op="placeholder")
    storages = [storage_of(node) for node in placeholders]
    return {
        node: names[node.name]
        for node, storage in zip(placeholders, storages, strict=True)
        if node.name in names and storages.count(storage) == 1
    }


def out_of_place(gm: fx.GraphModule, buffers: Mapping[fx.Node, str]) -> Written:
    """Make in-place operators functional, where only values of the program's own and buffers are
    written; returns what buffers hold at the end."""
    nodes = list(gm.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for n in nodes:
        storage = storage_of(n)
        if storage is not None:
            sharing.setdefault(storage, []).append(n)
    written: Written = {}
    for node in nodes:
        functional = _functional_variant(node)
        if functional is None:
            continue
        target = node.args[0]
        assert isinstance(target, fx.Node)
        alike = sharing.get(storage_of(target) or -1, [target, gm.graph.output_node()])
        others = [n for n in alike if n not in (target, node) and order[n] < order[node]]
        seen_later = any(order[u] > order[node] for n in others for u in n.users)
        outside = [n for n in alike if n.op != "call_function"]
        # the buffer itself, not a view of it, and its values, not its strides
        whole = len(outside) == 1 and outside[0] in buffers and not _views(functional)
        whole = whole and written.get(outside[0], outside[0]) is target
        args = _arguments(functional, node)
        if (outside and not whole) or seen_later:
            continue
        made = computed(functional, args, node.kwargs)
        if (made.shape, made.dtype) != (target.meta["val"].shape, target.meta["val"].dtype):
            continue
        node.target, node.args = functional, args
        for user in [u for u in target.users if order[u] > order[node]]:
            user.replace_input_with(target, node)
        if whole:
            written[outside[0]] = node
    return written


def write_back(gm: fx.GraphModule, written: Written) -> None:
    """Write into the buffers after all, at the end of the program."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        for buffer, value in written.items():
            copied = gm.graph.call_function(aten.copy_.default, (buffer, value))
            copied.meta = dict(value.meta)
            copied.meta["val"] = buffer.meta["val"]


def buffer_results(
    program: torch.export.ExportedProgram, buffers: Mapping[fx.Node, str], written: Written
) -> None:
    """Return what was written into buffers, in the order of the buffers and before the results."""
    output = program.graph.output_node()
    kept = [(name, written[buffer]) for buffer, name in buffers.items() if buffer in written]
    results = output.args[0]
    assert isinstance(results, tuple | list)
    output.args = ((*(value for _, value in kept), *results),)
    program.graph_signature.output_specs[:0] = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), name)
        for name, value in kept
    ]


def _functional_variant(node: fx.Node) -> Any:
    """The functional operator of the same arguments, for an in-place one."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.name.endswith("_"):
        return None
    if op is aten.bernoulli_.float:
        return aten.bernoulli.p
    packet = getattr(aten, op._opname[:-1], None)
    found = getattr(packet, op._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    names, theirs = ([a.name for a in o._schema.arguments] for o in (op, found))
    return found if names == theirs else None


def _views(op: Any) -> bool:
    return any(r.alias_info is not None for r in op._schema.returns)


def _arguments(functional: Any, node: fx.Node) -> tuple[Any, ...]:
    """Of the functional variant, which may lack defaults that the operator in place has."""
    op: Any = node.target
    pairs = zip(op._schema.arguments, functional._schema.arguments, strict=True)
    left = [(a, b) for a, b in pairs if a.name not in node.kwargs][len(node.args) :]
    lacking = [a for a, b in left if a.has_default_value() and not b.has_default_value()]
    return (*node.args, *(a.default_value for a in lacking))


def computed(op: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives for the fake values of nodes."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        return op(*args, **kwargs)
