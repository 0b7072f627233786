"""Live ranges of the values of a forward program, and what a region of it takes in slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch.fx as fx

from autopar.ir.aliasing import tensors_of
from autopar.passes.regions import Region


class LiveRanges:
    """Storages of a program with shapes, from their making to their last use.

    Views share the storage of what they show. What operators hold inside is not seen.
    """

    def __init__(self, gm: fx.GraphModule, order: Sequence[fx.Node]) -> None:
        number = self.number = {node: k for k, node in enumerate(order)}
        keys: dict[int, int] = {}
        self.start: list[int] = []
        self.end: list[int] = []
        self.nbytes: list[int] = []
        self.of: dict[fx.Node, list[int]] = {}
        for node in gm.graph.nodes:
            at = number.get(node, -1 if node.op != "output" else len(order))
            for n in node.all_input_nodes:
                for s in self.of[n]:
                    self.end[s] = at
            self.of[node] = []
            for t in tensors_of(node.meta.get("val")) if node.op != "output" else ():
                key = t.untyped_storage()._cdata
                if key not in keys:
                    keys[key] = len(self.start)
                    given = node.op in ("placeholder", "get_attr")
                    self.start.append(-1 if given else at)
                    self.end.append(at)
                    self.nbytes.append(0 if given else int(t.untyped_storage().nbytes()))
                self.of[node].append(keys[key])
        start, end = np.array(self.start), np.array(self.end)
        nbytes = np.array(self.nbytes, dtype=np.float64)
        self.starts, self.ends, self.sizes = start, end, nbytes
        count = len(order) + 2
        change = np.bincount(np.maximum(start, 0), nbytes, count)
        change -= np.bincount(np.maximum(end, 0) + 1, nbytes, count)[:count]
        self.live = np.cumsum(change)
        self.peak_at = int(self.live[: len(order)].argmax()) if order else 0

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node makes no storage."""
        return all(self.start[s] != self.number.get(node) for s in self.of[node])

    def of_region(
        self, region: Region, first: int, last: int, training: bool
    ) -> tuple[float, float]:
        """Bytes that stay as they are while a region runs in slices, and those that are divided by
        the number of slices."""
        starts, ends, sizes = self.starts, self.ends, self.sizes
        held = float(sizes[(starts < first) & (ends >= first)].sum())
        inside = (starts >= first) & (starts <= last)
        fixed = set[int]()
        for node in region.before:
            fixed.update(s for s in self.of[node] if inside[s])
        sums = parts = 0.0
        for (node, k), state in region.given.items():
            own = self.of[node]
            s = own[k] if k < len(own) else own[0]
            if inside[s]:
                fixed.add(s)
            if state == "P":
                sums += float(sizes[s])
            else:
                parts += float(sizes[s])
        whole = float(sizes[list(fixed)].sum()) if fixed else 0.0
        mask = inside.copy()
        mask[list(fixed)] = False
        if training:  # the backward of a slice has all of them
            inner = 2 * float(sizes[mask].sum())
        else:
            span = last - first + 2
            begin = starts[mask] - first
            until = np.minimum(ends[mask], last) - first + 1
            change = np.bincount(begin, sizes[mask], span) - np.bincount(until, sizes[mask], span)
            inner = float(np.cumsum(change).max(initial=0))
        return held + whole + sums, inner + parts
