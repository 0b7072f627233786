"""Cheapest ways through a graph of layouts, for whole arrays of prices at once.

The distances to a target are the greatest fixpoint of

    D[target] = 0        D[s] = min(D[s], price(s -> t) + D[t])    over all steps s -> t

and are found by applying the right-hand side until nothing changes (Bellman-Ford), to all specs and
many targets in one NumPy expression. It takes as many rounds as the cheapest paths have steps, and
a path is a handful of collectives.

A sum is never made pending only to be reduced again on the way: `inject` steps come last. So the
iteration starts from the target and from the specs that injections alone lead from to it.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from autopar.sharding.conversion_graph import INJECT, SpecGraph

# Targets solved for at once: bounds the memory where a mesh has many axes.
_AT_ONCE = 256


class LegalSteps:
    """The steps of a graph between specs that are legal for a shape; injections apart.

    Args:
        graph: of all specs.
        legal: mask of the specs under which every rank holds an element.
    """

    def __init__(self, graph: SpecGraph, legal: np.ndarray) -> None:
        self.graph, self.legal = graph, legal
        edges = graph.edges
        allowed = legal[edges.source] & legal[edges.target]
        inject = edges.kind == INJECT
        self.moves = edges.where(allowed & ~inject)
        self.injections = edges.where(allowed & inject)
        # moves first[s] : first[s + 1] leave spec s
        self.first = np.searchsorted(self.moves.source, np.arange(len(graph) + 1))
        count = np.diff(self.first)
        # Specs by falling number of moves, so that those with a k-th move stand in front: `slots`
        # has, for each k, where the k-th moves of these lead, and which moves they are.
        self.by_count = np.argsort(-count, kind="stable")
        place = np.empty_like(self.by_count)
        place[self.by_count] = np.arange(len(graph))
        self.slots: list[tuple[np.ndarray, np.ndarray]] = []
        for k in range(int(count.max(initial=0))):
            moves = self.first[self.by_count[: int((count > k).sum())]] + k
            self.slots.append((place[self.moves.target[moves]], moves))


class Search:
    """Distances and paths under one set of prices, solved per target when first asked for.

    Args:
        steps: that may be taken.
        move_us: price of each of `steps.moves`.
        inject_us: price of each of `steps.injections`.
    """

    def __init__(self, steps: LegalSteps, move_us: np.ndarray, inject_us: np.ndarray) -> None:
        self.steps, self.move_us, self.inject_us = steps, move_us, inject_us
        self._to: dict[int, np.ndarray] = {}

    def distances(self, targets: Iterable[int]) -> list[np.ndarray]:
        """Per target, the microseconds from every spec; infinite where there is no way."""
        wanted = list(targets)
        new = list(dict.fromkeys(t for t in wanted if t not in self._to))
        for start in range(0, len(new), _AT_ONCE):
            block = new[start : start + _AT_ONCE]
            self._to.update(zip(block, self._solve(np.array(block)), strict=True))
        return [self._to[t] for t in wanted]

    def _solve(self, targets: np.ndarray) -> np.ndarray:
        """[target, spec]."""
        steps, graph = self.steps, self.steps.graph
        distance = np.full((len(graph), len(targets)), np.inf)
        distance[targets, np.arange(len(targets))] = 0.0
        for axis in range(len(graph.axes)):
            some = np.flatnonzero(steps.injections.axis == axis)
            source, target = steps.injections.source[some], steps.injections.target[some]
            through = distance[target] + self.inject_us[some, None]
            distance[source] = np.minimum(distance[source], through)

        distance = distance[steps.by_count]
        slots = [(to, self.move_us[moves, None]) for to, moves in steps.slots]
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
        found = np.empty_like(distance.T)
        found[:, steps.by_count] = distance.T
        return found

    def path(self, source: int, target: int) -> tuple[list[int], list[int]]:
        """Positions in `steps.moves`, then in `steps.injections`, of the steps to take.

        The distance must be finite.
        """
        (distance,) = self.distances([target])
        moves, injections = self.steps.moves, self.steps.injections
        here, taken, injected = source, [], []
        while here != target:
            start, end = self.steps.first[here : here + 2]
            through = self.move_us[start:end] + distance[moves.target[start:end]]
            if start == end or through.min() > distance[here]:
                break  # only injections remain
            # of equally cheap steps the first, whatever rounding says
            best = start + int(np.argmax(through <= distance[here] * (1 + 1e-12)))
            taken.append(best)
            here = int(moves.target[best])
        while here != target:
            out = np.flatnonzero(injections.source == here)
            missing = self.steps.graph.partial[target] & ~self.steps.graph.partial[here]
            best = int(out[np.argmax(missing >> injections.axis[out] & 1)])
            injected.append(best)
            here = int(injections.target[best])
        return taken, injected
