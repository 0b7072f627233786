"""The quick way to a functional graph, for programs that mutate nothing.

`ExportedProgram.run_decompositions({})` traces the whole program a second time to turn mutation
into values, which doubles the time of a capture. A program without mutation needs a few rewrites
only: what that second trace does to operators that may or may not alias their input. Programs with
mutation, with autocast, or with an operator that is not known here, take the long way.

`torch._decomp._should_decompose_because_unsafe_op` is private (tested with torch 2.13).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._decomp import _should_decompose_because_unsafe_op

from autopar.tracer.guards import storage_of

aten = torch.ops.aten

# What stands for a node: another operator with its arguments, or the value itself.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
_Rewrite = Callable[[fx.Node], _Call | fx.Node]


def _cast(node: fx.Node) -> _Call | fx.Node:
    source, value = _operand(node), node.meta["val"]
    given = source.meta["val"]
    wanted: dict[str, Any] = {}
    if given.dtype != value.dtype:
        wanted["dtype"] = value.dtype
    if given.device != value.device:
        wanted["device"] = value.device
    return (aten._to_copy.default, (source,), wanted) if wanted else source


def _contiguous(node: fx.Node) -> _Call | fx.Node:
    source = _operand(node)
    if source.meta["val"].is_contiguous() and not node.kwargs:
        return source
    kept = node.kwargs.get("memory_format", torch.contiguous_format)
    return aten.clone.default, (source,), {"memory_format": kept}


def _dropout(node: fx.Node) -> _Call | fx.Node:
    source, p, train = node.args
    if not train or p == 0:
        return _operand(node)
    return aten.native_dropout.default, (source, p, True), {}


def _chunk(node: fx.Node) -> _Call:
    source, chunks, *rest = _arguments(node)
    dim = rest[0] if rest else node.kwargs.get("dim", 0)
    size = math.ceil(source.meta["val"].shape[dim] / chunks)
    return aten.split.Tensor, (source, size, dim), {}


def _reshape(node: fx.Node) -> _Call:
    return aten.reshape.default, (node.args[0], list(node.meta["val"].shape)), {}


def _expand(node: fx.Node) -> _Call:
    return aten.expand.default, (node.args[0], list(node.meta["val"].shape)), {}


def _narrow(node: fx.Node) -> _Call:
    source, dim, start, length = _arguments(node)
    return aten.slice.Tensor, (source, dim, start, start + length), {}


def _reversed_dims(node: fx.Node) -> _Call:
    dims = list(reversed(range(node.meta["val"].ndim)))
    return aten.permute.default, (node.args[0], dims), {}


_REWRITES: dict[Any, _Rewrite] = {
    aten.to.dtype: _cast,
    aten.to.device: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.other: _cast,
    aten.type_as.default: _cast,
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _dropout,
    aten.chunk.default: _chunk,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.reshape.default: _reshape,
    aten.reshape_as.default: _reshape,
    aten.view_as.default: _reshape,
    aten.expand_as.default: _expand,
    aten.narrow.default: _narrow,
    aten.numpy_T.default: _reversed_dims,
    aten.lift_fresh_copy.default: lambda node: (aten.clone.default, node.args, {}),
}
_GRAD_REGION = "wrap_with_set_grad_enabled"
_ASSERTING = ("aten._assert", "aten.sym_constrain", "aten._local_scalar_dense", "aten.item")


def _arguments(node: fx.Node) -> Any:
    return node.args


def _operand(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def make_functional(gm: fx.GraphModule) -> bool:
    """Rewrite a program that mutates nothing but values of its own; False if it may do more, and
    then it is as it was but for a few operators out of place."""
    _out_of_place(gm)
    if not all(_known(gm, node) for node in gm.graph.nodes):
        return False
    _inline(gm)
    for node in list(gm.graph.nodes):
        rewrite = _REWRITES.get(node.target)
        if node.op != "call_function" or rewrite is None:
            continue
        made = rewrite(node)
        if not isinstance(made, fx.Node):
            target, args, kwargs = made
            with gm.graph.inserting_before(node):
                made = gm.graph.create_node("call_function", target, args, kwargs, target._opname)
                made.meta = dict(node.meta)
                if target is aten.native_dropout.default:
                    value = node.meta["val"]
                    made.meta["val"] = (value, torch.empty_like(value, dtype=torch.bool))
                    first = gm.graph.call_function(operator.getitem, (made, 0))
                    first.meta = dict(node.meta)
                    made = first
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.recompile()
    return True


def _out_of_place(gm: fx.GraphModule) -> None:
    """In-place operators on values that nothing else sees, as their functional variants."""
    nodes = list(gm.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for n in nodes:
        storage = storage_of(n)
        if storage is not None:
            sharing.setdefault(storage, []).append(n)
    for node in nodes:
        functional = _functional_variant(node)
        if functional is None:
            continue
        target = _operand(node)
        alike = sharing.get(storage_of(target) or -1, [target, gm.graph.output_node()])
        others = [n for n in alike if n not in (target, node) and order[n] < order[node]]
        seen_later = any(order[u] > order[node] for n in others for u in n.users)
        outside = any(n.op != "call_function" for n in alike)
        if outside or seen_later or target.meta["val"].shape != node.meta["val"].shape:
            continue
        node.target = functional
        for user in [u for u in target.users if order[u] > order[node]]:
            user.replace_input_with(target, node)


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


def _known(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node mutates nothing and is treated here as the long way treats it."""
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "output", "get_attr", "call_function")
    op = node.target
    if str(op) == _GRAD_REGION:
        body = getattr(gm, str(node.args[1].target))  # type: ignore[union-attr]
        return all(_known(body, n) for n in body.graph.nodes)
    if isinstance(node.meta.get("val"), torch.Tensor) and storage_of(node) is None:
        return False
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return str(op).startswith(_ASSERTING)
    if op in _REWRITES or not op._can_decompose():
        return True
    aliases = any(a.alias_info is not None for a in op._schema.arguments)
    return not aliases and not _should_decompose_because_unsafe_op(op)


def _inline(gm: fx.GraphModule) -> None:
    """Put the bodies of grad-mode regions (detached already) where they are called."""
    for node in list(gm.graph.nodes):
        if str(node.target) != _GRAD_REGION:
            continue
        body = getattr(gm, str(node.args[1].target))
        _inline(body)
        given = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
        with gm.graph.inserting_before(node):
            results: Any = gm.graph.graph_copy(body.graph, given)
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
