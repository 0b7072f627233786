"""What collectives hold while they run, besides their operands and results.

A gather along another dim than the first receives rows and joins them afterwards; an exchange packs
what it sends. How much that is follows from the implementations that run (`comm/implementations`):
a value there is freed after its last reader, as everywhere in the program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.fx as fx

from autopar.comm.implementations import call_key, implementation
from autopar.comm.operators import IMPLEMENTATIONS
from autopar.ir.aliasing import tensors_of
from autopar.schedule.joint import JointProgram
from autopar.schedule.program import Buffers


def with_buffers(joint: JointProgram) -> JointProgram:
    """The same, with the buffers of its collectives."""
    known: dict[Any, Buffers] = {}
    ops = list(joint.program.ops)
    for i, node in enumerate(joint.calls):
        if node.target not in IMPLEMENTATIONS or not node.all_input_nodes:
            continue
        key = call_key(node)
        if key not in known:
            known[key] = _buffers(implementation(node))
        ops[i] = replace(ops[i], buffers=known[key])
    return replace(joint, program=replace(joint.program, ops=tuple(ops)))


def _buffers(graph: fx.Graph) -> Buffers:
    """Of an implementation."""
    nbytes: dict[int, int] = {}  # by storage
    made: dict[int, int] = {}  # when; operands exist before
    read: dict[int, int] = {}  # when last
    of: dict[fx.Node, set[int]] = {}
    steps = list(graph.nodes)
    for t, node in enumerate(steps):
        storages = [x.untyped_storage() for x in tensors_of(node.meta.get("val"))]
        for s in storages:
            if s._cdata not in nbytes:
                nbytes[s._cdata] = s.nbytes()
                made[s._cdata] = -1 if node.op == "placeholder" else t
        of[node] = {s._cdata for s in storages}
        for n in node.all_input_nodes:
            read |= dict.fromkeys(of[n], t)
    results = {s for n in graph.output_node().all_input_nodes for s in of[n]}
    inner = [s for s, t in made.items() if t >= 0]
    operands = nbytes.keys() - inner
    counted = sum(nbytes[s] for s in inner if s in results)
    given = sum(nbytes[s] for s in operands)

    def alive(t: int) -> int:
        return sum(nbytes[s] for s in inner if made[s] <= t <= read.get(s, made[s]))

    def waiting(t: int) -> int:
        return sum(nbytes[s] for s in operands if t <= read.get(s, -1))

    times = range(len(steps))
    return Buffers(
        max(0, *(alive(t) - counted for t in times)),
        max(0, *(alive(t) + waiting(t) - counted - given for t in times)),
    )
