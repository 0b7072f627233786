"""A schedule as the two graphs that AOTAutograd compiles.

Every occurrence of an operator becomes a node of its own, in the schedule's order; views of a
value are made next to whoever reads them. The copies are nodes, not calls that a later pass could
recognize as the same: nothing after this eliminates common subexpressions.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.schedule.joint import Joint
from autopar.schedule.program import GIVEN, Program, Schedule


class _Writer:
    """One of the two graphs, while it is written."""

    def __init__(self, joint: Joint, inputs: Sequence[fx.Node]) -> None:
        self.joint = joint
        self.graph = fx.Graph()
        # the latest node for every value; views are dropped when their base is made again
        self.env: dict[fx.Node, fx.Node] = {}
        self.views: dict[int, list[fx.Node]] = {}
        self.coming: set[int] = set()  # storages on their way back from the host
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
            self.views.setdefault(parts[0] if parts else GIVEN, []).append(node)
        return new

    def _copy(self, node: fx.Node, makes: tuple[int, ...] = ()) -> fx.Node:
        for s in {self.joint.base.get(n, GIVEN) for n in node.all_input_nodes} & self.coming:
            self.wait(s)
        new = self.graph.node_copy(node, self.value)
        new.meta["makes"] = makes
        return new

    def wait(self, s: int) -> None:
        """For what comes back from the host."""
        self.coming.discard(s)
        own = s in self.joint.program.parameters
        wait = torch.ops.autopar.filled.default if own else torch.ops.autopar.arrived.default
        node = self.graph.call_function(wait, (self.env[self.joint.owner[s]],))
        node.meta = {"makes": ()}

    def call(self, index: int) -> fx.Node:
        """Write an operator; what it makes replaces what was there under its names."""
        op, node = self.joint.program.ops[index], self.joint.calls[index]
        new = self._copy(node, op.makes)
        for s in op.makes:
            for view in self.views.pop(s, []):
                self.env.pop(view, None)
        self.env[node] = new
        halves = self.joint.program.halves
        if index in halves:  # what makes the results takes the place of the whole
            whole = halves[index]
            if not set(op.makes) & set(self.joint.program.ops[whole].makes):
                return new
            node = self.joint.calls[whole]
            self.env[node] = new
        if index in self.joint.program.moves:
            for s in op.makes:  # what came back takes the place of what left
                if s not in self.joint.program.parameters:
                    self.env[self.joint.owner[s]] = new
            self.coming.update(s for s in op.makes if self.joint.owner[s] is not node)
            return new
        for user in node.users:
            if user.target is operator.getitem and self.joint.base.get(user) in op.makes:
                self.env[user] = self._copy(user)
        return new

    def output(self, values: Sequence[Any], descriptions: Sequence[Any]) -> None:
        flat = tuple(self.value(v) if isinstance(v, fx.Node) else v for v in values)
        self.graph.output(flat).meta["desc"] = list(descriptions)


def realize(
    module: fx.GraphModule,
    joint: Joint,
    schedule: Schedule,
    *,
    num_fwd_outputs: int,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward graph.

    Args:
        module: the joint graph's.
    """
    program = joint.program
    (flat,) = module.graph.output_node().args
    outputs = list(flat)  # type: ignore[arg-type]
    described = module.graph.output_node().meta.get("desc") or [None] * len(outputs)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    tangents = [n for n in placeholders if "tangents" in str(n.target)]
    primals = [n for n in placeholders if "tangents" not in str(n.target)]
    saved = [joint.owner[s] for s in schedule.kept(program)]
    given = _given(program, joint, schedule, primals)
    forward = _Writer(joint, primals)
    for i in schedule.forward:
        forward.call(i)
    handed = [*given, *saved]
    forward.output(
        outputs[:num_fwd_outputs] + handed, [*described[:num_fwd_outputs], *([None] * len(handed))]
    )
    backward = _Writer(joint, [*handed, *tangents])
    backward.coming = forward.coming  # parameters; no value starts to come back in the forward
    for i in schedule.backward:
        backward.call(i)
    for s in sorted(backward.coming & program.parameters.keys()):
        backward.wait(s)
    backward.output(outputs[num_fwd_outputs:], described[num_fwd_outputs:])
    made = []
    for writer in (forward, backward):
        writer.graph.eliminate_dead_code()
        made.append(fx.GraphModule(module, writer.graph))
    return made[0], made[1]


def _given(
    program: Program, joint: Joint, schedule: Schedule, primals: Sequence[fx.Node]
) -> list[fx.Node]:
    """Inputs that the backward reads, or fills again."""
    ops = [program.ops[i] for i in schedule.backward]
    read = {s for op in ops for s in (*op.reads, *op.makes)} | program.gradients
    needed = {s for s in read if program.maker[s] == GIVEN}
    owners = {joint.owner[s] for s in needed}
    return [n for n in primals if n in owners]
