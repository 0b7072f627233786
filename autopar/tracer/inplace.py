"""In-place operators replaced by their functional variants; final values of buffers as results.

If nothing else reads a value's storage, the write can create a new value instead. A buffer is read
after the program, so its last value becomes a result (`buffer_results`). Writes through views, into
parameters and into inputs do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument

from autopar.ir.guards import storage_of

aten = torch.ops.aten

# Values of buffers after the program, by placeholder.
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
    """Make in-place operators that write into intermediate values and buffers functional; returns
    the final values of buffers."""
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
        sharers = sharing.get(storage_of(target) or -1, [target, gm.graph.output_node()])
        others = [n for n in sharers if n not in (target, node) and order[n] < order[node]]
        seen_later = any(order[u] > order[node] for n in others for u in n.users)
        outside = [n for n in sharers if n.op != "call_function"]
        # all of the buffer, not a view of it, and its values, not its strides
        views = any(r.alias_info is not None for r in functional._schema.returns)
        entire = len(outside) == 1 and outside[0] in buffers and not views
        entire = entire and written.get(outside[0], outside[0]) is target
        args = _arguments(functional, node)
        if (outside and not entire) or seen_later:
            continue
        new = computed(functional, args, node.kwargs)
        if (new.shape, new.dtype) != (target.meta["val"].shape, target.meta["val"].dtype):
            continue
        node.target, node.args = functional, args
        for user in [u for u in target.users if order[u] > order[node]]:
            user.replace_input_with(target, node)
        if entire:
            written[outside[0]] = node
    return written


def write_back(gm: fx.GraphModule, written: Written) -> None:
    """Write the final values into the buffers at the end of the program."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        for buffer, value in written.items():
            copied = gm.graph.call_function(aten.copy_.default, (buffer, value))
            copied.meta = {**value.meta, "val": buffer.meta["val"]}


def buffer_results(
    program: torch.export.ExportedProgram, buffers: Mapping[fx.Node, str], written: Written
) -> None:
    """Return the final values of buffers, in the order of the buffers and before the results."""
    output = program.graph.output_node()
    final = [(name, written[buffer]) for buffer, name in buffers.items() if buffer in written]
    results = output.args[0]
    assert isinstance(results, tuple | list)
    output.args = ((*(value for _, value in final), *results),)
    program.graph_signature.output_specs[:0] = [
        OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), name)
        for name, value in final
    ]


def _functional_variant(node: fx.Node) -> Any:
    """The functional operator with the arguments of an in-place one; None if there is none."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or not op._schema.name.endswith("_"):
        return None
    if op is aten.bernoulli_.float:
        return aten.bernoulli.p
    packet = getattr(aten, op._opname[:-1], None)
    functional = getattr(packet, op._overloadname, None)
    if functional is None or functional._schema.is_mutable:
        return None
    names, functional_names = ([a.name for a in o._schema.arguments] for o in (op, functional))
    return functional if names == functional_names else None


def _arguments(functional: Any, node: fx.Node) -> tuple[Any, ...]:
    """Arguments for the functional variant, which may lack defaults that the in-place operator
    has."""
    op: Any = node.target
    pairs = zip(op._schema.arguments, functional._schema.arguments, strict=True)
    remaining = [(a, b) for a, b in pairs if a.name not in node.kwargs][len(node.args) :]
    missing = [a for a, b in remaining if a.has_default_value() and not b.has_default_value()]
    return (*node.args, *(a.default_value for a in missing))


def call_like(
    like: fx.Node, op: Any, args: tuple[Any, ...], kwargs: Any = None, name: str | None = None
) -> fx.Node:
    """A call at the graph's insertion point, with a node's metadata and a result of its own."""
    call = like.graph.create_node("call_function", op, args, kwargs or {}, name)
    call.meta = {**like.meta, "val": computed(op, args, kwargs or {})}
    return call


def computed(op: Any, args: Any, kwargs: Any) -> Any:
    """Result of an operator on the fake values of nodes."""
    args, kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    with torch.no_grad():
        return op(*args, **kwargs)
