"""Fast functionalization of programs that write into intermediate values and buffers only.

`ExportedProgram.run_decompositions({})` traces the program a second time to replace mutation, which
takes twice as long as the first trace. If a program writes into intermediate values and entire
buffers only, a few rewrites suffice: `inplace.py`, and the changes of that second trace to
operators that may alias or write into their input. Programs with other writes, with autocast, or
with an operator that is not known here are traced again.

`torch._decomp._should_decompose_because_unsafe_op` is private (tested with torch 2.13).
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Set
from typing import Any

import torch
import torch.fx as fx
from torch._decomp import _should_decompose_because_unsafe_op

from autopar.ir.guards import storage_of
from autopar.tracer.inplace import (
    Written,
    buffer_results,
    buffers_of,
    call_like,
    computed,
    out_of_place,
    write_back,
)

aten = torch.ops.aten

# The replacement of a node: another operator with its arguments, or an existing value.
_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
_Rewrite = Callable[[fx.Node], _Call | fx.Node]


def _cast(node: fx.Node) -> _Call | fx.Node:
    source, value = _operand(node), node.meta["val"]
    before = source.meta["val"]
    changes = {
        name: getattr(value, name)
        for name in ("dtype", "device")
        if getattr(before, name) != getattr(value, name)
    }
    return (aten._to_copy.default, (source,), changes) if changes else source


def _contiguous(node: fx.Node) -> _Call | fx.Node:
    source = _operand(node)
    if source.meta["val"].is_contiguous() and not node.kwargs:
        return source
    memory_format = node.kwargs.get("memory_format", torch.contiguous_format)
    return aten.clone.default, (source,), {"memory_format": memory_format}


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


def _to_shape(op: Any) -> _Rewrite:
    """The operator with the shape of the result for an argument."""
    return lambda node: (op, (node.args[0], list(node.meta["val"].shape)), {})


_reshape, _expand = _to_shape(aten.reshape.default), _to_shape(aten.expand.default)


def _batch_norm(node: fx.Node) -> _Call:
    """With batch statistics or running ones; `_update_statistics` writes the latter."""
    x, weight, bias, mean, var, training, momentum, eps, *_ = _arguments(node)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats, (x, weight, bias, True, momentum, eps), {}
    tensors = x, weight, bias, mean, var
    if training:
        return aten._native_batch_norm_legit_functional.default, (*tensors, True, momentum, eps), {}
    return aten._native_batch_norm_legit_no_training.default, (*tensors, momentum, eps), {}


def _narrow(node: fx.Node) -> _Call:
    source, dim, start, length = _arguments(node)
    return aten.slice.Tensor, (source, dim, start, start + length), {}


def _reversed_dims(node: fx.Node) -> _Call:
    return aten.permute.default, (node.args[0], list(range(node.meta["val"].ndim))[::-1]), {}


_REWRITES: dict[Any, _Rewrite] = {
    aten.to.dtype: _cast,
    aten.to.device: _cast,
    aten.to.dtype_layout: _cast,
    aten.to.other: _cast,
    aten.type_as.default: _cast,
    aten.contiguous.default: _contiguous,
    aten.dropout.default: _dropout,
    aten.batch_norm.default: _batch_norm,
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
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
_GRAD_REGION = "wrap_with_set_grad_enabled"
_ASSERTING = ("aten._assert", "aten.sym_constrain", "aten._local_scalar_dense", "aten.item")


def _arguments(node: fx.Node) -> Any:
    return node.args


def _operand(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def make_functional(program: torch.export.ExportedProgram) -> bool:
    """Rewrite a program that writes into intermediate values and buffers only; buffers become
    results.

    False if the program may write into more. It then computes the same, with a few operators
    replaced by their functional variants.
    """
    gm = program.graph_module
    buffers = buffers_of(program)
    written = out_of_place(gm, buffers)
    sharing = Counter(map(storage_of, gm.graph.nodes))
    alone = {buffer for buffer in buffers if sharing[storage_of(buffer)] == 1}
    if not all(_known(gm, node, alone) for node in gm.graph.nodes):
        write_back(gm, written)
        return False
    _inline(gm)
    statistics: Written = {}
    for node in list(gm.graph.nodes):
        for old in node.all_input_nodes:
            if old in statistics:
                node.replace_input_with(old, statistics[old])
        rewrite = _REWRITES.get(node.target)
        if node.op != "call_function" or rewrite is None:
            continue
        new = rewrite(node)
        if not isinstance(new, fx.Node):
            target, args, kwargs = new
            with gm.graph.inserting_before(node):
                new = gm.graph.create_node("call_function", target, args, kwargs, target._opname)
                new.meta = dict(node.meta)
                if len(target._schema.returns) > 1:
                    new.meta["val"] = (node.meta["val"], *computed(target, args, kwargs)[1:])
                    new = _item(new, 0)
                if target is aten._native_batch_norm_legit_functional.default:
                    _update_statistics(new, statistics)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
    buffer_results(program, buffers, written | statistics)
    return True


def _item(node: fx.Node, index: int) -> fx.Node:
    return call_like(node, operator.getitem, (node, index))


def _update_statistics(result: fx.Node, statistics: Written) -> None:
    """Replace the buffers that a batch norm writes into by its new statistics."""
    norm = _operand(result)
    buffers = {value: buffer for buffer, value in statistics.items()}
    for old, new in zip(norm.args[3:5], (_item(norm, 3), _item(norm, 4)), strict=True):
        assert isinstance(old, fx.Node)
        dtype = old.meta["val"].dtype
        if new.meta["val"].dtype != dtype:
            new = call_like(new, aten._to_copy.default, (new,), {"dtype": dtype})
        statistics[buffers.get(old, old)] = new


def _known(gm: fx.GraphModule, node: fx.Node, alone: Set[fx.Node]) -> bool:
    """Whether a node mutates nothing and the rewrites here equal those of the second trace.

    Args:
        alone: buffers that share no storage; a batch norm may write into these.
    """
    if node.op != "call_function" or node.target is operator.getitem:
        return node.op in ("placeholder", "output", "get_attr", "call_function")
    op = node.target
    if str(op) == _GRAD_REGION:
        body = getattr(gm, str(node.args[1].target))  # type: ignore[union-attr]
        return all(_known(body, n, frozenset()) for n in body.graph.nodes)
    if isinstance(node.meta.get("val"), torch.Tensor) and storage_of(node) is None:
        return False
    if isinstance(node.meta.get("val"), _SYMBOLS):
        return True
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return str(op).startswith(_ASSERTING)
    if op is aten.batch_norm.default:
        mean, var, training = _arguments(node)[3:6]
        if mean is None or var is None:
            return mean is var and training
        return not training or (mean is not var and {mean, var} <= alone)
    if op in _REWRITES or not op._can_decompose():
        return True
    aliases = any(a.alias_info is not None for a in op._schema.arguments)
    return not aliases and not _should_decompose_because_unsafe_op(op)


def _inline(gm: fx.GraphModule) -> None:
    """Inline the bodies of grad-mode regions, which are detached already."""
    for node in list(gm.graph.nodes):
        if str(node.target) != _GRAD_REGION:
            continue
        body = getattr(gm, str(node.args[1].target))
        _inline(body)
        arguments = dict(zip(body.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
        with gm.graph.inserting_before(node):
            results: Any = gm.graph.graph_copy(body.graph, arguments)
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
