"""Costs of an operator's strategies on one device: time by the time model, bytes by the layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from autopar.cluster.cluster import ClusterInfo
from autopar.ir.graph import operands, producer, shape_of
from autopar.ir.spec import ShardingSpec, local_shape
from autopar.planner.decisions import Workload
from autopar.planner.saved_values import SavedValues
from autopar.profiler.counting import Work
from autopar.profiler.profile import NodeProfile
from autopar.profiler.tape import OWN
from autopar.profiler.time_model import Kernel, kernels_of, node_us
from autopar.sharding.lowerings.declared import Declared
from autopar.sharding.node_rules import call_of, declared_of, results
from autopar.sharding.rule import Strategy

# Over gradients of two bytes, to add them to sums of four: read both, write the sum.
ACCUMULATION_PASSES = 5

# Passes over the parameter that one step of torch's optimizers makes, by the state per byte of
# parameter: SGD 3 (two reads, one write), with momentum 8, Adam's eight operators 19.
_STEP = ((0.0, 3.0), (1.0, 8.0), (2.0, 19.0))


class OpCosts:
    """Costs of strategies on one cluster, from profiles at global shapes."""

    def __init__(
        self, cluster: ClusterInfo, profile: Mapping[fx.Node, NodeProfile], saved: SavedValues
    ) -> None:
        self.cluster, self.profile, self.saved = cluster, profile, saved
        self.mesh = cluster.mesh
        self.local_bytes = lru_cache(maxsize=None)(self._local_bytes)
        self._call_of = lru_cache(maxsize=None)(call_of)
        self._declared: dict[tuple[fx.Node, str], Declared] = {}  # by the strategy's name
        software = cluster.software
        self.hides = 1.0 if software is None else software.hides
        if not cluster.device.runs_beside:
            self.hides = 0.0

    def _local_bytes(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> int:
        """Bytes on the fullest rank."""
        first = (0,) * len(self.mesh)
        return itemsize * int(np.prod(local_shape(shape, spec, self.mesh, first), dtype=np.int64))

    def _tensor_bytes(self, value: torch.Tensor, spec: ShardingSpec | None) -> int:
        """Bytes of a value on the fullest rank; 0 for an operand without a layout."""
        if spec is None:
            return 0
        return self.local_bytes(shape_of(value), value.element_size(), spec)

    def _declared_of(self, node: fx.Node, strategy: Strategy) -> Declared:
        """What a strategy's lowering declares for a call on the first rank."""
        key = node, strategy.name
        if key not in self._declared:
            call = self._call_of(node)
            self._declared[key] = declared_of(node, strategy, self.mesh, call=call)
        return self._declared[key]

    def compute_us(
        self, node: fx.Node, strategies: Sequence[Strategy]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Forward and backward, by `profiler.time_model`: the larger of arithmetic and memory
        traffic, plus launches."""
        values = [*_values(node), *results(node)]
        total = sum(t.numel() * t.element_size() for t in values if t is not None) or 1
        share = np.array([s.share(self.mesh) for s in strategies])
        local = np.zeros(len(strategies), dtype=np.int64)
        for k, s in enumerate(strategies):
            pairs = zip(values, (*s.inputs, *s.outputs), strict=True)
            local[k] = sum(self._tensor_bytes(t, spec) for t, spec in pairs if t is not None)
        device, traffic = self.cluster.device, local / total
        software = self.cluster.software
        if software is not None and software.fuses and self._fusible(node):
            forward, backward = self._fused(node)
        else:
            forward, backward = kernels_of(node, self.profile[node], device)
        return node_us(forward, device, share, traffic), node_us(backward, device, share, traffic)

    def _fusible(self, node: fx.Node) -> bool:
        """Whether an operator can be a part of a kernel with its neighbours: it has no products."""
        known = self.profile.get(node)
        return known is not None and not known.forward.flops

    def _fused(self, node: fx.Node) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
        """The kernels of an operator that is fused with its neighbours: values that pass between
        two of them are not moved. The backward reads the operands and the gradient of the result
        where these are moved, and writes the gradients of the operands."""
        sources = [n for n in operands(node) if n is not None]
        read = sum(n.meta["val"].nbytes for n in sources if not self._fusible(producer(n)[0]))
        leaves = not all(self._fusible(user) for user in node.users)
        written = sum(t.nbytes for t in results(node)) if leaves else 0
        if self.profile[node].aliases_input:
            return (), ()
        forward = Kernel(Work(0, read, written, 1 if read or written else 0), "float32")
        backward = Kernel(Work(0, read + written, read, forward.work.kernels), "float32")
        return (forward,), (backward,) if self.profile[node].differentiable else ()

    def host_us(self, node: fx.Node) -> tuple[float, float]:
        """What the host takes to launch an operator's forward and its backward, whatever the
        strategy."""
        software, profile = self.cluster.software, self.profile[node]
        if software is None:
            return 0.0, 0.0
        return software.forward_us, software.backward_us * profile.differentiable

    def step_us(self, nbytes: np.ndarray, state: float) -> np.ndarray:
        """The optimizer's step on one parameter: memory traffic and launches.

        Args:
            nbytes: of the local parameter.
            state: bytes of optimizer state per byte of parameter.
        """
        device = self.cluster.device
        states, counts = map(list, zip(*_STEP, strict=True))
        passes, kernels = float(np.interp(state, states, counts)), round(1 + 3.5 * state)
        launches = kernels * device.launch_us if device.kind == "cpu" else 0.0
        return passes * nbytes / device.bandwidth * 1e6 + launches

    def accumulation_us(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> float:
        """What it takes to add the gradient of a weight to that of earlier microbatches.

        The product that makes it also reads the total. Gradients of two bytes are added by
        themselves, to totals of four (`passes/accumulate.py`).
        """
        nbytes = self.local_bytes(shape, itemsize, spec)
        passes = 1 if itemsize > 2 else ACCUMULATION_PASSES
        return 1e6 * passes * nbytes / self.cluster.device.bandwidth

    def cast_us(self, nbytes: np.ndarray, ratio: float, trains: bool) -> np.ndarray:
        """The cast of a parameter to the dtype of compute, and of its gradient back.

        Args:
            nbytes: of the local parameter at rest.
            ratio: bytes in the dtype of compute per byte at rest.
        """
        device = self.cluster.device
        read, write = device.bytes_curve("read"), device.bytes_curve("write")
        us = device.launch_us + read.us(nbytes) + write.us(ratio * nbytes)
        if trains:
            us = us + device.launch_us + read.us(ratio * nbytes) + write.us(nbytes)
        return us

    def step_copies(self, workload: Workload) -> float:
        """Temporary bytes of the step, per byte of parameter: torch's implementation over lists of
        tensors, the default on GPUs, takes the root of all second moments at once."""
        fused = self.cluster.device.kind == "cpu" or workload.state_bytes_per_param_byte < 2
        return 0.0 if fused else 1.0

    def lowering_us(
        self, node: fx.Node, strategies: Sequence[Strategy], compute_us: np.ndarray
    ) -> np.ndarray:
        """What lowerings take beyond the operator's own kernels: collectives, and passes over the
        first operand that an operator as a whole does without.

        Args:
            compute_us: of each strategy, beside which some collectives run.
        """
        times = zip(strategies, compute_us, strict=True)
        return np.array([self._lowering_us(node, s, float(t)) if s.lowered else 0.0
                         for s, t in times])  # fmt: skip

    def _lowering_us(self, node: fx.Node, strategy: Strategy, compute_us: float) -> float:
        first, spec = operands(node)[0], strategy.inputs[0]
        if first is None or spec is None:
            return 0.0
        value, work = first.meta["val"], self._declared_of(node, strategy)
        total = beside = 0.0
        for c in work.collectives:
            link, size = self.cluster.links[c.axis], self.mesh[c.axis]
            nbytes = c.elements * max(value.element_size(), 4 * c.wide)
            us = (c.forward + c.backward) * float(link.collective_us(c.kind, size, nbytes))
            hides = self.hides if c.beside else 0.0
            beside += hides * us
            total += (1 - hides) * us
        device = self.cluster.device
        if work.kernels:
            again = float(device.bytes_curve("read").us(work.elements * value.element_size()))
            compute_us += again
            total += again + work.kernels * device.launch_us
        total += max(0.0, beside - compute_us)
        if not work.passes:
            return total
        nbytes = self._tensor_bytes(value, spec)
        moved = device.bytes_curve("read").us(nbytes) + device.bytes_curve("write").us(nbytes)
        return total + work.passes * (float(moved) + device.launch_us)

    def saved_bytes(self, node: fx.Node, strategies: Sequence[Strategy]) -> np.ndarray:
        """Bytes saved for an operator's backward, each value counted where it is first saved."""
        tape, values, outs = self.profile[node].tape, _values(node), results(node)
        ins = [i for i in tape.saved_operands if self.saved.counted_here(node, i)]
        own = [i for i in tape.saved_results if self.saved.output_counted(node, i)]
        total = np.zeros(len(strategies))
        for k, s in enumerate(strategies):
            nbytes = tape.saved_own_bytes * s.share(self.mesh)
            nbytes += sum(
                self._tensor_bytes(values[i], s.inputs[i]) * self.saved.whole(node, i) for i in ins
            )
            if s.lowered and tape.saved and values[0] is not None:
                nbytes += self._declared_of(node, s).saved * values[0].element_size()
            total[k] = sum((self._tensor_bytes(outs[i], s.outputs[i]) for i in own), nbytes)
        return total

    def result_bytes(self, node: fx.Node, strategies: Sequence[Strategy]) -> np.ndarray:
        """Bytes of an operator's results."""
        outs = results(node)
        return np.array([
            float(sum(map(self._tensor_bytes, outs, s.outputs))) for s in strategies
        ])  # fmt: skip

    def working_bytes(self, node: fx.Node, strategies: Sequence[Strategy]) -> np.ndarray:
        """Bytes alive while an operator runs, beside saved values: in backward the gradients of its
        results and of its operands, and its temporaries; in forward its temporaries."""
        profile = self.profile[node]
        tape, values, outs = profile.tape, _values(node), results(node)
        emitted = {e.storage: e.operand for e in tape.emitted if e.storage.owner == OWN}
        own = max(tape.levels(tape.backward, overwriting=True))
        own -= sum(tape.sizes[s.number] for s in emitted)
        arriving = [i for i, carries in enumerate(profile.carries) if carries]
        total = np.zeros(len(strategies))
        for k, s in enumerate(strategies):
            share = s.share(self.mesh)
            nbytes = max(0.0, float(own)) * share
            operands_bytes = (self._tensor_bytes(values[i], s.inputs[i]) for i in emitted.values())
            nbytes = sum(operands_bytes, nbytes)
            nbytes = sum((self._tensor_bytes(outs[i], s.outputs[i]) for i in arriving), nbytes)
            total[k] = max(nbytes, float(profile.forward_transient_bytes) * share)
        return total


def _values(node: fx.Node) -> list[Any]:
    """The operands' tensors, None where an optional one is missing."""
    return [n.meta["val"] if n is not None else None for n in operands(node)]
