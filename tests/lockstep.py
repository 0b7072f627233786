"""All ranks of a mesh in one thread, for tests of single collectives.

Every rank's call runs twice. The first run records what the rank sends. The second run reads what
all ranks sent. This is exact if a call contains at most one collective.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch

from autopar.comm.groups import Group


class Lockstep:
    """Groups for all ranks of a mesh: `names[coords][axis]`.

    `sent` counts the bytes that all ranks have sent to others, by the ring algorithm.
    """

    def __init__(self, mesh: Sequence[int], prefix: str) -> None:
        self.sending, self.sent = False, 0.0
        self.ranks = list(product(*(range(size) for size in mesh)))
        boards: dict[tuple[int, tuple[int, ...]], list[Any]] = {}
        self.names = {}
        for coords in self.ranks:
            names = []
            for axis, size in enumerate(mesh):
                board = boards.setdefault((axis, coords[:axis] + coords[axis + 1 :]), [None] * size)
                names.append(f"{prefix}/{','.join(map(str, coords))}/axis{axis}")
                _Group(names[-1], coords[axis], board, self)
            self.names[coords] = tuple(names)

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of one call per rank."""
        self.sending = True
        for call in calls:
            call()
        self.sending = False
        return [call() for call in calls]


class _Group(Group):
    def __init__(self, name: str, index: int, board: list[Any], world: Lockstep) -> None:
        super().__init__(name, len(board), index)
        self.board, self.world = board, world

    def _all(self, x: torch.Tensor, share: float) -> torch.Tensor:
        """What all ranks sent; each sends that share of its x to each other rank."""
        if self.world.sending:
            self.world.sent += share * (self.size - 1) * x.nbytes
            self.board[self.index] = x.detach().clone()
            return torch.zeros(self.size, *x.shape, dtype=x.dtype)
        return torch.stack(self.board)

    def all_reduce(self, x: torch.Tensor, op: str) -> torch.Tensor:
        terms = self._all(x, 2 / self.size)
        return terms.sum(0) if op == "sum" else terms.amax(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self._all(x, 1.0)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self._all(x, 1 / self.size)[:, self.index].sum(0)

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        return self._all(x, 1 / self.size)[:, self.index].clone()
