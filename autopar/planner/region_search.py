"""Regions around the peak of a program: where they may begin and end, and what each would need.

Regions are grown along every dim of every operator before the peak (`passes/regions.py`). What one
would need in slices is estimated from live ranges. Blocks repeat, so a region that is in all of
them counts for all.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.fx as fx

from autopar.errors import PlanError
from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph
from autopar.passes.regions import PIECES, Growth, Region, Ways, as_model_graph, may_split
from autopar.passes.split_regions import IN_SLICES, calls_in_order, split_region
from autopar.plan_records import TimeSplit
from autopar.planner.live_ranges import LiveRanges

log = logging.getLogger(__name__)

COUNTS = (2, 4, 8, 16, 32, 64)  # of slices
LEAST_GAIN = 0.01  # of the peak
_FURTHEST = 160  # operators before the peak at which a region may begin
_LONGEST = 240  # operators of a region
_SMALLEST_SHARE = 0.02  # of the peak: smaller results begin no region
_TRIED = 3  # regions per peak
_SAME_SHARE = 0.05  # of the peak: estimates that differ by less are the same
_SMALL = 0.25  # of what slices do not shrink: that much of a slice is small


@dataclass(frozen=True)
class Candidate:
    """A region with its number of slices.

    Args:
        nodes: its operators.
        peak_bytes: estimated, while it runs.
        covered: live bytes that it lowers, summed over its operators.
        raised: fewer slices seemed to fit, but to lower nothing.
    """

    split: TimeSplit
    nodes: tuple[fx.Node, ...]
    peak_bytes: float
    covered: float
    raised: bool


@dataclass
class RegionSearch:
    """Regions around the peak of a program.

    Args:
        gm: the program, with shapes.
        peak_bytes: simulated.
        peak_at: name of the operator of the program at which it is.
        training: a backward follows.
        nested: also within regions that are in slices already.
        known: ways that were worked out before.
    """

    gm: fx.GraphModule
    peak_bytes: float
    peak_at: str
    training: bool
    budget_bytes: float
    nested: bool = False
    known: Ways = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph: ModelGraph = as_model_graph(self.gm)
        self.order = calls_in_order(self.gm)
        self.number = {node: k for k, node in enumerate(self.order)}
        self.live = LiveRanges(self.gm, self.order)
        self.text = _as_text(self.order)
        names = {node.name: k for k, node in enumerate(self.order)}
        self.at = names.get(self.peak_at, self.live.peak_at)
        least = (1 - LEAST_GAIN) * self.live.live[self.at]
        self.peaks = {
            k for k, text in enumerate(self.text)
            if text == self.text[self.at] and self.live.live[k] >= least
        }  # fmt: skip

    def best(self) -> list[Candidate]:
        """The most promising regions, of different places or dims."""
        most = (1 - LEAST_GAIN) * self.peak_bytes
        found = [c for g in self._growths() for c in self._along(g) if c.peak_bytes <= most]
        fitting = [c for c in found if c.peak_bytes <= self.budget_bytes]
        grain = _SAME_SHARE * self.peak_bytes
        fitting.sort(key=lambda c: (c.raised, c.split.slices, -c.covered, -_many(c)))
        ranked = fitting[:1] + sorted(
            found, key=lambda c: (c.raised, c.peak_bytes // grain, -c.covered, -_many(c))
        )
        chosen: dict[tuple[str, int], Candidate] = {}
        for c in ranked:
            chosen.setdefault((c.split.first, c.split.dim), c)
            if len(chosen) == _TRIED:
                break
        return list(chosen.values())

    def _growths(self) -> Iterator[Growth]:
        smallest = _SMALLEST_SHARE * self.peak_bytes
        for k in range(self.at, max(-1, self.at - _FURTHEST), -1):
            node = self.order[k]
            if IN_SLICES in node.meta and not self.nested:
                return
            if node.target is operator.getitem or not may_split(node):
                continue
            value = tensors_of(node.meta["val"])[0]
            if value.nbytes < smallest or self.live.is_view(node):
                continue
            for dim, extent in enumerate(value.shape):
                for pieces in (int(extent), *(n for n in PIECES if n < extent)):
                    if pieces < 2 or extent % pieces:
                        continue
                    growth = Growth(self.graph, self.order, k, dim, pieces, self.known)
                    if growth.began and self._reaches(growth):
                        yield growth
                        break

    def _reaches(self, growth: Growth) -> bool:
        while growth.end < self.at:
            if not self._advance(growth):
                return False
        return True

    def _advance(self, growth: Growth) -> bool:
        following = growth.order[growth.end + 1 : growth.end + 2]
        sliced = any(IN_SLICES in node.meta for node in following)
        return (self.nested or not sliced) and growth.advance()

    def _along(self, growth: Growth) -> Iterator[Candidate]:
        """A region that has grown to the peak, with every end."""
        while True:
            region = growth.region()
            if region is not None:
                candidate = self._candidate(region, growth)
                if candidate is not None:
                    yield candidate
            if growth.end - growth.start > _LONGEST or not self._advance(growth):
                return

    def _places(self, first: int, last: int) -> int | None:
        """How many regions equal that one; None if none of them has an equal operator at which as
        much is alive as at the peak."""
        pattern = self.text[first : last + 1]
        places, uncovered, start = 0, self.peaks, self.text.find(pattern)
        while start >= 0:
            end = start + len(pattern)
            places, uncovered = places + 1, uncovered - set(range(start, end))
            start = self.text.find(pattern, end)
        return None if uncovered else places

    def _candidate(self, region: Region, growth: Growth) -> Candidate | None:
        fixed, inner = self.live.of_region(region, growth.start, growth.end, self.training)
        if inner <= 0:
            return None
        places = self._places(growth.start, growth.end)
        if places is None:
            return None
        most = min(COUNTS[-1], region.pieces)
        counts = [n for n in COUNTS if n <= most] or [most]
        live = self.live.live[growth.start : growth.end + 1]
        enough = next(
            (n for n in counts if fixed + inner / n <= self.budget_bytes),
            next((n for n in counts if inner / n <= _SMALL * fixed), counts[-1]),
        )
        count = next((n for n in counts if n >= enough and fixed + inner / n < live.max()), None)
        if count is None:
            return None
        first, last = region.nodes[0], region.nodes[-1]
        info = [n.meta["autopar"] for n in region.nodes if n.meta.get("autopar")]
        value = tensors_of(first.meta["val"])[0]
        at_once = self.training and _is_loss(region)
        split = TimeSplit(
            first.name, last.name, region.dim, region.pieces, count, at_once,
            f"dim {region.dim} of size {int(value.shape[region.dim])} of {_named(first)}",
            tuple(dict.fromkeys(i.module for i in info)),
            tuple(dict.fromkeys(i.source for i in (info[0], info[-1]))),
        )  # fmt: skip
        peak = fixed + inner / count
        covered = places * float(np.maximum(live - peak, 0).sum())
        return Candidate(split, region.nodes, peak, covered, count > enough)


def _many(candidate: Candidate) -> int:
    """Slices that there can be."""
    return min(candidate.split.pieces, COUNTS[-1])


def _as_text(order: Sequence[fx.Node]) -> str:
    """Operators as characters, equal for equal operators on values of the same shapes."""
    known: dict[object, str] = {}
    kinds = (
        (str(n.target), *((tuple(t.shape), t.dtype) for t in tensors_of(n.meta.get("val"))))
        for n in order
    )
    return "".join(known.setdefault(kind, chr(0x1000 + len(known))) for kind in kinds)


def _named(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _is_loss(region: Region) -> bool:
    """Whether all it gives is one number that is a sum over slices."""
    if len(region.given) != 1:
        return False
    ((node, result),) = region.given
    value = tensors_of(node.meta["val"])[result]
    short = any(
        t.dtype is torch.float16 for n in region.nodes for t in tensors_of(n.meta.get("val"))
    )
    return value.ndim == 0 and region.given[node, result] == "P" and not short


def _signature(nodes: Sequence[fx.Node]) -> tuple[object, ...]:
    """Equal for regions of the same operators on values of the same shapes."""
    number = {node: k for k, node in enumerate(nodes)}

    def described(n: fx.Node) -> Any:
        if n in number:
            return number[n]
        return tuple((tuple(t.shape), t.dtype) for t in tensors_of(n.meta.get("val")))

    return tuple(
        (str(n.target), repr(fx.node.map_arg((n.args, n.kwargs), described))) for n in nodes
    )


def split_equal(gm: fx.GraphModule, candidate: Candidate) -> list[TimeSplit]:
    """Split a region and those that equal it, in place."""
    order, made = calls_in_order(gm), list[TimeSplit]()
    length, k = len(candidate.nodes), 0
    signature = _signature(candidate.nodes)
    known: Ways = {}
    graph = as_model_graph(gm)
    while k + length <= len(order):
        nodes = order[k : k + length]
        if nodes[0].target is candidate.nodes[0].target and _signature(nodes) == signature:
            growth = Growth(graph, order, k, candidate.split.dim, candidate.split.pieces, known)
            while growth.began and growth.end < k + length - 1 and growth.advance():
                pass
            region = growth.region() if growth.end == k + length - 1 else None
            if region is not None:
                split = _renamed(candidate.split, region)
                try:
                    split_region(gm, region, split)
                except PlanError as error:
                    log.info("not split: %s", error)
                    return []
                made.append(split)
                k += length
                continue
        k += 1
    return made


def _renamed(split: TimeSplit, region: Region) -> TimeSplit:
    """The same split of a region that equals the first."""
    info = [n.meta["autopar"] for n in region.nodes if n.meta.get("autopar")]
    return replace(
        split, first=region.nodes[0].name, last=region.nodes[-1].name,
        modules=tuple(dict.fromkeys(i.module for i in info)),
        sources=tuple(dict.fromkeys(i.source for i in (info[0], info[-1]))),
    )  # fmt: skip
