"""Merges neighbours into one node whose choices are pairs, as long as that stays small.

Most choices of a node are settled once a neighbour's is: of the pairs, those go that another pair
never loses to, in time and in every row, whatever the other neighbours do. What follows a value
(views, pointwise operators) and what is stored for it (weights) disappears in this way, and the
integer program over what is left has few variables and a tight relaxation.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from autopar.solver.problem import Choices, PairCost, Problem, Row

# choices of a merged node
LARGEST = 4
# of a node whose pairs are formed at all
_MOST_PAIRS = 1500
_NOTHING = np.zeros((1, 0, 0))


class Merged:
    """The problem over merged nodes.

    Args:
        problem: its rows are part of the costs that must not get worse.

    Attributes:
        problem: the smaller one.
    """

    def __init__(self, problem: Problem, merge: bool = True) -> None:
        self._rows = problem.rows
        count = 1 + len(problem.rows)
        # costs stacked: time, then rows; [1 + rows, choices]
        self._node: dict[int, np.ndarray] = {}
        self._edge: dict[int, dict[int, np.ndarray]] = {v: {} for v in range(len(problem.time_us))}
        for v, time in enumerate(problem.time_us):
            stack = np.zeros((count, len(time)))
            stack[0] = time
            for r, row in enumerate(problem.rows, 1):
                if v in row.nodes:
                    stack[r] = row.nodes[v]
            self._node[v] = stack
        for e, edge in enumerate(problem.edges):
            stack = np.zeros((count, *edge.time_us.shape))
            stack[0] = edge.time_us
            for r, row in enumerate(problem.rows, 1):
                if e in row.edges:
                    stack[r] = row.edges[e]
            self._link(edge.source, edge.target, stack)
        # per node left: for every choice the choices of the nodes that it stands for
        self._members = {v: [v] for v in self._node}
        self._stands = {v: np.arange(s.shape[1])[:, None] for v, s in self._node.items()}
        if merge:
            self._merge()
        self._left = sorted(self._node)
        self.problem = self._smaller(problem)

    def expand(self, choices: Sequence[int]) -> Choices:
        """Choices of the original nodes."""
        found: dict[int, int] = {}
        for v, c in zip(self._left, choices, strict=True):
            found |= dict(zip(self._members[v], map(int, self._stands[v][c]), strict=True))
        return tuple(found[v] for v in range(len(found)))

    def _link(self, a: int, b: int, stack: np.ndarray) -> None:
        known = self._edge[a].get(b)
        total = stack if known is None else known + stack
        self._edge[a][b], self._edge[b][a] = total, total.transpose(0, 2, 1)

    def _merge(self) -> None:
        """Fewest pairs first; a node that stays too large is tried again when it has changed."""
        given_up: set[tuple[int, int]] = set()
        heap: list[tuple[int, int, int, int]] = []

        def offer(a: int) -> None:
            for b, stack in self._edge[a].items() if len(self._edge[a]) <= 2 else ():
                heapq.heappush(heap, (stack[0].size, len(self._edge[a]), a, b))

        for a in self._node:
            offer(a)
        while heap:
            size, _, a, b = heapq.heappop(heap)
            if size > _MOST_PAIRS:
                return
            stale = a not in self._node or self._edge[a].get(b, _NOTHING)[0].size != size
            if stale or len(self._edge[a]) > 2 or (a, b) in given_up:
                continue
            if self._try(a, b):
                given_up = {(c, d) for c, d in given_up if c not in (a, b) and d not in (a, b)}
                for c in (b, *self._edge[b]):
                    offer(c)
            else:
                given_up.add((a, b))

    def _try(self, a: int, b: int) -> bool:
        """Merge a into b if few enough of the pairs are left."""
        sizes = self._node[a].shape[1], self._node[b].shape[1]
        both = self._node[a][:, :, None] + self._node[b][:, None, :] + self._edge[a][b]
        i, j = np.nonzero(np.isfinite(both[0]))
        around: dict[int, np.ndarray] = {}
        for v, mine in ((a, i), (b, j)):
            for w, stack in self._edge[v].items():
                if w not in (a, b):
                    part = stack[:, mine, :]
                    around[w] = around[w] + part if w in around else part
        costs = both[:, i, j]
        kept = _undominated(costs, list(around.values()))
        if len(kept) > max(LARGEST, *sizes):
            return False
        for v in (a, b):
            for w in list(self._edge[v]):
                del self._edge[w][v]
            self._edge[v] = {}
        i, j = i[kept], j[kept]
        self._node[b] = costs[:, kept]
        self._members[b] = self._members[a] + self._members[b]
        self._stands[b] = np.hstack([self._stands[a][i], self._stands[b][j]])
        for w, stack in around.items():
            self._link(b, w, stack[:, kept, :])
        for table in (self._node, self._edge, self._members, self._stands):
            del table[a]
        return True

    def _smaller(self, problem: Problem) -> Problem:
        index = {v: i for i, v in enumerate(self._left)}
        ends = [(a, b) for a in self._left for b in self._edge[a] if a < b]
        rows = [
            Row(
                row.name,
                row.limit,
                {index[v]: self._node[v][r] for v in self._left if self._node[v][r].any()},
                {
                    e: np.where(np.isfinite(self._edge[a][b][0]), self._edge[a][b][r], 0.0)
                    for e, (a, b) in enumerate(ends)
                    if self._edge[a][b][r].any()
                },
                row.slack,
            )
            for r, row in enumerate(self._rows, 1)
        ]
        return Problem(
            tuple(self._node[v][0] for v in self._left),
            tuple(PairCost(index[a], index[b], self._edge[a][b][0]) for a, b in ends),
            tuple(rows),
            tuple(problem.name(v) for v in self._left),
        )


def _undominated(costs: np.ndarray, around: Sequence[np.ndarray]) -> np.ndarray:
    """Choices that no other one is never worse than.

    Args:
        costs: [criteria, choices].
        around: per neighbour [criteria, choices, its choices]; infinite time where forbidden.
    """
    count = costs.shape[1]
    order = np.lexsort((np.arange(count), costs[0]))
    kept: list[int] = []
    scale = np.maximum(1.0, np.abs(costs).max(axis=1, initial=0.0))[:, None]
    for j in order:
        rivals = np.array(kept, dtype=int)
        # what is put in the place of j may not be worse in any criterion
        worse = costs[:, rivals] - costs[:, j : j + 1]
        for stack in around:
            theirs, mine = stack[:, rivals, :], stack[:, j : j + 1, :]
            allowed = np.isfinite(mine[0])
            with np.errstate(invalid="ignore"):
                difference = np.where(allowed[None], theirs - mine, -np.inf)
            # where j is forbidden, nothing is asked of the other
            worse = worse + np.maximum(difference.max(axis=2), -1e30)
        if not (worse <= 1e-12 * scale).all(axis=0).any():
            kept.append(int(j))
    return np.array(sorted(kept), dtype=int)
