"""A schedule as a forward and a backward graph.

Every occurrence of an operator becomes a node of its own, in the schedule's order; views of a
value are made next to their readers. No later pass may eliminate common subexpressions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from autopar.ir.joint_graph import JointGraph
from autopar.schedule.joint import JointProgram
from autopar.schedule.program import INPUT, Schedule


class _Writer:
    """One of the two graphs, while it is written."""

    def __init__(self, joint: JointProgram, inputs: Sequence[fx.Node]) -> None:
        self.joint = joint
        self.graph = fx.Graph()
        # the latest node for every value; views are dropped when their base is recomputed
        self.env: dict[fx.Node, fx.Node] = {}
        self.views: dict[int, list[fx.Node]] = {}
        self.loading: set[int] = set()  # storages that are being reloaded from the host
        for node in inputs:
            new = self.env[node] = self.graph.placeholder(node.name)
            new.meta = dict(node.meta)

    def value(self, node: fx.Node) -> fx.Node:
        """The node for a value, with the views that lead to it."""
        if node in self.env:
            return self.env[node]
        new = self.env[node] = self._copy(node)
        base = self.joint.base
        parts = [base[n] for n in (node, *node.users) if n in base]
        if node in base or node.target is not operator.getitem:
            self.views.setdefault(parts[0] if parts else INPUT, []).append(node)
        return new

    def _copy(self, node: fx.Node, makes: tuple[int, ...] = ()) -> fx.Node:
        for s in {self.joint.base.get(n, INPUT) for n in node.all_input_nodes} & self.loading:
            self.wait(s)
        new = self.graph.node_copy(node, self.value)
        new.meta["makes"] = makes
        return new

    def wait(self, s: int) -> None:
        """Wait for a storage that is being reloaded from the host."""
        self.loading.discard(s)
        parameter = s in self.joint.program.parameters
        ops = torch.ops.autopar
        wait = ops.finish_prefetch.default if parameter else ops.finish_reload.default
        node = self.graph.call_function(wait, (self.env[self.joint.owner[s]],))
        node.meta = {"makes": ()}

    def call(self, index: int) -> None:
        """Write an operator; its results replace earlier ones of the same storages."""
        op, node = self.joint.program.ops[index], self.joint.calls[index]
        new = self._copy(node, op.makes)
        for s in op.makes:
            for view in self.views.pop(s, []):
                self.env.pop(view, None)
        self.env[node] = new
        halves = self.joint.program.halves
        if index in halves:  # the half that makes the results replaces the collective
            collective = halves[index]
            if not set(op.makes) & set(self.joint.program.ops[collective].makes):
                return
            node = self.joint.calls[collective]
            self.env[node] = new
        if index in self.joint.program.transferred:
            for s in op.makes:  # what is reloaded replaces what was offloaded
                if s not in self.joint.program.parameters:
                    self.env[self.joint.owner[s]] = new
            self.loading.update(s for s in op.makes if self.joint.owner[s] is not node)
            return
        for user in node.users:
            if user.target is operator.getitem and self.joint.base.get(user) in op.makes:
                self.env[user] = self._copy(user)

    def finish(self, values: Sequence[Any], module: fx.GraphModule) -> fx.GraphModule:
        """Return the values."""
        self.graph.output(tuple(self.value(v) if isinstance(v, fx.Node) else v for v in values))
        self.graph.eliminate_dead_code()
        return _LazyGraphModule(module, self.graph)


def realize(
    joint: JointGraph, joint_program: JointProgram, schedule: Schedule
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph of a schedule."""
    program, count = joint_program.program, len(joint.results)
    saved = [joint_program.owner[s] for s in schedule.saved(program)]
    passed = [*_backward_inputs(joint_program, schedule, joint.primals), *saved]
    forward = _Writer(joint_program, joint.primals)
    for i in schedule.forward:
        forward.call(i)
    forward_gm = forward.finish([*joint.outputs[:count], *passed], joint.gm)
    backward = _Writer(joint_program, [*passed, *joint.tangents])
    backward.loading = forward.loading  # of parameters; the forward reloads nothing else
    for i in schedule.backward:
        backward.call(i)
    for s in sorted(backward.loading & program.parameters.keys()):
        backward.wait(s)
    return forward_gm, backward.finish(joint.outputs[count:], joint.gm)


def _backward_inputs(
    joint_program: JointProgram, schedule: Schedule, primals: Sequence[fx.Node]
) -> list[fx.Node]:
    """Arguments that the backward reads or reloads."""
    program = joint_program.program
    ops = [program.ops[i] for i in schedule.backward]
    read = {s for op in ops for s in (*op.reads, *op.makes)} | program.gradients
    owners = {joint_program.owner[s] for s in read if program.maker[s] == INPUT}
    return [n for n in primals if n in owners]
