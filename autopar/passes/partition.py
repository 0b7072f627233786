"""The partition functions that AOTAutograd calls: what forward hands to backward.

`partition` keeps what eager autograd would keep, except gathered copies of the parameters that the
plan gathers again (ZeRO-3): the gather and the views on it move into the backward.
`partition_within` keeps and computes again what fits a budget (`autopar/memory`).
"""

from __future__ import annotations

import functools
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import collectives  # noqa: F401  (defines the operators)
from autopar.ir.aliasing import is_view
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.async_sums import early_sums, late_results
from autopar.passes.bucket import bucket_collectives
from autopar.passes.drop_views import drop_views
from autopar.passes.runner import Pass, run_passes
from autopar.schedule.joint import read_joint
from autopar.schedule.program import Program, Schedule
from autopar.schedule.realize import realize
from autopar.schedule.simulate import check
from autopar.schedule.splits import with_splits
from autopar.schedule.transfers import with_transfers

log = logging.getLogger(__name__)

_GATHERS = {torch.ops.autopar.all_gather.default}


def partition(
    joint: fx.GraphModule,
    _inputs: Any,
    *,
    num_fwd_outputs: int,
    reshard_after_forward: frozenset[int] = frozenset(),
    at_once: int | None = None,
    disable: frozenset[str] = frozenset(),
    static_lifetime_input_indices: Sequence[int] | None = None,
    **_options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph into forward and backward.

    Args:
        num_fwd_outputs: leading outputs that belong to the forward.
        reshard_after_forward: indices of primals whose gathered copies are recomputed in the backward.
        at_once: see `lower`.
        disable: names of passes to leave out.
    """
    joint = run_passes(joint, _first_passes(at_once, num_fwd_outputs), disable=disable)
    graph = joint.graph
    (flat,) = graph.output_node().args
    outputs = list(flat)  # type: ignore[arg-type]
    descriptions = graph.output_node().meta.get("desc") or [None] * len(outputs)
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    tangents = [n for n in placeholders if "tangents" in str(n.target)]
    primals = [n for n in placeholders if n not in set(tangents)]
    forward = _forward_nodes(graph, outputs[:num_fwd_outputs], tangents)
    redo = _recomputed(forward, primals, reshard_after_forward)
    backward_outputs = outputs[num_fwd_outputs:]
    body, saved = _backward_body(graph, backward_outputs, forward, redo, set(tangents))
    saved_list = [n for n in graph.nodes if n in saved]
    forward_gm = _extract(
        joint, primals, forward, outputs[:num_fwd_outputs] + saved_list,
        [*descriptions[:num_fwd_outputs], *([None] * len(saved_list))],
    )  # fmt: skip
    backward_gm = _extract(
        joint, saved_list + tangents, body, backward_outputs, descriptions[num_fwd_outputs:]
    )
    return forward_gm, backward_gm


def partition_within(
    joint: fx.GraphModule,
    _inputs: Any,
    *,
    num_fwd_outputs: int,
    choose: Callable[[Program], Schedule],
    cluster: ClusterInfo,
    device_type: str,
    parameters: Mapping[int, str],
    at_once: int | None = None,
    disable: frozenset[str] = frozenset(),
    **_options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Split a joint graph by a schedule of its operators.

    Args:
        choose: the schedule of a program.
        cluster: what times are predicted for.
        device_type: decides which kernels are substituted.
        parameters: names of those that may be on the host for a part of the step, by the indices of
            their primals.
        at_once: see `lower`.
        disable: names of passes to leave out.
    """
    # what these passes make has a size and a time, so they come before the schedule
    joint = run_passes(joint, _first_passes(at_once, num_fwd_outputs), disable=disable)
    bucket = functools.partial(bucket_collectives, apart=forward_nodes(joint, num_fwd_outputs))
    kernels = functools.partial(substitute_kernels, device_type=device_type)
    joint = run_passes(joint, [kernels, bucket], disable=disable)
    forward = forward_nodes(joint, num_fwd_outputs)
    read = read_joint(joint, forward, num_fwd_outputs=num_fwd_outputs, cluster=cluster)
    if read.kept_random:
        log.info("kept, as they draw and cannot be run again: %s", ", ".join(read.kept_random))
    primals = joint.graph.find_nodes(op="placeholder")
    leaving = {primals[k]: name for k, name in parameters.items()}
    read = with_splits(with_transfers(read, joint.graph, cluster, leaving), joint.graph)
    schedule = choose(read.program)
    check(read.program, schedule)
    return realize(joint, read, schedule, num_fwd_outputs=num_fwd_outputs)


def _first_passes(at_once: int | None, num_fwd_outputs: int) -> list[Pass]:
    """Those of the joint graph, however it is split."""
    late = range(num_fwd_outputs if at_once is None else at_once, num_fwd_outputs)
    return [drop_views, functools.partial(late_results, results=late), early_sums]


def forward_nodes(joint: fx.GraphModule, num_fwd_outputs: int) -> set[fx.Node]:
    """What the forward computes."""
    graph = joint.graph
    (flat,) = graph.output_node().args
    tangents = [n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target)]
    return _forward_nodes(graph, list(flat)[:num_fwd_outputs], tangents)  # type: ignore[arg-type]


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _forward_nodes(
    graph: fx.Graph, outputs: Iterable[Any], tangents: Sequence[fx.Node]
) -> set[fx.Node]:
    """What the forward computes: ancestors of its results, with all results of those operators."""
    found: set[fx.Node] = set()
    stack = [n for n in outputs if _is_node(n)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += node.all_input_nodes
    late = set(tangents)
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if any(n in late for n in node.all_input_nodes):
            late.add(node)
            continue
        is_result = node.target is operator.getitem and node.args[0] in found
        tagged = node.meta.get("partitioner_tag") == "is_forward"
        # sources of a forward operator come before it, so they were decided already
        ready = all(n in found or n.op == "placeholder" for n in node.all_input_nodes)
        if ready and (is_result or tagged):
            found.add(node)
    return found


def _recomputed(
    forward: set[fx.Node], primals: Sequence[fx.Node], reshard_after_forward: frozenset[int]
) -> set[fx.Node]:
    """Gathers of the chosen primals, and the views before and after them."""
    chain = {primals[i] for i in reshard_after_forward}
    found: set[fx.Node] = set()
    for node in primals[0].graph.nodes if primals else ():
        if node not in forward or node.op != "call_function":
            continue
        inputs = node.all_input_nodes
        shows = is_view(node) or node.target in _GATHERS
        if len(inputs) == 1 and inputs[0] in chain and shows:
            chain.add(node)
            found.add(node)
    return found


def _backward_body(
    graph: fx.Graph,
    outputs: Iterable[Any],
    forward: set[fx.Node],
    redo: set[fx.Node],
    tangents: set[fx.Node],
) -> tuple[set[fx.Node], set[fx.Node]]:
    """Nodes that the backward computes, and the forward's values that it needs for that."""
    body: set[fx.Node] = set()
    saved: set[fx.Node] = set()
    stack = [n for n in outputs if _is_node(n)]
    while stack:
        node = stack.pop()
        if node in body or node in saved or node in tangents:
            continue
        kept = node.op == "placeholder" or (node in forward and node not in redo)
        if kept:
            saved.add(node)
        else:
            body.add(node)
            stack += node.all_input_nodes
    return body, saved


def _extract(
    joint: fx.GraphModule,
    inputs: Sequence[fx.Node],
    body: set[fx.Node],
    outputs: Sequence[Any],
    descriptions: Sequence[Any],
) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = dict(node.meta)
    for node in joint.graph.nodes:
        if node in body and node not in env:
            env[node] = graph.node_copy(node, lambda n: env[n])
    result = graph.output(tuple(env[n] if _is_node(n) else n for n in outputs))
    result.meta["desc"] = list(descriptions)
    graph.eliminate_dead_code()
    return fx.GraphModule(joint, graph)
