"""The optimizer's step on the host beside the backward: speculated on, then validated.

When all gradients of a chunk of parameters are on the host, a thread steps a second version of the
chunk, with the options that the optimizer has then. Until `optimizer.step()` the caller may do what
makes that wrong: clip gradients, set another learning rate, load a state. So `step()` compares all
that the thread has read with what is there. A chunk of which nothing differs is stepped: its two
versions exchange their memory. Any other is stepped as if there was no second version. So results
are those of a step after the backward, bit by bit.

This is the speculation-then-validation of SuperOffload (arXiv:2509.21271), without its undoing:
the first version is whole until the second one is accepted.
"""

from __future__ import annotations

import gc
import logging
import time
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from autopar.comm import host_copies
from autopar.runtime.chunks import fused_groups, is_away, local_of, partition
from autopar.runtime.second_version import Part, step_parts, twin_of
from autopar.runtime.sharded_values import ShardedParameter, ShardedState
from autopar.runtime.states_on_drive import StatesOnDrive
from autopar.schedule.host_step import chunk_bytes

log = logging.getLogger(__name__)

# Backwards without speculation after one that was in vain; so many times more after each further
# one in a row.
_PAUSE = 4

# Steps that are timed with speculation, and as many without: the thread may take what the others
# need, such as the only cores.
_TIMED = 4

_DENORMAL = 1e-40  # as a number of float32


@dataclass
class Chunk:
    """Parameters that are stepped together.

    Args:
        number: in the order of the optimizer.
        waiting: for so many gradients.
        future: of its step, when that was asked for.
    """

    number: int
    parts: list[Part]
    waiting: int = 0
    future: Future[None] | None = None

    @property
    def second_bytes(self) -> int:
        return sum(part.second_bytes for part in self.parts if part.expects)


@dataclass
class _Trial:
    """The speculation of one backward.

    Args:
        groups: the parameter groups as they were, with the lists that they held.
        options: for the step, by group.
        threads: of an operator, where the caller runs it.
        flushes: denormal numbers count as zero there.
        at: which part and chunk the gradient of an argument completes.
    """

    groups: list[dict[str, Any]]
    options: list[dict[str, Any]]
    chunks: list[Chunk]
    twin: torch.optim.Optimizer
    threads: int
    flushes: bool
    at: dict[int, tuple[Chunk, Part]] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        return [part for chunk in self.chunks for part in chunk.parts]

    def stop(self) -> list[Chunk]:
        """Begin with no other chunk, wait for the one that is being stepped, and watch no longer;
        the chunks that are stepped."""
        futures = [(chunk, chunk.future) for chunk in self.chunks if chunk.future is not None]
        begun = [(chunk, future) for chunk, future in reversed(futures) if not future.cancel()]
        for _, future in begun:
            future.exception()
        for part in self.parts:  # when nothing in the thread uses their storages
            part.unwatch()
        return [chunk for chunk, _ in begun]


