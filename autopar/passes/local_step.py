"""The step of the first rank without processes: what a schedule decides on, for planning."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import ClusterInfo
from autopar.comm.groups import planning_groups
from autopar.ir.graph import ModelGraph
from autopar.ir.shorten import ShortGraph, shortened
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.passes.bucket import bucket_collectives
from autopar.passes.lower import TracedStep, trace_step
from autopar.passes.pipeline import LowerOptions
from autopar.passes.split_regions import copy_of
from autopar.plan import ShardingPlan
from autopar.schedule.program import Program
from autopar.schedule.transfers import large_parameters
from autopar.schedule.unroll import Gap, unrolled
from autopar.sharding.node_rules import results


@dataclass(frozen=True)
class LocalStep:
    """The step of the first rank, whose shards are the largest.

    Args:
        program: its operators.
        arguments: fake tensors that it is called with.
        copied_bytes: of the buffers that the step updates, which are copied for it.
        source: the program that was traced, of all blocks or of a few; None after the search.
    """

    program: Program
    arguments: tuple[torch.Tensor, ...]
    copied_bytes: int
    source: UntracedStep | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class UntracedStep:
    """The same before it is traced.

    Args:
        gm: the forward program.
        arguments: fake tensors that it is called with.
        options: of its lowering.
        copied_bytes: as of `LocalStep`.
        gap: that the program has in a list of equal blocks.
    """

    gm: fx.GraphModule
    arguments: tuple[torch.Tensor, ...]
    options: LowerOptions
    copied_bytes: int = 0
    gap: Gap | None = None

    @cached_property
    def as_is(self) -> TracedStep:
        """The program traced as it is, once."""
        return self.traced(copy_of(self.gm))

    def traced(self, gm: fx.GraphModule) -> TracedStep:
        """The program, or one made from it, traced; it may be changed."""
        return trace_step(gm, self.arguments, self.options)

    def local(self) -> LocalStep:
        """The same traced, of all blocks."""
        return LocalStep(self.as_is.program, self.arguments, self.copied_bytes, self)

    def program_of(self, traced: TracedStep) -> Program | None:
        """The operators with all blocks; None if those around the gap differ."""
        return traced.program if self.gap is None else unrolled(traced.program, self.gap)


def local_step(
    graph: ModelGraph,
    plan: ShardingPlan,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
    choices: Mapping[fx.Node, Hashable] | None = None,
) -> LocalStep:
    """Trace the step that a plan makes of a model. Of a list of blocks that are equal, in the graph
    and in the plan, a few are traced, and the others written like them. Small gradients of several
    blocks then stay messages of their own, which the step that runs has in buckets.

    Args:
        trainable: placeholder names of the parameters that require grad.
        output_specs: layouts in which the caller wants the results; replicated if None.
        choices: by node, what tells copies of a block apart in the plan; all nodes are traced if
            None.
    """
    short = None if choices is None else shortened(graph, choices)
    if short is not None:
        step = short_step(graph, short, plan, trainable=trainable, output_specs=output_specs)
        program = step.program_of(step.as_is)
        if program is not None:
            by_name = dict(zip(_tensor_names(short.graph), step.arguments, strict=False))
            names = (short.twins.get(name, name) for name in _tensor_names(graph))
            seed = step.arguments[len(by_name) :]
            arguments = (*(by_name[name] for name in names), *seed)
            return LocalStep(program, arguments, step.copied_bytes, step)
    return untraced_step(graph, graph, plan, trainable, output_specs).local()


def short_step(
    graph: ModelGraph,
    short: ShortGraph,
    plan: ShardingPlan,
    *,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None = None,
) -> UntracedStep:
    """The step of a model without most of its equal blocks.

    Args:
        graph: of the whole model.
    """
    apart = frozenset({bucket_collectives.__name__})
    step = untraced_step(short.graph, graph, plan, trainable, output_specs, disable=apart)
    return replace(step, gap=Gap(short.blocks, short.before, short.after))


def untraced_step(
    graph: ModelGraph,
    whole: ModelGraph,
    plan: ShardingPlan,
    trainable: frozenset[str],
    output_specs: Sequence[ShardingSpec] | None,
    disable: frozenset[str] = frozenset(),
    coords: Sequence[int] | None = None,
) -> UntracedStep:
    """The step that a plan makes of a model, with all of its blocks.

    Args:
        whole: the graph that this one is a part of.
        disable: names of passes to leave out.
        coords: of the rank; the first one if None.
    """
    coords = tuple(coords or (0,) * len(plan.mesh))
    local = apply_sharding(
        graph, plan, coords=coords, groups=planning_groups(plan.mesh, coords),
        output_specs=output_specs, trainable=trainable,
    )  # fmt: skip
    arguments = fake_arguments(graph, local, trainable)
    copied = sum(graph.placeholders[k].meta["val"].nbytes for k in graph.mutated_placeholders)
    device_type = arguments[0].device.type if arguments else "cpu"
    large = large_parameters(whole).values() if plan.microbatches == 1 else ()
    options = LowerOptions.of(
        graph, plan, frozenset(large),
        device_type=device_type, cluster=ClusterInfo.from_dict(plan.cluster), scheduled=True,
        disable=disable,
    )  # fmt: skip
    return UntracedStep(local.gm, arguments, options, copied)


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


def _tensor_names(graph: ModelGraph) -> list[str]:
    return [str(node.target) for node in _placeholders(graph)]


def _placeholders(graph: ModelGraph) -> list[fx.Node]:
    """Those of tensors: flags among the inputs are specialized."""
    return [n for n in graph.nodes if n.op == "placeholder" and results(n)]
