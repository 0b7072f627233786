"""One call per rank of a simulated mesh, for tests of single collectives."""

from collections.abc import Callable, Sequence
from typing import Any

from autopar.testing.simulated_ranks import SimulatedMesh


class Lockstep:
    """A simulated mesh whose ranks run one call each, in the order of `ranks`."""

    def __init__(self, mesh: Sequence[int]) -> None:
        self._mesh = SimulatedMesh(mesh)
        self.names = self._mesh.groups
        self.ranks = list(self.names)

    @property
    def sent(self) -> float:
        """Bytes that all ranks have sent to others, by the ring algorithms."""
        return self._mesh.sent_bytes

    def run(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The results of one call per rank."""
        call_of = dict(zip(self.ranks, calls, strict=True))
        results = self._mesh.run(lambda coords: call_of[coords]())
        return [results[coords] for coords in self.ranks]
