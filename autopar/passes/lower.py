"""Lowering: a rank's sharded forward program becomes the forward and backward graph that run.

Trace the joint graph, split it, run the passes on both parts; `runtime/program.py` binds them to a
differentiable function.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir.joint_graph import JointGraph, Result
from autopar.kernels import kernels_run_on
from autopar.passes.accumulate import gradients_in_place
from autopar.passes.compile_mode import CompileMode
from autopar.passes.joint import trace_joint
from autopar.passes.partition import forward_nodes, split_as_eager
from autopar.passes.pipeline import LowerOptions, run_stage
from autopar.passes.split_backward import split_backward
from autopar.passes.split_regions import with_shapes
from autopar.schedule.buffers import with_buffers
from autopar.schedule.joint import JointProgram, read_joint
from autopar.schedule.program import Program, Schedule
from autopar.schedule.realize import realize
from autopar.schedule.simulate import check
from autopar.schedule.splits import with_splits
from autopar.schedule.transfers import with_transfers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoweredStep:
    """One rank's step as two graphs.

    Args:
        forward: takes the flat local tensors, returns the results and what the backward needs.
        backward: takes that and the gradients of differentiable results, returns the gradients of
            the arguments. None if no result is differentiable.
        results: of the forward, without what the backward needs.
        compile: how the graphs are compiled.
        weights: the part of the backward that can wait, if it was split: takes what the other part
            returns behind its gradients, and returns the rest of the gradients.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    results: tuple[Result, ...]
    compile: CompileMode
    weights: fx.GraphModule | None = None


@dataclass(frozen=True)
class TracedStep:
    """A step before it is split.

    Args:
        joint: its joint graph.
        reading: what a schedule decides on; None if the step keeps what eager PyTorch keeps.
        options: of its lowering.
    """

    joint: JointGraph
    reading: JointProgram | None
    options: LowerOptions

    @property
    def program(self) -> Program:
        """The operators of the joint graph, the storages they make, and their costs."""
        if self.reading is None:
            return Program((), (), (), frozenset(), frozenset())
        return self.reading.program


def trace_step(
    gm: fx.GraphModule, arguments: Sequence[torch.Tensor], options: LowerOptions | None = None
) -> TracedStep:
    """Trace a sharded forward program to its joint graph.

    Args:
        gm: takes flat local tensors, returns a flat tuple. May be changed in place.
        arguments: tensors of the shapes, dtypes and grad flags that it will be called with; only
            their metadata is used, so they may be fake.
    """
    options = options or LowerOptions()
    if options.states_on:
        arguments = [*map(_on_host, arguments[: options.parameters]),
                     *arguments[options.parameters :]]  # fmt: skip
    gm = run_stage("program", gm, options)
    if kernels_run_on(options.device_type):
        gm = run_stage("shaped", with_shapes(gm, arguments), options)
    joint = trace_joint(gm, arguments, name_modules=options.scheduled)
    if not joint.differentiable and not options.scheduled:
        return TracedStep(joint, None, options)
    joint = replace(joint, gm=run_stage("joint", joint.gm, options, joint))
    reading = _read(joint, options) if options.scheduled else None
    return TracedStep(joint, reading, options)


def _on_host(t: torch.Tensor) -> torch.Tensor:
    """A tensor like another one, on the host."""
    with FakeTensorMode():
        host = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="cpu")
    return host.requires_grad_(t.requires_grad)


def _read(joint: JointGraph, options: LowerOptions) -> JointProgram:
    """Read the joint graph, and add the operators that split collectives and move values to the
    host, for a schedule to take in; and what collectives hold."""
    reading = read_joint(joint, forward_nodes(joint), options.cluster)
    if options.added and not options.compile:
        reading = reading.without_gradients(gradients_in_place(joint, options.added))
    if reading.kept_random:
        log.info("kept, as they draw and cannot run again: %s", ", ".join(reading.kept_random))
    primals = joint.primals
    if not joint.differentiable:  # nothing to recompute or to offload in between
        return with_buffers(reading)
    resident = {} if options.states_on else options.offloadable
    offloadable = {primals[k]: name for k, name in resident.items()}
    reading = with_transfers(reading, joint.gm.graph, options.cluster, offloadable)
    return with_buffers(with_splits(reading, joint.gm.graph))


def lower(
    traced: TracedStep,
    schedule: Schedule | None = None,
    *,
    first: Collection[int] | None = None,
) -> LoweredStep:
    """Split a joint graph, and run the passes on its parts.

    Args:
        schedule: of the traced step's program: what the step keeps, recomputes and offloads; as
            eager autograd does if None.
        first: positions of the arguments whose gradients come first, in a backward that is split.
    """
    joint, options = traced.joint, traced.options
    forward, backward = joint.gm, None
    if joint.differentiable and schedule is not None:
        assert traced.reading is not None, "a schedule is of a step that was read"
        check(traced.program, schedule)
        forward, backward = realize(joint, traced.reading, schedule)
    elif joint.differentiable:
        forward, backward = split_as_eager(
            joint, reshard_after_forward=options.reshard_after_forward
        )
    forward = run_stage("split", forward, options, label="forward")
    weights = None
    if backward is not None and first is not None:
        backward, weights = split_backward(backward, first)
        weights = run_stage("split", weights, options, label="weights")
    if backward is not None:
        backward = run_stage("backward", backward, options)
        backward = run_stage("split", backward, options, label="backward")
    return LoweredStep(forward, backward, joint.results, options.compile, weights)
