"""From a joint graph to a `Program`: its operators, the storages they make, and their costs."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import ClusterInfo
from autopar.comm import host_copies
from autopar.comm.cost import STARTS, communicates, communication_us
from autopar.ir.aliasing import overwritable, tensors_of
from autopar.ir.graph import bound_arguments
from autopar.ir.joint_graph import JointGraph
from autopar.ir.randomness import draws
from autopar.operators.scaled_gradient import scaled_gradient
from autopar.profiler.counting import Recorder, Work
from autopar.profiler.time_model import Kernel, KernelLog, computed, dtype_of, node_us
from autopar.schedule.program import INPUT, SIDE, Op, Program, Resource


@dataclass(frozen=True)
class JointProgram:
    """The program of a joint graph.

    Args:
        calls: the node of every operator.
        base: the storage of every node that holds one tensor.
        owner: the node that stands for a storage: the tensor that was made with it.
        kept_random: operators that draw random numbers and cannot be replayed.
    """

    program: Program
    calls: tuple[fx.Node, ...]
    base: Mapping[fx.Node, int]
    owner: Mapping[int, fx.Node]
    kept_random: tuple[str, ...] = ()

    def without_gradients(self, nodes: Iterable[fx.Node]) -> JointProgram:
        """The same, without the bytes of gradients that lie in memory of earlier microbatches."""
        elsewhere = {self.base[node] for node in nodes}
        own = self.program.gradient_bytes.items()
        kept = {s: nbytes for s, nbytes in own if s not in elsewhere}
        return replace(self, program=replace(self.program, gradient_bytes=kept))


class Extension:
    """Adds operators to a joint program and its graph, for schedules to use."""

    def __init__(self, joint: JointProgram, graph: fx.Graph) -> None:
        self.joint, self.graph = joint, graph
        self.ops, self.calls = list(joint.program.ops), list(joint.calls)
        self.nbytes = list(joint.program.nbytes)
        self.base, self.owner = dict(joint.base), dict(joint.owner)

    def storage(self, nbytes: int, owner: fx.Node) -> int:
        """Add a storage."""
        self.nbytes.append(nbytes)
        self.base[owner] = len(self.nbytes) - 1
        self.owner[self.base[owner]] = owner
        return self.base[owner]

    def add(self, node: fx.Node, op: Op, like: fx.Node) -> int:
        """Add an operator, with its node in the same module as another node."""
        node.meta["nn_module_stack"] = like.meta.get("nn_module_stack") or {}
        self.ops.append(op)
        self.calls.append(node)
        return len(self.ops) - 1

    def extended(self, **fields: Any) -> JointProgram:
        """The joint program with the additions, and these fields of its program."""
        program = replace(
            self.joint.program, ops=tuple(self.ops), nbytes=tuple(self.nbytes),
            order=self.joint.program.backward, **fields,
        )  # fmt: skip
        return replace(
            self.joint, program=program, calls=tuple(self.calls), base=self.base, owner=self.owner
        )


def read_joint(joint: JointGraph, forward: set[fx.Node], cluster: ClusterInfo) -> JointProgram:
    """Run the joint graph on fake tensors and record its operators and storages.

    Args:
        forward: nodes that the forward computes.
        cluster: whose times are predicted.
    """
    outputs, count = joint.gradients_too, len(joint.results)
    reader = _Reader(joint.gm, cluster, forward, _carrying(joint.primals, outputs[count:]))
    reader.run([n for n in outputs if isinstance(n, fx.Node)])
    program = _program(reader, joint)
    return JointProgram(
        program, tuple(reader.calls), reader.base, reader.owner, tuple(reader.random)
    )


@dataclass
class _Reader:
    """Runs the nodes in order, on fake tensors that stay alive, so that addresses identify them."""

    joint: fx.GraphModule
    cluster: ClusterInfo
    forward: set[fx.Node]
    carrying: set[fx.Node]
    env: dict[fx.Node, Any] = field(default_factory=dict)
    base: dict[fx.Node, int] = field(default_factory=dict)
    owner: dict[int, fx.Node] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)  # of a storage, by its address
    parts: dict[fx.Node, list[int]] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    calls: list[fx.Node] = field(default_factory=list)
    of_forward: list[int] = field(default_factory=list)
    random: list[str] = field(default_factory=list)

    def run(self, outputs: Iterable[fx.Node]) -> None:
        """Read all nodes that the outputs and checks depend on."""
        reachable: set[fx.Node] = set()
        stack = [*outputs, *(n for n in self.joint.graph.nodes if _checks(n))]
        while stack:
            node = stack.pop()
            if node not in reachable:
                reachable.add(node)
                stack += node.all_input_nodes
        recorder = KernelLog() if self.cluster.device.measured else Recorder()
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            for node in self.joint.graph.nodes:
                if node.op in ("placeholder", "get_attr"):
                    self._input(node)
                    _recorded(recorder)  # an argument costs the step nothing
                elif node in reachable:
                    self._call(node, recorder)

    def _storage(self, t: torch.Tensor) -> tuple[int, bool]:
        """The number of a tensor's storage, and whether it is new."""
        key = t.untyped_storage()._cdata
        if key in self.numbers:
            return self.numbers[key], False
        self.numbers[key] = len(self.sizes)
        self.sizes.append(int(t.untyped_storage().nbytes()))
        return self.numbers[key], True

    def _input(self, node: fx.Node) -> None:
        argument = node.op == "placeholder"
        value = node.meta["val"] if argument else getattr(self.joint, str(node.target))
        if argument and isinstance(value, torch.Tensor):
            value = torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device=value.device
            )
        self.env[node] = value
        if isinstance(value, torch.Tensor):
            self.base[node], _ = self._storage(value)
            self.owner.setdefault(self.base[node], node)

    def _call(self, node: fx.Node, recorder: Recorder) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.__getitem__)
        value = self.env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        work, kernels = _recorded(recorder)
        results = tensors_of(value)
        makes: list[int] = []
        for t in results:
            number, new = self._storage(t)
            self.parts.setdefault(node, []).append(number)
            if new:
                makes.append(number)
                if node.target in host_copies.ON_HOST:
                    self.sizes[number] = 0
                self.owner[number] = node  # a getitem of it takes over
        if isinstance(value, torch.Tensor):
            self.base[node] = self.parts[node][0]
        if node.target is operator.getitem:
            if self.owner.get(self.base.get(node, INPUT)) is node.args[0]:
                self.owner[self.base[node]] = node
            return
        if not makes and not node.is_impure():
            return  # a view
        if draws(node):
            self.random.append(node.name)
        if node in self.forward:
            self.of_forward.append(len(self.ops))
        resource, flops, us = self._cost(node, tensors_of((args, kwargs)), results, work, kernels)
        self.calls.append(node)
        self.ops.append(
            Op(
                node.name, _kind(node), self._reads(node), tuple(makes), flops, us,
                replays=_may_replay(node), overwrites=self._overwrites(node, makes),
                takes_over=_takes_over(node), fills=self._fills(node, makes),
                carries=node in self.carrying,
                module=_module(node), resource=resource,
            )
        )  # fmt: skip

    def _cost(
        self, node: fx.Node, operands: list[torch.Tensor], results: list[torch.Tensor], work: Work,
        kernels: Sequence[Kernel] | None,
    ) -> tuple[Resource, float, float]:  # fmt: skip
        """What an operator occupies, its FLOPs, and its time."""
        if communicates(node):
            us = communication_us(node, operands, results, self.cluster)
            return Resource.COMMUNICATION, 0.0, us
        link = self.cluster.host_link
        if node.target in (host_copies.FETCH, host_copies.STORE) and link is not None:
            moved = sum(t.nbytes for t in results)
            return Resource.HOST, 0.0, 1e6 * (link.alpha + link.beta * moved)
        elements = max((t.numel() for t in (*operands, *results)), default=0)
        if not kernels:
            done = computed(node.target, bound_arguments(node), work)
            kernels = [Kernel(done, dtype_of(operands, results))]
        us = float(node_us(kernels, self.cluster.device))
        return Resource.COMPUTE, float(work.flops or elements), us

    def _reads(self, node: fx.Node) -> tuple[int, ...]:
        reads: dict[int, None] = {}
        for n in node.all_input_nodes:  # of a tuple, all its tensors
            reads |= dict.fromkeys([self.base[n]] if n in self.base else self.parts.get(n, []))
        return tuple(reads)

    def _overwrites(self, node: fx.Node, makes: Sequence[int]) -> tuple[int, ...]:
        if len(makes) != 1 or not isinstance(node.meta.get("val"), torch.Tensor):
            return ()
        overwrites: dict[int, None] = {}
        operands = node.all_input_nodes[:1] if _takes_over(node) else overwritable(node)
        for operand in operands:
            number = self.base[operand]
            aliases = [n for n in node.all_input_nodes if self.base.get(n) == number]
            if len(aliases) == 1 and self.sizes[number] == self.sizes[makes[0]]:
                overwrites[number] = None
        return tuple(overwrites)

    def _fills(self, node: fx.Node, makes: Sequence[int]) -> tuple[int, ...]:
        if node.target is not torch.ops.aten.cat.default or len(makes) != 1:
            return ()
        parts = Counter(self.base[n] for n in node.all_input_nodes)
        made = {s for op in self.ops for s in op.makes}
        return tuple(s for s, count in parts.items() if count == 1 and s in made)


