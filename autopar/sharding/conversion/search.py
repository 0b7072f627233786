"""Cheapest paths through a graph of layouts, for many targets at once.

The distances to a target are the greatest fixpoint of

    D[target] = 0        D[s] = min(D[s], price(s -> t) + D[t])    over all steps s -> t

The right-hand side is applied until nothing changes (Bellman-Ford), to all specs and many targets
in one NumPy expression. The number of rounds is the number of steps of the longest cheapest path,
which is a handful of collectives.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from autopar.sharding.conversion.graph import SpecGraph

# Targets per batch: bounds the memory on meshes of many axes.
_BATCH = 256


class LegalSteps:
    """The steps of a graph between specs that are legal for a shape.

    Args:
        graph: of all specs.
        legal: mask of the specs under which every rank holds an element.
    """

    def __init__(self, graph: SpecGraph, legal: np.ndarray) -> None:
        self.graph, self.legal = graph, legal
        edges = graph.edges
        self.edges = edges.where(legal[edges.source] & legal[edges.target])
        # steps first[s] : first[s + 1] leave spec s
        self.first = np.searchsorted(self.edges.source, np.arange(len(graph) + 1))
        count = np.diff(self.first)
        # Specs in decreasing order of their number of steps, so that those with a k-th step come
        # first. For each k, `slots` has the targets of their k-th steps and the numbers of the
        # steps.
        self.by_count = np.argsort(-count, kind="stable")
        place = np.empty_like(self.by_count)
        place[self.by_count] = np.arange(len(graph))
        self.slots: list[tuple[np.ndarray, np.ndarray]] = []
        for k in range(int(count.max(initial=0))):
            steps = self.first[self.by_count[: int((count > k).sum())]] + k
            self.slots.append((place[self.edges.target[steps]], steps))


class Search:
    """Distances and paths under one set of prices, solved per target when first asked for.

    Args:
        steps: that may be taken.
        price_us: of each of `steps.edges`.
    """

    def __init__(self, steps: LegalSteps, price_us: np.ndarray) -> None:
        self.steps, self.price_us = steps, price_us
        self._to: dict[int, np.ndarray] = {}

    def distances(self, targets: Iterable[int]) -> list[np.ndarray]:
        """Per target, the microseconds from every spec; infinite where there is no path."""
        targets = list(targets)
        new = list(dict.fromkeys(t for t in targets if t not in self._to))
        for start in range(0, len(new), _BATCH):
            block = new[start : start + _BATCH]
            self._to.update(zip(block, self._solve(np.array(block)), strict=True))
        return [self._to[t] for t in targets]

    def _solve(self, targets: np.ndarray) -> np.ndarray:
        """[target, spec]."""
        steps, graph = self.steps, self.steps.graph
        distance = np.full((len(graph), len(targets)), np.inf)
        distance[targets, np.arange(len(targets))] = 0.0
        distance = distance[steps.by_count]
        slots = [(to, self.price_us[which, None]) for to, which in steps.slots]
        work = np.empty_like(distance)
        while True:
            before = distance.copy()
            for to, price in slots:
                through, here = work[: len(to)], distance[: len(to)]
                np.take(distance, to, axis=0, out=through, mode="clip")  # "raise" would buffer
                through += price
                np.minimum(here, through, out=here)
            if np.array_equal(before, distance):
                break
        by_spec = np.empty_like(distance.T)
        by_spec[:, steps.by_count] = distance.T
        return by_spec

    def path(self, source: int, target: int) -> list[int]:
        """Positions in `steps.edges` of a cheapest path's steps; the distance must be finite."""
        (distance,) = self.distances([target])
        targets = self.steps.edges.target
        here, taken = source, []
        while here != target:
            start, end = self.steps.first[here : here + 2]
            through = self.price_us[start:end] + distance[targets[start:end]]
            # the first of equally cheap steps, up to rounding
            taken.append(int(start + np.argmax(through <= distance[here] * (1 + 1e-12))))
            here = int(targets[taken[-1]])
        return taken
