"""The step of the first rank without processes: its program, and the joint graph of that, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import planning_groups
from autopar.ir.graph import ModelGraph
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import apply_sharding
from autopar.plan import ShardingPlan
from autopar.runtime.lower import lower
from autopar.schedule.program import Program, Schedule
from autopar.schedule.transfers import large_parameters
from autopar.sharding.node_rules import results


@dataclass(frozen=True)
class LocalStep:
    """What the first rank runs, whose shards are the largest.

    Args:
        program: its joint graph.
        arguments: what it is called with, in shapes only.
        copied_bytes: of the buffers that the step updates, which are copied for it.
    """

    program: Program
    arguments: tuple[torch.Tensor, ...]
    copied_bytes: int


class _Read(Exception):
    """Ends the lowering once the joint graph is read."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program


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
    cluster = ClusterInfo.from_dict(plan.cluster)
    coords = (0,) * len(plan.mesh)
    local = apply_sharding(
        graph, plan, coords=coords, groups=planning_groups(plan.mesh, coords),
        output_specs=output_specs, trainable=trainable,
    )  # fmt: skip
    wholes = [n for n in graph.nodes if n.op == "placeholder" and results(n)]
    arguments, copied = [], 0
    updated = {k for k, name in graph.buffers.items() if name in graph.mutations}
    with FakeTensorMode():
        # in the order of the model's; behind them stands the seed, where there is one
        for node, whole in zip_longest(local.gm.graph.find_nodes(op="placeholder"), wholes):
            if whole is None:
                arguments.append(torch.zeros((), dtype=torch.int64))
                continue
            value = whole.meta["val"]
            made = torch.empty(node.meta["local_shape"], dtype=value.dtype, device=value.device)
            arguments.append(made.requires_grad_(str(whole.target) in trainable))
            copied += made.nbytes if str(whole.target) in updated else 0

    def choose(program: Program) -> Schedule:
        raise _Read(program)

    device_type = arguments[0].device.type if arguments else "cpu"
    try:
        lower(
            local.gm, arguments, choose=choose, cluster=cluster, device_type=device_type,
            parameters=large_parameters(graph), at_once=len(graph.mutations),
        )  # fmt: skip
    except _Read as read:
        return LocalStep(read.program, tuple(arguments), copied)
    return LocalStep(Program((), (), (), frozenset(), frozenset()), tuple(arguments), copied)
