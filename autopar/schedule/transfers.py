"""Copies to the host and back as operators of a joint graph, for schedules to choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import host_copies, offloaded_parameters  # noqa: F401  (define the operators)
from autopar.ir.graph import ModelGraph
from autopar.schedule.joint import JointProgram
from autopar.schedule.program import Op, Parameter, Program, Resource, Transfer

_OPS: Any = torch.ops.autopar

# of all that the backward needs, and of all parameters; the many small ones are not worth an
# operator each
_SMALLEST_SHARE = 1 / 1024


def large_parameters(graph: ModelGraph) -> dict[int, str]:
    """Names of parameters that may be worth moving, by their position among the arguments of the
    step: the same on all ranks, whose shards may be of different sizes."""
    nodes = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    nbytes = [nodes[placeholder].meta["val"].nbytes for placeholder in graph.parameters]
    smallest = _SMALLEST_SHARE * sum(nbytes)
    named = enumerate(zip(graph.parameters.values(), nbytes, strict=True))
    return {k: name for k, (name, size) in named if size > smallest}


def with_transfers(
    joint: JointProgram, graph: fx.Graph, cluster: ClusterInfo, parameters: Mapping[fx.Node, str]
) -> JointProgram:
    """The same, with the operators that move values between forward and backward, and parameters,
    to the host.

    Nothing runs them unless a schedule does. Without a `host_link` the cluster has no host.

    Args:
        graph: the joint graph; it gets their nodes.
        parameters: names of those that may leave, by their placeholders.
    """
    link = cluster.host_link
    program = joint.program
    if link is None:
        return joint
    ops, calls, nbytes = list(program.ops), list(joint.calls), list(program.nbytes)
    base, owner = dict(joint.base), dict(joint.owner)
    transfers: dict[int, Transfer] = {}
    leaving = _leaving(joint, parameters)
    for s in (*_movable(joint), *leaving):
        shard = leaving.get(s)
        out, gone, back = nodes = _calls(graph, owner[s], shard is not None)
        host = len(nbytes)
        nbytes.append(0)
        base[out], owner[host] = host, out
        if shard is None:
            base[back] = s
        module = _module(program, s)
        us = 1e6 * (link.alpha + link.beta * (program.nbytes[s] if shard is None else shard.nbytes))
        transfers[s] = Transfer(len(ops), len(ops) + 1, len(ops) + 2)
        moves: tuple[Op, ...] = (
            _op(out, (s,), (host,), us, module, Resource.HOST),
            _op(gone, (s, host), (), 0.0, module, Resource.COMPUTE),
            _op(back, (host,), (s,), us, module, Resource.HOST),
        )
        if shard is not None:
            names = (f"{shard.name} {what}" for what in ("to the host", "gone", "back"))
            moves = tuple(replace(op, name=name) for op, name in zip(moves, names, strict=True))
        ops += moves
        calls += nodes
    program = replace(
        program,
        ops=tuple(ops),
        nbytes=tuple(nbytes),
        order=program.backward,
        transfers=transfers,
        parameters=leaving,
        host_bytes=cluster.host_memory_bytes or math.inf,
    )
    return replace(joint, program=program, calls=tuple(calls), base=base, owner=owner)


def _calls(graph: fx.Graph, source: fx.Node, shard: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Out, gone, and back: of a value into a new storage, of a shard into its own."""
    value = source.meta["val"]
    with graph.inserting_before(graph.output_node()):
        out = graph.call_function(_OPS.offload.default, (source,))
        if shard:
            gone = graph.call_function(_OPS.evict.default, (source, out))
            back = graph.call_function(_OPS.prefetch.default, (source, out))
        else:
            gone = graph.call_function(_OPS.finish_offload.default, (source, out))
            back = graph.call_function(_OPS.reload.default, (out, value.device.type))
    made = {out: "cpu"} if shard else {out: "cpu", back: value.device.type}
    with value.fake_mode:
        for node, place in made.items():
            node.meta["val"] = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device=place
            )
    for node in (out, gone, back):
        node.meta["nn_module_stack"] = source.meta.get("nn_module_stack") or {}
    return out, gone, back


def _module(program: Program, s: int) -> str:
    """Of what makes a storage; of what reads a parameter first."""
    if s in program.forward_made:
        return program.ops[program.maker[s]].module
    return next(op.module for op in program.ops if s in op.reads)


def _leaving(joint: JointProgram, parameters: Mapping[fx.Node, str]) -> dict[int, Parameter]:
    """Parameters that the step reads and does not return, by their storages."""
    program = joint.program
    read = {s for op in program.ops for s in op.reads} - program.results - program.gradients
    return {
        joint.base[node]: Parameter(name, node.meta["val"].nbytes)
        for node, name in parameters.items()
        if joint.base[node] in read
    }


def _movable(joint: JointProgram) -> list[int]:
    """Storages between forward and backward that one tensor fills."""
    program = joint.program
    smallest = _SMALLEST_SHARE * sum(program.nbytes[s] for s in program.needed)
    found = []
    for s in sorted(program.needed - program.results):
        value = joint.owner[s].meta.get("val")
        if not isinstance(value, torch.Tensor) or program.nbytes[s] <= smallest:
            continue
        if value.numel() * value.element_size() == program.nbytes[s]:
            found.append(s)
    return found


def _op(
    node: fx.Node, reads: tuple[int, ...], makes: tuple[int, ...], us: float, module: str,
    resource: Resource,
) -> Op:  # fmt: skip
    return Op(
        node.name, str(node.target), reads, makes, 0.0, us,
        replays=False, carries=False, module=module, resource=resource,
        beside=resource is Resource.HOST,
    )  # fmt: skip
