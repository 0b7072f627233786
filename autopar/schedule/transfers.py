"""Copies to the host and back as operators of a joint graph, for schedules to use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import host_copies, offloaded_parameters  # noqa: F401  (define the operators)
from autopar.ir.graph import ModelGraph
from autopar.schedule.joint import Extension, JointProgram
from autopar.schedule.program import Op, Parameter, Program, Resource, Transfer

_OPS: Any = torch.ops.autopar

# of all that the backward needs, and of all parameters; smaller ones are not worth the operators
_SMALLEST_SHARE = 1 / 1024


def large_parameters(graph: ModelGraph) -> dict[int, str]:
    """Names of parameters that may be worth offloading, by their position among the step's
    arguments: the same on all ranks, whose shards may be of different sizes."""
    nodes = graph.placeholders
    nbytes = [
        nodes[placeholder].meta["val"].numel() * graph.storage_dtype(placeholder).itemsize
        for placeholder in graph.parameters
    ]
    smallest = _SMALLEST_SHARE * sum(nbytes)
    named = enumerate(zip(graph.parameters.values(), nbytes, strict=True))
    return {k: name for k, (name, size) in named if size > smallest}


def with_transfers(
    joint: JointProgram, graph: fx.Graph, cluster: ClusterInfo, parameters: Mapping[fx.Node, str]
) -> JointProgram:
    """The same, with the operators that offload and reload parameters, and values between forward
    and backward. Without a `host_link` the cluster has no host.

    Args:
        graph: the joint graph; their nodes are added.
        parameters: names of those that may be offloaded, by their placeholders.
    """
    link = cluster.host_link
    if link is None:
        return joint
    program, extension = joint.program, Extension(joint, graph)
    transfers: dict[int, Transfer] = {}
    shards = _shards(joint, parameters)
    for s in (*_offloadable(joint), *shards):
        source, shard = joint.owner[s], shards.get(s)
        nodes = out, _, back = _calls(graph, source, shard is not None)
        host = extension.storage(0, out)
        if shard is None:
            extension.base[back] = s
        us = 1e6 * (link.alpha + link.beta * (program.nbytes[s] if shard is None else shard.nbytes))
        module = _module(program, s)
        moves = (
            ("to the host", (s,), (host,), us, Resource.HOST),
            ("evicted", (s, host), (), 0.0, Resource.COMPUTE),
            ("reloaded", (host,), (s,), us, Resource.HOST),
        )
        indices = []
        for node, (move, reads, makes, op_us, resource) in zip(nodes, moves, strict=True):
            op = Op(
                node.name if shard is None else f"{shard.name} {move}", str(node.target),
                reads, makes, 0.0, op_us, replays=False, carries=False, module=module,
                resource=resource, beside=resource is Resource.HOST,
            )  # fmt: skip
            indices.append(extension.add(node, op, source))
        transfers[s] = Transfer(*indices)
    return extension.extended(
        transfers=transfers, parameters=shards, host_bytes=cluster.host_memory_bytes or math.inf
    )


def _calls(graph: fx.Graph, source: fx.Node, shard: bool) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Offload, evict and reload: a value into a new storage, a shard into its own."""
    value = source.meta["val"]
    with graph.inserting_before(graph.output_node()):
        out = graph.call_function(_OPS.offload.default, (source,))
        if shard:
            evict = graph.call_function(_OPS.evict.default, (source, out))
            back = graph.call_function(_OPS.prefetch.default, (source, out))
        else:
            evict = graph.call_function(_OPS.finish_offload.default, (source, out))
            back = graph.call_function(_OPS.reload.default, (out, value.device.type))
    results = {out: "cpu"} if shard else {out: "cpu", back: value.device.type}
    with value.fake_mode:
        for node, place in results.items():
            node.meta["val"] = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device=place
            )
    return out, evict, back


def _module(program: Program, s: int) -> str:
    """The module that makes a value, or reads a parameter first."""
    if s in program.forward_storages:
        return program.ops[program.maker[s]].module
    return next(op.module for op in program.ops if s in op.reads)


def _shards(joint: JointProgram, parameters: Mapping[fx.Node, str]) -> dict[int, Parameter]:
    """Parameters that the step reads and does not return, by their storages."""
    program = joint.program
    read = {s for op in program.ops for s in op.reads} - program.results - program.gradients
    return {
        joint.base[node]: Parameter(name, node.meta["val"].nbytes)
        for node, name in parameters.items()
        if joint.base[node] in read
    }


def _offloadable(joint: JointProgram) -> list[int]:
    """Storages between forward and backward that are filled by one tensor."""
    program = joint.program
    smallest = _SMALLEST_SHARE * sum(program.nbytes[s] for s in program.needed)
    storages = []
    for s in sorted(program.needed - program.results):
        value = joint.owner[s].meta.get("val")
        if not isinstance(value, torch.Tensor) or program.nbytes[s] <= smallest:
            continue
        if value.numel() * value.element_size() == program.nbytes[s]:
            storages.append(s)
    return storages
