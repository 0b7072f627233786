"""Notices ranks that do not do the same, before they wait for each other for good.

Each switch to another program is announced in the world's store, and a rank waits there until all
have come to the same one. Batches that ought to be equal are compared by a hash, at the first calls
and then now and again.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from autopar.comm import world
from autopar.errors import EngineError, MeshError

log = logging.getLogger(__name__)

_CHECKED_FIRST, _CHECKED_EVERY = 3, 100
_WARN_AFTER_S, _GIVE_UP_AFTER_S = 10.0, 60.0
_engines = itertools.count()


class Agreement:
    """Of the ranks that call one engine.

    Args:
        device: of the collectives.
        same_batches: every rank passes the same batch.
    """

    def __init__(self, device: torch.device, *, same_batches: bool) -> None:
        self._device, self._same_batches = device, same_batches
        self._alone = dist.get_world_size() == 1
        self._engine: int | None = None
        self._calls = self._switches = 0
        self._last: Any = None
        self._program: int | None = None

    def check_call(self, key: Any, tensors: Sequence[torch.Tensor]) -> None:
        """Compare a call with those of the other ranks.

        Args:
            key: of the program.
            tensors: the inputs.

        Raises:
            MeshError: local batches differ in shape.
            EngineError: a rank does not come, calls with other shapes or modes, or passes another
                batch where the same is expected.
        """
        if self._alone:
            return
        if key != self._last:
            self.meet(f"calls the model with {described(key)}")
            self._last = key
        calls, self._calls = self._calls, self._calls + 1
        if self._same_batches and (calls < _CHECKED_FIRST or calls % _CHECKED_EVERY == 0):
            self._check_batches(tensors)

    def check_program(self, number: int | None) -> None:
        """Compare the program that a call is about to run with those of the other ranks.

        Args:
            number: of its step; None where it is compiled first.

        Raises:
            EngineError: a rank runs another one, because its model differs from the others'.
        """
        if number is None:
            self.meet("compiles the model")
        elif number != self._program:
            self.meet(f"runs program {number}")
        self._program = number

    def meet(self, described: str) -> None:
        """Wait until every rank is about to do the same.

        Args:
            described: what, as what this rank does.
        """
        if self._alone:
            return
        if self._engine is None:  # one rank alone may copy an engine; calls are in the same order
            self._engine = next(_engines)
        self._switches += 1
        store, rank = world.store(), dist.get_rank()
        place = f"autopar/{self._engine}/{self._switches}"
        store.set(f"{place}/{rank}", described)
        others = [r for r in range(dist.get_world_size()) if r != rank]
        start, warned = time.monotonic(), False
        while missing := [r for r in others if not store.check([f"{place}/{r}"])]:
            waited = time.monotonic() - start
            if waited > _GIVE_UP_AFTER_S:
                raise EngineError(
                    f"rank {rank} {described}, and ranks {missing} did not within {waited:.0f} s; "
                    "every rank must make the same calls, evaluation too, and read the same "
                    "results, since each holds a part of the model"
                )
            if waited > _WARN_AFTER_S and not warned:
                warned = True
                log.warning("rank %d %s, and waits for ranks %s to do so", rank, described, missing)
            time.sleep(min(0.05, 0.0005 + waited / 20))
        for r in others:
            theirs = store.get(f"{place}/{r}").decode()
            if theirs == described:
                continue
            differ = f"rank {rank} {described}, rank {r} {theirs}"
            if self._same_batches:
                raise EngineError(
                    f"{differ}; every rank must do the same with a model in the same state, and "
                    "pass the same global batch, or with batch='local' to auto_engine its own "
                    "samples"
                )
            raise MeshError(
                f"local batches must have equal shapes on all ranks: {differ}; pad samples to the "
                "same length on all ranks, drop the last "
                "incomplete batch (drop_last=True) or pass global batches"
            )

    def _check_batches(self, tensors: Sequence[torch.Tensor]) -> None:
        digest = hashlib.blake2b(digest_size=8)
        for x in tensors:
            if not x.is_meta:  # an example to plan with
                digest.update(_bytes(x))
        mine = int.from_bytes(digest.digest()[:7], "little")
        extremes = torch.tensor([mine, -mine], dtype=torch.int64, device=self._device)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        largest, smallest = extremes.tolist()
        if largest != -smallest:
            raise EngineError(
                "ranks passed different batches, and batch='global' expects the same on every "
                "rank, of which the engine takes each rank's part. Seed the loader alike on all "
                "ranks, or pass batch='local' to auto_engine and each rank its own samples"
            )


def _bytes(x: torch.Tensor) -> bytes:
    x = x.detach().cpu().contiguous()
    return x.reshape(-1).view(torch.uint8).numpy().tobytes()


def described(key: Any) -> str:
    """The inputs and modes of a program's key: `(int64[4, 12]) in training`."""
    _, training, precision, _, leaves = key
    shapes = ", ".join(
        f"{str(x[1]).removeprefix('torch.')}{list(x[0])}{' with gradient' if x[2] else ''}"
        if isinstance(x, tuple)
        else str(x)
        for x in leaves
    )
    dtype = precision[1]
    autocast = "" if dtype is None else f" under autocast to {str(dtype).removeprefix('torch.')}"
    return f"({shapes}) in {'training' if training else 'evaluation'}{autocast}"