class SpeculativeStep:
    """Steps chunks of an optimizer's parameters beside the backward.

    Args:
        optimizer: treats each element by itself; its parameters are on the host.
        room_bytes: of the host, for second versions.
        drive: that has the optimizer's state.

    Attributes:
        taken_over: chunks whose second version was accepted, over all steps.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, room_bytes: float,
        drive: StatesOnDrive | None = None,
    ) -> None:  # fmt: skip
        self._own, self._room = weakref.ref(optimizer), room_bytes
        self._drive = drive
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="autopar-step")
        self._trial: _Trial | None = None
        self._spares = WeakIdKeyDictionary()  # by shard
        self._keep = False  # gradients that were read, as somebody writes to them
        self._rest, self._pause = 0, 1  # backwards without speculation, and so many the next time
        self._is_first, self._told = True, False
        self.taken_over = 0
        self._taken = 0  # before this step
        self._began: float | None = None  # the backward of this step
        self._seconds: dict[bool, list[float]] = {True: [], False: []}  # with speculation, without

    @contextmanager
    def beside(
        self, parameters: Sequence[torch.Tensor | None], announced: Collection[int]
    ) -> Iterator[None]:
        """A backward runs, whose gradients are stored on the host.

        Args:
            parameters: arguments of the program.
            announced: positions of those whose gradients it announces and gives to the caller.
        """
        self.drop()
        self._began, self._taken = time.perf_counter(), self.taken_over
        trial = self._trial = self._begin(parameters, announced)
        if trial is None:
            yield
            return

        def stored(position: int, gradient: torch.Tensor, ready: Any) -> None:
            if position in trial.at:
                chunk, part = trial.at[position]
                part.gradient, part.ready = gradient, ready
                chunk.waiting -= 1
                if not chunk.waiting:
                    chunk.future = self._thread.submit(self._step, trial, chunk)

        try:
            with host_copies.listening(stored):
                yield
        except BaseException:
            trial.stop()
            self._trial = None
            raise
        for part in trial.parts:
            part.watch_gradient()

    def accepted(
        self, parameters: Sequence[Sequence[torch.Tensor]], state: Mapping[torch.Tensor, Any]
    ) -> list[Chunk]:
        """The chunks whose second version is what a step would make; `Part.accept` takes them over.

        Args:
            parameters: of each group of the optimizer.
            state: of the optimizer, by parameter.
        """
        trial, self._trial = self._trial, None
        if trial is None:
            return []
        stepped = trial.stop()
        difference = self._difference(trial, parameters)
        right: list[Chunk] = []
        for chunk in stepped:
            assert chunk.future is not None
            error = chunk.future.exception()
            found = difference or next(filter(None, (
                p.difference(state.get(p.parameter)) for p in chunk.parts)), "")  # fmt: skip
            if error is not None and not found:
                found = f"a chunk could not be stepped there ({error})"
            if not found:
                right.append(chunk)
            difference = difference or found
        if difference and stepped:
            self._judge(difference)
        elif stepped:
            self._pause = 1
        self.taken_over += len(right)
        return right

    def finish(self) -> None:
        """A step has ended: it counts among those that are timed."""
        if self._began is None:
            return
        seconds, self._began = time.perf_counter() - self._began, None
        timed = self._seconds[self.taken_over > self._taken]
        if len(timed) < _TIMED:
            timed.append(seconds)
            if not self._is_faster() and len(self._seconds[False]) == _TIMED:
                log.info("the optimizer's step follows the backward, as that is faster here")

    def _is_faster(self) -> bool:
        """Whether speculation makes a step shorter, from its backward on, as far as that was
        timed."""
        beside, after = self._seconds[True], self._seconds[False]
        if len(beside) < _TIMED or not _TIMED:
            return True
        return len(after) == _TIMED and min(beside) <= min(after)

    # -- a trial -------------------------------------------------------------------------------

    def _begin(
        self, parameters: Sequence[torch.Tensor | None], announced: Collection[int]
    ) -> _Trial | None:
        """None if it would be in vain."""
        if self._rest:
            self._rest -= 1
            return None
        optimizer = self._own()
        if optimizer is None or not self._may(optimizer) or not self._is_faster():
            return None
        if self._is_first:
            self._is_first = False
            gc.collect()  # planning leaves cycles that hold views of parameters
        groups, state = optimizer.param_groups, optimizer.state
        expected = {p: k for k, p in enumerate(parameters) if p is not None and k in announced}
        fused = fused_groups(optimizer, state, expected.__contains__)
        options = [{**g, "fused": True} if k in fused else dict(g) for k, g in enumerate(groups)]
        parts: dict[torch.Tensor, Part] = {}
        for number, group in enumerate(groups):
            for p in group["params"]:
                shard, held = local_of(p), state.get(p)
                entries = {key: local_of(x) for key, x in (held or {}).items()}
                parts[shard] = Part(
                    p, shard, number, held, entries, p in expected, self._spares_of(shard)
                )
        trial = _Trial(
            [{**g, "params": list(g["params"])} for g in groups], options, [], twin_of(optimizer),
            torch.get_num_threads(), not (torch.tensor(_DENORMAL) * 1).item(),
        )  # fmt: skip
        room = self._room
        if self._drive is None:
            total = sum(shard.nbytes for shard in parts)
            chunks = [*partition(list(parts), chunk_bytes(total))]
        else:
            chunks = self._drive.partition({s: part.entries for s, part in parts.items()})
            room -= max((_read_bytes(parts[s] for s in shards) for shards in chunks), default=0)
        for number, shards in reversed([*enumerate(chunks)]):
            chunk = Chunk(number, [parts[shard] for shard in shards])
            own = [part for part in chunk.parts if part.expects]
            needed = chunk.second_bytes + self._keep * sum(p.shard.nbytes for p in own)
            if not own or needed > room or not all(map(_may_step, chunk.parts)):
                continue
            room -= needed
            chunk.waiting = len(own)
            trial.chunks.append(chunk)
            trial.at |= {expected[part.parameter]: (chunk, part) for part in own}
        for part in trial.parts:
            part.watch()
        return trial

    def _may(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a step depends on nothing that cannot be compared."""
        scaled = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        return scaled == (None, None) and not any(
            g.get("differentiable") or any(isinstance(x, torch.Tensor) for x in g.values())
            for g in optimizer.param_groups
        )

    def _spares_of(self, shard: torch.Tensor) -> dict[str, torch.Tensor]:
        if shard not in self._spares:
            self._spares[shard] = {}
        spares: dict[str, torch.Tensor] = self._spares[shard]
        return spares

    @torch.no_grad()
    def _step(self, trial: _Trial, chunk: Chunk) -> None:
        """Step a chunk, in the thread, as the caller's thread would."""
        if torch.get_num_threads() != trial.threads:
            torch.set_num_threads(trial.threads)
        torch.set_flush_denormal(trial.flushes)
        for part in chunk.parts:
            if part.expects or self._drive is not None:
                part.read(keep=self._keep)
        if self._drive is not None:
            self._drive.read(chunk.number, {part.shard: part.spares for part in chunk.parts})
        step_parts(trial.twin, trial.options, chunk.parts)
        if self._drive is not None:
            self._drive.write(chunk.number, [t for part in chunk.parts for t in part.write()])

    def _difference(self, trial: _Trial, parameters: Sequence[Sequence[torch.Tensor]]) -> str:
        """What differs for all chunks.

        Args:
            parameters: of each group.
        """
        optimizer = self._own()
        assert optimizer is not None
        if self._drive is not None and not self._drive.is_unchanged(optimizer.state):
            return "the optimizer's state was read or written to"
        if not self._may(optimizer) or len(optimizer.param_groups) != len(trial.groups):
            return "parameter groups were added"
        for now, before, own in zip(optimizer.param_groups, trial.groups, parameters, strict=True):
            if list(map(id, own)) != list(map(id, before["params"])):
                return "parameters were added"
            for key in (now.keys() | before.keys()) - {"params"}:
                if key not in before or key not in now or now[key] != before[key]:
                    return f"{key} was changed"
        return ""

    # -- what was in vain ----------------------------------------------------------------------

    def drop(self) -> None:
        """There was a backward whose step does not come, or comes in another way."""
        trial, self._trial = self._trial, None
        if trial is not None and trial.stop():
            self._judge("another backward came before the step")

    def _judge(self, difference: str) -> None:
        """A trial was in vain: keep what was read, if that may help, or rest."""
        if difference == "gradients were written to" and not self._keep:
            self._keep = True
            return
        self._rest = self._pause = _PAUSE * self._pause
        self._spares.clear()
        if not self._told:
            self._told = True
            log.warning(
                "the optimizer's step begins beside the backward, and that was in vain: between "
                "backward() and step(), %s. It is tried again every now and then", difference,
            )  # fmt: skip


def _read_bytes(parts: Iterable[Part]) -> int:
    """What is read from a drive."""
    return sum(t.nbytes for part in parts for t in part.tensors().values() if is_away(t))


def _may_step(part: Part) -> bool:
    """Whether a part is as the step finds it: state that was loaded whole is laid out first."""
    p = part.parameter
    if not isinstance(p, ShardedParameter) or p.grad is not None:
        return False
    laid_out = all(
        not isinstance(x, torch.Tensor) or not x.ndim or isinstance(x, ShardedState)
        for x in (part.held or {}).values()
    )
    return laid_out