def _takes_over(node: fx.Node) -> bool:
    return node.target is scaled_gradient


def _checks(node: fx.Node) -> bool:
    """Whether a node runs for what it does, not for its result: a check of values."""
    return node.op == "call_function" and node.is_impure()


def _recorded(recorder: Recorder) -> tuple[Work, Sequence[Kernel] | None]:
    """The work of the last operator; and its kernels, if the device's kernels were measured."""
    if not isinstance(recorder, KernelLog):
        return recorder.take()[0], None
    log, recorder.kernels = recorder.kernels, []
    return sum((work for work, _ in log), Work()), [kernel for _, kernel in log]


def _carrying(primals: Sequence[fx.Node], gradients: Sequence[Any]) -> set[fx.Node]:
    """Nodes that depend on an argument with a gradient."""
    carrying = {p for p, g in zip(primals, gradients, strict=True) if isinstance(g, fx.Node)}
    for node in primals[0].graph.nodes if primals else ():
        if any(n in carrying for n in node.all_input_nodes):
            carrying.add(node)
    return carrying


def _may_replay(node: fx.Node) -> bool:
    """Operators that write or draw random numbers may not; a mask drawn from the step's seed is a
    function of it. Collectives may, because all ranks run the same schedule, unless they are waited
    for elsewhere."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target in STARTS:
        return False
    return not (target._schema.is_mutable or draws(node))


def _kind(node: fx.Node) -> str:
    def described(n: fx.Node) -> Any:
        values = tensors_of(n.meta.get("val"))
        return tuple((tuple(t.shape), t.stride(), t.dtype) for t in values)

    return f"{node.target} {fx.node.map_arg((node.args, node.kwargs), described)}"


def _module(node: fx.Node) -> str:
    # in the backward, the module whose forward it belongs to
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


def _program(reader: _Reader, joint: JointGraph) -> Program:
    outputs, num_fwd_outputs = joint.gradients_too, len(joint.results)
    weights = [
        p for p, g in zip(joint.primals, outputs[num_fwd_outputs:], strict=True)
        if isinstance(g, fx.Node)
    ]  # fmt: skip

    def bases(nodes: Sequence[Any]) -> frozenset[int]:
        return frozenset(reader.base[n] for n in nodes if isinstance(n, fx.Node))

    ops, forward = reader.ops, set(reader.of_forward)
    gradients = bases(outputs[num_fwd_outputs:])
    nbytes, gradient_bytes = [0] * len(reader.sizes), {}
    for i, op in enumerate(ops):
        for s in op.makes:
            if i not in forward and s in gradients:
                gradient_bytes[s] = reader.sizes[s]
            else:
                nbytes[s] = reader.sizes[s]
    results = bases(outputs[:num_fwd_outputs])
    return Program(
        tuple(_in_modules(ops)), tuple(reader.of_forward), tuple(nbytes), results, gradients,
        bases(joint.tangents),
        beside=SIDE if reader.cluster.device.runs_beside else frozenset(),
        gradient_bytes=gradient_bytes, weights=bases(weights),
    )  # fmt: skip


def _in_modules(ops: Sequence[Op]) -> list[Op]:
    """Operators that no module called belong to their first reader's (gathers of parameters), or to
    the one whose value they read (sums of gradients)."""
    reader: dict[int, str] = {}
    modules = []
    for op in reversed(ops):
        modules.append(op.module or next((reader[s] for s in op.makes if reader.get(s)), ""))
        reader |= dict.fromkeys(op.reads, modules[-1])
    maker: dict[int, str] = {}
    named = []
    for op, of_reader in zip(ops, reversed(modules), strict=True):
        module = of_reader or next((maker[s] for s in op.reads if maker.get(s)), "")
        named.append(replace(op, module=module))
        maker |= dict.fromkeys(op.makes, module)
    return named
