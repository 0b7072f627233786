"""The step of the first rank without processes: what a schedule decides on, for planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import planning_groups
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.lower import trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.plan import ShardingPlan
from autopar.schedule.program import Program
from autopar.sharding.node_rules import results


@dataclass(frozen=True)
class LocalStep:
    """The step of the first rank, whose shards are the largest.

    Args:
        program: its operators.
        arguments: fake tensors that it is called with.
        copied_bytes: of the buffers that the step updates, which are copied for it.
    """

    program: Program
    arguments: tuple[torch.Tensor, ...]
    copied_bytes: int


def local_step(
    graph: ModelGraph,
    plan: ShardingPlan,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
) -> LocalStep:
    """Trace the step that a plan makes of a model.

    Args:
        trainable: placeholder names of the parameters that require grad.
        output_specs: layouts in which the caller wants the results; replicated if None.
    """
    coords = (0,) * len(plan.mesh)
    local = apply_sharding(
        graph, plan, coords=coords, groups=planning_groups(plan.mesh, coords),
        output_specs=output_specs, trainable=trainable,
    )  # fmt: skip
    arguments = fake_arguments(graph, local, trainable)
    copied = sum(graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders)
    device_type = arguments[0].device.type if arguments else "cpu"
    cluster = ClusterInfo.from_dict(plan.cluster)
    options = LowerOptions.of(
        graph, plan, None, device_type=device_type, cluster=cluster, scheduled=True
    )
    return LocalStep(trace_step(local.gm, arguments, options).program, arguments, copied)


def fake_arguments(
    graph: ModelGraph, local: LocalProgram, trainable: frozenset[str]
) -> tuple[torch.Tensor, ...]:
    """Fake tensors as a rank's program is called with: those of the model's graph, in local shapes,
    and the seed where the program takes one."""
    arguments: list[torch.Tensor] = []
    with FakeTensorMode():
        for node, model_node in zip_longest(
            local.gm.graph.find_nodes(op="placeholder"), _placeholders(graph)
        ):
            if model_node is None:
                arguments.append(torch.zeros((), dtype=torch.int64))
                continue
            value, name = model_node.meta["val"], str(model_node.target)
            dtype = graph.storage_dtype(name)
            shard = torch.empty(node.meta["local_shape"], dtype=dtype, device=value.device)
            arguments.append(shard.requires_grad_(name in trainable))
    return tuple(arguments)


def _placeholders(graph: ModelGraph) -> list[fx.Node]:
    """Those of tensors: flags among the inputs are specialized."""
    return [n for n in graph.nodes if n.op == "placeholder" and results(n)]
