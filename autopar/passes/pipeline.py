"""The passes in the order in which they run, each with its reason.

A training step passes through three kinds of graph: the sharded forward program, the joint graph of
forward and backward, and the two graphs that it is split into. Passes of the joint graph that come
before a schedule make operators whose sizes and times the schedule depends on. What leads from one
kind of graph to the next is no pass: `trace_joint`, and `realize` or `split_as_eager`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.ir.graph import ModelGraph
from autopar.ir.joint_graph import JointGraph
from autopar.kernels.batch_norm import use_library
from autopar.kernels.linear import add_bias_within
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.add_at_index import add_at_index
from autopar.passes.announce_gradients import announce_gradients
from autopar.passes.any_strides import any_strides
from autopar.passes.async_sums import early_sums, returned_sums
from autopar.passes.bucket import BUCKET_BYTES, bucket_bytes_within, bucket_collectives
from autopar.passes.compile_mode import CompileMode
from autopar.passes.copy_parts import copy_parts
from autopar.passes.drop_views import drop_views
from autopar.passes.fetch_parameters import fetch_parameters
from autopar.passes.few_operators import share_equal_operators, whole_products
from autopar.passes.fill_concatenations import fill_concatenations
from autopar.passes.functional_collectives import functional_collectives
from autopar.passes.overlap import overlap_collectives
from autopar.passes.overwrite import overwrite
from autopar.passes.partition import forward_nodes
from autopar.passes.runner import Pass, run_passes
from autopar.passes.split_loss import scale_copies
from autopar.passes.sum_dtypes import sum_gradients_in
from autopar.plan import ShardingPlan
from autopar.schedule.transfers import large_parameters


@dataclass(frozen=True)
class LowerOptions:
    """How a step is lowered.

    Args:
        device_type: of the tensors.
        cluster: the schedule predicts times for it; collectives overlap with compute where its
            devices can do that.
        scheduled: a schedule will decide what the step keeps, recomputes and offloads; else the
            step keeps what eager PyTorch keeps.
        compile: how the graphs are compiled.
        reshard_after_forward: positions of the arguments whose gathered copies are gathered again
            for the backward. A schedule decides that itself.
        sum_dtypes: in which gradients are summed over ranks, by positions of the arguments, where
            it is not the dtype of compute.
        offloadable: names of the parameters that a schedule may have on the host for a part of the
            step, by their positions among the arguments.
        parameters: their number; they are the first arguments.
        added: how many arguments, the first ones, have gradients that are added to those of
            earlier microbatches.
        states_on: the tier of the optimizer's state; parameters and gradients are on the host
            between steps then. The device if empty.
        donated: positions of the arguments that results may be written over.
        bucket_bytes: of a bucket of small collectives, at most.
        disable: names of passes to leave out (debugging).
        dump: folder for the graph before and after each pass.
    """

    device_type: str = "cpu"
    cluster: ClusterInfo = field(default_factory=lambda: ClusterInfo.of("1"))
    scheduled: bool = False
    compile: CompileMode = field(default_factory=CompileMode)
    reshard_after_forward: frozenset[int] = frozenset()
    sum_dtypes: Mapping[int, torch.dtype] = field(default_factory=dict)
    offloadable: Mapping[int, str] = field(default_factory=dict)
    parameters: int = 0
    added: int = 0
    states_on: str = ""
    donated: frozenset[int] = frozenset()
    bucket_bytes: int = BUCKET_BYTES
    disable: frozenset[str] = frozenset()
    dump: Path | None = None

    @staticmethod
    def of(
        graph: ModelGraph, plan: ShardingPlan, offloadable: Collection[str] | None, **options: Any
    ) -> LowerOptions:
        """The options for a plan: a run that lowers as planning did uses its schedule.

        Args:
            offloadable: names of the parameters that may be on the host for a part of the step;
                all if None.
            options: that neither the model nor its plan decides.
        """
        again = frozenset(plan.reshard_after_forward)
        return LowerOptions(
            reshard_after_forward=frozenset(
                k for k, name in enumerate(graph.parameters.values()) if name in again
            ),
            sum_dtypes={
                k: graph.casts[name].reductions
                for k, name in enumerate(graph.parameters)
                if name in graph.casts
            },
            offloadable={
                k: name
                for k, name in large_parameters(graph).items()
                if offloadable is None or name in offloadable
            },
            parameters=len(graph.parameters),
            added=len(graph.parameters) if plan.microbatches > 1 else 0,
            bucket_bytes=bucket_bytes_within(plan.budget_bytes),
            states_on=plan.states_on,
            donated=frozenset(
                k
                for k, node in enumerate(_tensor_placeholders(graph))
                if node.target in graph.donated
            ),
            **options,
        )


def _tensor_placeholders(graph: ModelGraph) -> list[fx.Node]:
    return [n for n in graph.placeholders.values() if isinstance(n.meta["val"], torch.Tensor)]


@dataclass(frozen=True)
class Entry:
    """A pass in the pipeline.

    Args:
        stage: of the graph it runs on: "program", "shaped" (the same with fake tensors), "joint",
            "backward", or "split" (forward and backward).
        run: the pass.
        reason: why it is there.
        when: whether it runs.
        arguments: its keyword arguments; of passes of the joint graph, with that graph.
    """

    stage: str
    run: Callable[..., fx.GraphModule]
    reason: str
    when: Callable[[LowerOptions], bool] = lambda o: True
    arguments: Callable[[LowerOptions, Any], dict[str, Any]] = lambda o, joint: {}


def _on_gpu(o: LowerOptions) -> bool:
    return o.device_type == "cuda" and torch.cuda.is_available()


def _is_of_a_token(o: LowerOptions) -> bool:
    """A program with a cache, whose operators are small."""
    return bool(o.donated) and not o.compile


def _overlaps(o: LowerOptions) -> bool:
    return not o.scheduled and o.cluster.device.runs_beside


# fmt: off
PIPELINE = (
    Entry("program", use_library,
          "cuDNN's BatchNorm keeps a workspace whose size only cuDNN knows", when=_on_gpu),
    Entry("program", fetch_parameters,
          "states that the device has no room for are on the host between steps",
          when=lambda o: bool(o.states_on),
          arguments=lambda o, _: {"parameters": range(o.parameters), "device_type": o.device_type}),
    Entry("shaped", substitute_kernels,
          "one Triton kernel moves fewer bytes than several operators; before differentiation, so "
          "that a schedule sees what both directions keep and take; Inductor fuses them itself",
          when=lambda o: not o.compile,
          arguments=lambda o, _: {"device": o.cluster.device, "scheduled": o.scheduled}),
    Entry("joint", drop_views,
          "views that change nothing hide which operators read a value"),
    Entry("joint", add_at_index,
          "the derivative of a gather is as large as what it gathers from"),
    Entry("joint", copy_parts,
          "a slice that outlives what it was cut from would keep all of it",
          arguments=lambda o, joint: {"forward": forward_nodes(joint)}),
    Entry("joint", sum_gradients_in,
          "sums in a short dtype over many ranks lose digits", when=lambda o: bool(o.sum_dtypes),
          arguments=lambda o, joint: {"results": len(joint.results), "dtypes": o.sum_dtypes}),
    Entry("joint", returned_sums,
          "every sum is a point where all ranks wait: a loss needs one, not one per axis",
          arguments=lambda o, joint: {"results": len(joint.results)}),
    Entry("joint", early_sums,
          "sums of inputs (the count of targets) can start with the step and hide"),
    Entry("joint", bucket_collectives,
          "few large messages beat many small ones; the forward's gathers stay apart, for the "
          "schedule to repeat",
          when=lambda o: o.scheduled,
          arguments=lambda o, joint: {
              "apart": forward_nodes(joint), "bucket_bytes": o.bucket_bytes,
          }),
    Entry("backward", announce_gradients,
          "the optimizer's step on the host may begin beside the rest of the backward",
          when=lambda o: bool(o.states_on) and o.cluster.device.runs_beside),
    Entry("split", drop_views,
          "the program of a token waits for the dispatcher", when=_is_of_a_token),
    Entry("split", share_equal_operators,
          "layers compute masks and angles alike", when=_is_of_a_token),
    Entry("split", bucket_collectives,
          "few large messages are faster than many small", when=lambda o: not o.scheduled),
    Entry("split", overlap_collectives,
          "collectives run beside compute; a schedule has done that already", when=_overlaps),
    Entry("split", add_bias_within,
          "oneDNN adds the bias inside the product: one pass over memory less",
          when=lambda o: o.device_type == "cpu" and not o.compile),
    Entry("split", scale_copies,
          "Inductor does not know that an operator may write over what the forward has saved",
          when=lambda o: bool(o.compile)),
    Entry("split", fill_concatenations,
          "a concatenation needs its parts and its result at once; slices are freed as they come",
          when=lambda o: not o.compile and not _is_of_a_token(o)),
    Entry("split", overwrite,
          "a pointwise result can take its dying operand's memory; Inductor does this itself",
          when=lambda o: not o.compile,
          arguments=lambda o, joint: {"donated": o.donated}),
    Entry("split", whole_products,
          "one operator instead of four", when=_is_of_a_token),
    Entry("split", functional_collectives,
          "torch's tools know `_c10d_functional` collectives",
          arguments=lambda o, _: {"mutate": not o.compile}),
    Entry("split", any_strides,
          "kernels lay some results out unlike fake tensors; Inductor checks strides itself",
          when=lambda o: not o.compile),
)
# fmt: on


def run_stage(
    stage: str, gm: fx.GraphModule, options: LowerOptions, joint: JointGraph | None = None,
    *, label: str = "",
) -> fx.GraphModule:  # fmt: skip
    """Run the passes of a stage on a graph.

    Args:
        joint: the joint graph, of passes that run on it.
        label: names the graph in dumps; the stage if empty.
    """
    passes: list[Pass] = [
        partial(entry.run, **entry.arguments(options, joint))
        for entry in PIPELINE
        if entry.stage == stage and entry.when(options)
    ]
    return run_passes(gm, passes, stage=label or stage, disable=options.disable, dump=options.dump)
