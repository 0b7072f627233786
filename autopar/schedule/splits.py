"""Collectives, and copies over the link to the host, as a start and a finish in a joint graph, for
schedules to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from autopar.comm import host_copies
from autopar.comm.async_collectives import numbers_of
from autopar.comm.functional import gathers_rows
from autopar.ir.fx_calls import add_call
from autopar.schedule.joint import Extension, JointProgram
from autopar.schedule.program import Op, Resource, Split

_OPS: Any = torch.ops.autopar

# The operator that finishes a collective, and its arguments after the buffer; None if the buffer
# becomes the result.
_Finish = tuple[Any, tuple[Any, ...]] | None


def _shape(node: fx.Node) -> Sequence[int]:
    return tuple(node.meta["val"].shape)


def _all_gather(node: fx.Node) -> tuple[Any, _Finish]:
    _, dim, size, _ = node.args
    if gathers_rows(dim):  # type: ignore[arg-type]
        return _OPS.start_gather_rows.default, None
    return _OPS.start_all_gather.default, (_OPS.finish_all_gather.default, (dim, size))


def _reduce_scatter(node: fx.Node) -> tuple[Any, _Finish]:
    x, dim, group = node.args
    finish = _OPS.finish_reduce_scatter.default
    return _OPS.start_reduce_scatter.default, (finish, (dim, _shape(x)[dim], group))  # type: ignore[arg-type, index]


def _all_gather_many(node: fx.Node) -> tuple[Any, _Finish]:
    _, dims, _, _ = node.args
    ranks, sizes = numbers_of([tuple(t.shape) for t in node.meta["val"]])
    finish = _OPS.finish_all_gather_many.default
    return _OPS.start_all_gather_many.default, (finish, (dims, ranks, sizes))


def _reduce_scatter_many(node: fx.Node) -> tuple[Any, _Finish]:
    xs, dims, group = node.args
    ranks, sizes = numbers_of([_shape(n) for n in xs])  # type: ignore[union-attr, arg-type]
    finish = _OPS.finish_reduce_scatter_many.default
    return _OPS.start_reduce_scatter_many.default, (finish, (dims, ranks, sizes, group))


SPLITS: dict[Any, Callable[[fx.Node], tuple[Any, _Finish]]] = {
    _OPS.all_reduce.default: lambda _: (_OPS.start_all_reduce.default, None),
    _OPS.all_gather.default: _all_gather,
    _OPS.reduce_scatter.default: _reduce_scatter,
    _OPS.exchange.default: lambda _: (_OPS.start_exchange.default, None),
    _OPS.all_reduce_many.default: lambda _: (_OPS.start_all_reduce_many.default, None),
    _OPS.all_gather_many.default: _all_gather_many,
    _OPS.reduce_scatter_many.default: _reduce_scatter_many,
}

# What starts a copy over the link to the host.
COPIES = {
    host_copies.FETCH: _OPS.reload.default,
    host_copies.STORE: _OPS.offload.default,
}


def halves_of(node: fx.Node) -> tuple[Any, _Finish] | None:
    """The operator that starts a collective, with the same arguments; and the one that finishes it,
    with its arguments after the buffer, or None if the buffer becomes the result.

    Returns:
        None if the collective cannot be split.
    """
    if node.target in COPIES:
        return COPIES[node.target], None
    if node.target not in SPLITS or _dtype(node) is torch.bool:
        return None
    return SPLITS[node.target](node)


def with_splits(joint: JointProgram, graph: fx.Graph) -> JointProgram:
    """The same, with two operators for each collective that may run beside compute.

    Args:
        graph: the joint graph; their nodes are added.
    """
    program = joint.program
    if Resource.COMMUNICATION not in program.beside:
        return joint
    extension = Extension(joint, graph)
    splits: dict[int, Split] = {}
    for i, (op, node) in enumerate(zip(program.ops, joint.calls, strict=True)):
        halves = halves_of(node) if op.replays else None
        if halves is None:
            continue
        target, finish = halves
        with graph.inserting_before(graph.output_node()):
            start = add_call(graph, target, node.args)
            if finish is None:
                buffer = extension.base[start] = op.makes[0]
                done = _waited(graph, node, start)
            else:
                nbytes = int(start.meta["val"].untyped_storage().nbytes())
                buffer = extension.storage(nbytes, start)
                done = add_call(graph, finish[0], (start, *finish[1]))
        if isinstance(done.meta.get("val"), torch.Tensor):
            extension.base[done] = op.makes[0]
        start_op = replace(
            op, name=start.name, kind=f"{target} {op.kind}", makes=(buffer,), beside=True
        )
        finish_op = Op(
            done.name, str(done.target),
            (*op.reads, buffer) if node.target is host_copies.STORE else (buffer,),
            () if finish is None else op.makes,
            0.0, 0.0, replays=False, carries=op.carries, module=op.module,
        )  # fmt: skip
        splits[i] = Split(
            extension.add(start, start_op, node), extension.add(done, finish_op, node)
        )
    return extension.extended(splits=splits)


def _waited(graph: fx.Graph, node: fx.Node, start: fx.Node) -> fx.Node:
    """What finishes a collective or a copy in the buffer itself. A store reads the copied value
    until then."""
    if node.target is host_copies.STORE:
        return graph.call_function(_OPS.finish_offload.default, (node.args[0], start))
    fetches = node.target is host_copies.FETCH
    wait = _OPS.finish_reload.default if fetches else _OPS.wait_in_place.default
    return graph.call_function(wait, (start,))


def _dtype(node: fx.Node) -> torch.dtype:
    value = node.meta["val"]
    return value.dtype if isinstance(value, torch.Tensor) else value[0].dtype
