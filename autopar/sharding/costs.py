"""What a strategy of an operator costs one device: time by a roofline, bytes by its layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch.fx as fx

from autopar.profiler.cluster import ClusterInfo
from autopar.profiler.profile import NodeProfile
from autopar.sharding.node_rules import results, rule_of
from autopar.sharding.rule import Strategy
from autopar.sharding.saved import SavedValues
from autopar.sharding.spec import ShardingSpec, local_shape
from autopar.tracer.graph import operands, shape_of


class OpCosts:
    """Costs of strategies on one cluster.

    Args:
        cluster: the devices.
        profile: costs of every operator call at global shapes.
        saved: which values backward keeps.
    """

    def __init__(
        self, cluster: ClusterInfo, profile: Mapping[fx.Node, NodeProfile], saved: SavedValues
    ) -> None:
        self.cluster, self.profile, self.saved = cluster, profile, saved
        self.mesh = cluster.mesh
        self.local_bytes = lru_cache(maxsize=None)(self._local_bytes)

    def _local_bytes(self, shape: tuple[int, ...], itemsize: int, spec: ShardingSpec) -> int:
        """Bytes on the fullest rank."""
        first = (0,) * len(self.mesh)
        return itemsize * int(np.prod(local_shape(shape, spec, self.mesh, first), dtype=np.int64))

    def compute_us(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """Roofline: the larger of arithmetic and memory traffic, plus launches."""
        profile, device = self.profile[node], self.cluster.device
        fakes = [n.meta["val"] if n is not None else None for n in operands(node)]
        outs = results(node)
        whole = sum(t.numel() * t.element_size() for t in (*fakes, *outs) if t is not None) or 1
        share = np.array([s.share(self.mesh) for s in found])
        local = np.array(
            [
                sum(
                    self.local_bytes(shape_of(t), t.element_size(), spec)
                    for t, spec in zip((*fakes, *outs), (*s.inputs, *s.outputs), strict=True)
                    if t is not None and spec is not None
                )
                for s in found
            ]
        )
        dtype = str(outs[0].dtype).removeprefix("torch.") if outs else "float32"
        peak = device.flops_per_s(dtype)

        def roofline(flops: int, nbytes: int, kernels: int) -> np.ndarray:
            arithmetic = 1e6 * flops * share / peak
            traffic = 1e6 * nbytes * (local / whole) / device.bandwidth
            return np.maximum(arithmetic, traffic) + device.launch_us * kernels

        p = profile
        return roofline(p.forward_flops, p.forward_bytes, p.forward_kernels) + roofline(
            p.backward_flops, p.backward_bytes, p.backward_kernels
        )

    def lowering_us(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """Collectives inside of lowerings: per axis, three small all-reduces forward and two
        backward of the operands that lack the split factor (targets, statistics)."""
        rule, _ = rule_of(node)
        costs = np.zeros(len(found))
        for i, strategy in enumerate(found):
            for name, axes in strategy.splits.items():
                if not (strategy.lowered and rule.factors[name].complete):
                    continue
                small = sum(
                    n.meta["val"].numel() * 8
                    for n, dims in zip(operands(node), rule.inputs, strict=True)
                    if n is not None and dims is not None and name not in dims
                )
                for axis in axes:
                    link, size = self.cluster.links[axis], self.mesh[axis]
                    once = 2 * (size - 1) * (link.alpha + small / size * link.beta)
                    costs[i] += 5e6 * once
        return costs

    def saved_bytes(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """What backward keeps of an operator, each value counted where it is first saved."""
        profile = self.profile[node]
        ins, outs = operands(node), results(node)
        mine = [i for i in profile.saves_inputs if self.saved.counted_here(node, i)]
        total = np.zeros(len(found))
        for k, s in enumerate(found):
            nbytes = profile.saved_internal_bytes * s.share(self.mesh)
            for i in mine:
                value, spec = ins[i], s.inputs[i]
                assert value is not None
                assert spec is not None
                fake = value.meta["val"]
                nbytes += self.local_bytes(shape_of(fake), fake.element_size(), spec)
            for i in profile.saves_outputs:
                if self.saved.output_counted(node, i):
                    t = outs[i]
                    nbytes += self.local_bytes(shape_of(t), t.element_size(), s.outputs[i])
            total[k] = nbytes
        return total

    def working_bytes(self, node: fx.Node, found: Sequence[Strategy]) -> np.ndarray:
        """Gradients of an operator's operands and results, alive together in its backward."""
        if not self.profile[node].differentiable:
            return np.zeros(len(found))
        values = [n.meta["val"] if n is not None else None for n in operands(node)]
        floats = [
            (i, shape_of(t), t.element_size())
            for i, t in enumerate((*values, *results(node)))
            if t is not None and t.dtype.is_floating_point
        ]
        layouts = [(*s.inputs, *s.outputs) for s in found]
        return np.array(
            [
                float(sum(self.local_bytes(shape, size, specs[i]) for i, shape, size in floats))
                for specs in layouts
            ]
        )
