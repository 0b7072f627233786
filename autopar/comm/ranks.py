"""How the ranks of a run take the same decisions."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from autopar.comm import world
from autopar.errors import AutoparError, EngineError, InfeasibleError

T = TypeVar("T")

_decisions = itertools.count()  # ranks wait for the same ones, in the same order


@contextmanager
def _awaited_from_rank_zero() -> Iterator[None]:
    """Other ranks wait here until rank 0 has ended the body: in Python, not within a collective, so
    that Ctrl-C stops them too, and that planning may take longer than the timeout of collectives.

    Raises:
        EngineError: on the other ranks, if rank 0 was stopped.
    """
    if dist.get_world_size() == 1:
        yield
        return
    store, key = world.store(), f"autopar/decision/{next(_decisions)}"
    if dist.get_rank() == 0:
        ended = "stopped"
        try:
            yield
            ended = "decided"
        finally:
            store.set(key, ended)
        return
    yield
    start = time.monotonic()
    while not store.check([key]):
        time.sleep(min(0.05, 0.0005 + (time.monotonic() - start) / 20))
    if store.get(key) != b"decided":
        raise EngineError("rank 0 was stopped while it planned; start all ranks again")


class Ranks:
    """One rank, which decides by itself; for planning."""

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        """Rank 0's decision, or its error, on every rank."""
        return decide()

    def together(self, act: Callable[[], T]) -> T:
        """Do the same on every rank; an error on one is an error on all."""
        return act()

    def all(self, mine: bool) -> bool:
        """Whether it is true of every rank."""
        return mine

    def of_all(self, mine: Any) -> list[Any]:
        """Every rank's."""
        return [mine]

    def united(self, mine: list[bool]) -> list[bool]:
        """What is true on any rank."""
        return [any(flags) for flags in zip(*self.of_all(mine), strict=True)]

    def differing(self, signature: str) -> list[int]:
        """Ranks whose signature is not that of rank 0; the same on all ranks."""
        return []


class GroupRanks(Ranks):
    """Some ranks of the process group: those of one pipeline stage.

    Args:
        group: of them; this rank is one.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def of_all(self, mine: Any) -> list[Any]:
        answers: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(answers, mine, group=self._group)
        return answers

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        box: list[Any] = [None, None]
        if dist.get_rank(self._group) == 0:
            try:
                box[0] = decide()
            except AutoparError as error:
                box[1] = error
        dist.broadcast_object_list(box, group=self._group, group_src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def all(self, mine: bool) -> bool:
        return all(self.of_all(mine))

    def differing(self, signature: str) -> list[int]:
        signatures = self.of_all(signature)
        return [r for r, s in enumerate(signatures) if s != signatures[0]]


class WorldRanks(Ranks):
    """All ranks of the process group."""

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        box: list[Any] = [None, None]
        with _awaited_from_rank_zero():
            if dist.get_rank() == 0:
                try:
                    box[0] = decide()
                except AutoparError as error:
                    box[1] = error
                except Exception as error:
                    box[1] = EngineError(f"rank 0 failed: {type(error).__name__}: {error}")
                    box[1].__cause__ = error
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def together(self, act: Callable[[], T]) -> T:
        if dist.get_world_size() == 1:
            return act()
        errors: list[Any] = [None] * dist.get_world_size()
        mine: Exception | None = None
        try:
            result = act()
        except Exception as error:
            mine = error
        text = None if mine is None else f"{type(mine).__name__}: {mine}"
        dist.all_gather_object(errors, mine if isinstance(mine, InfeasibleError) else text)
        failed = {rank: each for rank, each in enumerate(errors) if each is not None}
        infeasible = [e for e in failed.values() if isinstance(e, InfeasibleError)]
        if infeasible and len(infeasible) == len(failed):
            # the same on all ranks, as a script may try again with the memory that it names
            raise max(infeasible, key=lambda error: error.smallest_bytes) from mine
        if mine is not None:
            raise mine
        for rank, each in failed.items():
            raise EngineError(f"rank {rank} failed, so all ranks stop: {each}")
        return result

    def all(self, mine: bool) -> bool:
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, mine)
        return all(answers)

    def of_all(self, mine: Any) -> list[Any]:
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, mine)
        return answers

    def differing(self, signature: str) -> list[int]:
        if dist.get_world_size() == 1:
            return []
        signatures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(signatures, signature)
        return [r for r, s in enumerate(signatures) if s != signatures[0]]
