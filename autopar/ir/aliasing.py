"""Which values of a graph share memory, and what may be overwritten, by operators' schemas."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

# What made it, and the number of the result; None where that is not known.
Storage = tuple[fx.Node, Any] | None

# Not pointwise, but row by row: a row is read to its end before it is written, and the second pass
# over it reads an element before it writes that (SoftMaxKernel.cpp and SoftMax.cu in ATen/native;
# tests/gpu holds the latter to it). They write into contiguous memory, whatever the strides of the
# result argument say.
_BY_ROWS = {
    aten._log_softmax.default,
    aten._log_softmax_backward_data.default,
    aten._softmax.default,
    aten._softmax_backward_data.default,
}
# Copies of an operand, of which the index says which elements are other ones.
_WRITE_AT_INDEX = {
    aten.index_copy.default: aten.index_copy_.default,
    aten.scatter_add.default: aten.scatter_add_.default,
}
# In-place variants without a kernel of their own that are truly in place.
_COMPOSITE = {"aten::add_.Scalar", "aten::sub_.Scalar", "aten::mul_.Scalar", "aten::div_.Scalar"}

# Whose results are views although their schema does not say so. Lowered graphs have `reshape` and
# `contiguous` only of what shows its operand by its fake (`passes/any_strides.py`).
_SHOW_UNSAID = {
    aten._unsafe_view.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default,
    aten.contiguous.default, aten.reshape.default,
}  # fmt: skip


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a value."""
    return [x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def is_view(node: fx.Node) -> bool:
    """Whether a node's result is a view of its operand, by its schema."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


@functools.cache
def variant(target: Any, operand: int, device_type: str) -> tuple[Any, str | None] | None:
    """How an operator writes over an operand: the overload, and the name of its result argument
    (None where the operand is the first, which is overwritten as such).

    Args:
        operand: position among the arguments.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if len(target._schema.returns) != 1 or target._schema.is_mutable:
        return None
    by_rows = target in _BY_ROWS
    if target in _WRITE_AT_INDEX:
        return (_WRITE_AT_INDEX[target], None) if operand == 0 else None
    if not by_rows and torch.Tag.pointwise not in target.tags:
        return None
    if operand == 0 and not by_rows:
        in_place = getattr(getattr(aten, f"{target._opname}_", None), target._overloadname, None)
        if in_place is not None and _has_kernel(in_place, device_type):
            return in_place, None
    arguments = [(a.name, str(a.type)) for a in target._schema.arguments]
    for name in target.overloadpacket.overloads():
        other = getattr(target.overloadpacket, name)
        outs = [a.name for a in other._schema.arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in other._schema.arguments if not a.is_out]
        if others == arguments and len(outs) == 1 and _has_kernel(other, device_type):
            return other, outs[0]
    return None


def writes_by_rows(target: Any) -> bool:
    """Whether an operator's result argument must be contiguous."""
    return target in _BY_ROWS


def _has_kernel(op: torch._ops.OpOverload, device_type: str) -> bool:
    """Of its own: those that are generated from the functional one make a copy."""
    name = op.name()
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return False
    return name in _COMPOSITE or torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def overwritable(node: fx.Node) -> list[fx.Node]:
    """Operands in whose place the result of a node fits: of its dtype, shape and strides, and
    filling their storage."""
    values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args]
    positions = overwritable_arguments(node.target, values, node.meta.get("val"))
    if node.target in _WRITE_AT_INDEX:  # reads the rest of its arguments while it writes
        positions = [k for k in positions if node.args.count(node.args[k]) == 1]
    return [node.args[k] for k in positions]  # type: ignore[misc]


def overwritable_arguments(target: Any, values: Sequence[Any], out: Any) -> list[int]:
    """The same for a call with these arguments and this result: positions."""
    if not isinstance(out, torch.Tensor) or (target in _BY_ROWS and not out.is_contiguous()):
        return []

    def fits(value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and (value.dtype, value.shape, value.stride()) == (out.dtype, out.shape, out.stride())
            and value.numel() > 1
            and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        )

    return [
        k
        for k, value in enumerate(values)
        if fits(value) and variant(target, k, out.device.type) is not None
    ]


def storages(graph: fx.Graph) -> dict[fx.Node, Storage]:
    """The storage that every node lies in, by the schemas of operators: a result is a view of an
    argument, or has memory of its own."""
    storage: dict[fx.Node, Storage] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            storage[node] = (node, 0)
        elif node.target is operator.getitem:
            of, number = node.args
            storage[node] = (of, number) if storage[of] == (of, 0) else storage[of]
        elif not isinstance(node.target, torch._ops.OpOverload):
            storage[node] = None
        elif shown := _shown(node):
            storage[node] = storage[shown]
        else:
            storage[node] = None if _is_composite(node.target) else (node, 0)
    return storage


def _shown(node: fx.Node) -> fx.Node | None:
    """The argument that the results of an operator are views of."""
    target: Any = node.target
    if target in _SHOW_UNSAID:
        return node.args[0]  # type: ignore[return-value]
    if not any(result.alias_info for result in target._schema.returns):
        return None
    declared = {a.name: a for a in target._schema.arguments}
    arguments = dict(zip(declared, node.args, strict=False)) | node.kwargs
    value = next(value for name, value in arguments.items() if declared[name].alias_info)
    return value if isinstance(value, fx.Node) else None  # a number has no memory


def _is_named(node: fx.Node, name: str) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name == name


@functools.cache
def _is_composite(target: torch._ops.OpOverload) -> bool:
    """Made of other operators alone; such may return an argument itself (dropout)."""
    has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, target.name())
    return has_kernel("CompositeImplicitAutograd") and not has_kernel("CPU")


def last_writers(graph: fx.Graph, where: Mapping[fx.Node, Storage]) -> dict[Storage, fx.Node]:
    """The last node that writes to each storage after it was made. A wait counts as one: what a
    collective has started to write may not be read before it.

    Args:
        where: `storages` of the graph.
    """
    last: dict[Storage, fx.Node] = {}
    for node in graph.nodes:
        last |= {where[n]: node for n in _written(node)}
    return last


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an operator writes to."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    declared = {a.name: a for a in target._schema.arguments}
    arguments = dict(zip(declared, node.args, strict=False)) | node.kwargs
    written: list[fx.Node] = []
    for name, value in arguments.items():
        alias = declared[name].alias_info
        if alias is not None and alias.is_write:
            written += [n for n in pytree.tree_leaves(value) if isinstance(n, fx.Node)]
    return written


class Lifetimes(NamedTuple):
    """When storages of a graph end.

    Args:
        where: the storage of each node.
        last: the last node that reads a storage.
        held: storages that outlive their readers: results, and what nothing is known of reads them.
    """

    where: Mapping[fx.Node, Storage]
    last: Mapping[Storage, fx.Node]
    held: frozenset[Storage]


def lifetimes(graph: fx.Graph) -> Lifetimes:
    """The lifetimes of all storages of a graph. An exchange reads what it sends until it is waited
    for; other collectives send copies."""
    where = storages(graph)
    last: dict[Storage, fx.Node] = {}
    held: set[Storage] = set()
    sent: dict[Storage, set[Storage]] = {}
    for node in graph.nodes:
        read = {where[n] for n in node.all_input_nodes}
        if _is_named(node, "autopar::start_exchange"):
            sent[where[node]] = read
        elif sent and _is_named(node, "autopar::wait_in_place"):
            read = read.union(*(sent.get(s, ()) for s in read))
        last |= dict.fromkeys(read, node)
        if where[node] is None or node.op == "output":
            held |= read
    return Lifetimes(where, last, frozenset(held))
