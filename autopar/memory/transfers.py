"""Copies to the host and back as operators of a joint graph, for schedules to choose."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.fx as fx

from autopar.memory.joint import Joint
from autopar.memory.program import Op, Resource, Transfer
from autopar.profiler.cluster import ClusterInfo
from autopar.runtime import offload  # noqa: F401  (defines the operators)

# of all that the backward needs; the many small values are not worth an operator each
_SMALLEST_SHARE = 1 / 1024


def with_transfers(joint: Joint, graph: fx.Graph, cluster: ClusterInfo) -> Joint:
    """The same, with the operators that move values between forward and backward to the host.

    Nothing runs them unless a schedule does. Without a `host_link` the cluster has no host.

    Args:
        graph: the joint graph; it gets their nodes.
    """
    link = cluster.host_link
    program = joint.program
    if link is None:
        return joint
    ops, calls, nbytes = list(program.ops), list(joint.calls), list(program.nbytes)
    base, owner = dict(joint.base), dict(joint.owner)
    transfers: dict[int, Transfer] = {}
    call = torch.ops.autopar
    for s in _movable(joint):
        source = owner[s]
        value = source.meta["val"]
        us = 1e6 * (link.alpha + link.beta * program.nbytes[s])
        host, module = len(nbytes), program.ops[program.maker[s]].module
        nbytes.append(0)
        with graph.inserting_before(graph.output_node()):
            out = graph.call_function(call.to_host.default, (source,))
            gone = graph.call_function(call.left.default, (source, out))
            device = value.device.type
            back = graph.call_function(call.to_device.default, (out, device))
        for node, place in ((out, "cpu"), (back, device)):
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=place
                )
        for node in (out, gone, back):
            node.meta["nn_module_stack"] = source.meta.get("nn_module_stack") or {}
        base |= {out: host, back: s}
        owner[host] = out
        first = len(ops)
        ops += [
            _op(out, (s,), (host,), us, module, Resource.HOST),
            _op(gone, (s, host), (), 0.0, module, Resource.COMPUTE),
            _op(back, (host,), (s,), us, module, Resource.HOST),
        ]
        calls += [out, gone, back]
        transfers[s] = Transfer(first, first + 1, first + 2)
    program = replace(
        program,
        ops=tuple(ops),
        nbytes=tuple(nbytes),
        order=program.backward,
        transfers=transfers,
        host_bytes=cluster.host_memory_bytes or math.inf,
    )
    return replace(joint, program=program, calls=tuple(calls), base=base, owner=owner)


def _movable(joint: Joint) -> list[int]:
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
