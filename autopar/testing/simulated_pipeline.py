"""The ranks of a pipeline as threads of one process, which pass values by mailboxes.

Each rank runs its actions in the order of its schedule and waits for what it receives, so that a
schedule that cannot run ends with an error. Beside pipelines, ranks are those of `SimulatedMesh`.
"""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autopar.comm.ranks import Ranks
from autopar.passes.cut import Crossing
from autopar.runtime.pipeline_runtime import Pipeline, StageCalls, Values
from autopar.schedule.pipeline.actions import Kind, PipelineSchedule

_TIMEOUT_S = 300.0


class Mailboxes:
    """What the ranks of one pipeline send each other, in order."""

    def __init__(self) -> None:
        self._boxes: dict[Any, queue.Queue[Any]] = defaultdict(queue.Queue)
        self._lock = threading.Lock()  # the sender and the receiver may both be the first to ask

    def _box(self, box: Any) -> queue.Queue[Any]:
        with self._lock:
            return self._boxes[box]

    def send(self, box: Any, values: Any) -> None:
        self._box(box).put(values)

    def receive(self, box: Any) -> Any:
        """Raises AssertionError if nothing comes."""
        try:
            return self._box(box).get(timeout=_TIMEOUT_S)
        except queue.Empty:
            raise AssertionError(f"nothing was sent to {box}") from None


@dataclass(frozen=True)
class SimulatedPipeline(Pipeline):
    """One rank of a pipeline of threads; instead of a process group it has mailboxes."""

    mail: Mailboxes

    @staticmethod
    def of(schedule: PipelineSchedule, rank: int, mail: Mailboxes) -> SimulatedPipeline:
        return SimulatedPipeline(schedule, rank, None, Ranks(), mail)  # type: ignore[arg-type]

    def run(
        self,
        calls: Mapping[int, StageCalls],
        received: Callable[[int, int], Mapping[str, Crossing]],
        *,
        backward: bool,
    ) -> None:
        schedule = self.schedule if backward else self.schedule.forwards()
        last = schedule.stages - 1
        for stage, kind, number in schedule.ranks[self.rank]:
            if kind is Kind.FORWARD:
                values: Values = {}
                if stage:
                    values = self.mail.receive(("forward", stage, number))
                    _check(values, received(stage, number))
                sent = calls[stage].forward(number, values)
                if stage < last:
                    self.mail.send(("forward", stage + 1, number), _copies(sent))
            elif kind is Kind.WEIGHT:
                calls[stage].weights(number)
            else:
                values = {}
                if stage < last:
                    values = self.mail.receive(("backward", stage, number))
                    _check(values, _differentiable(received(stage + 1, number)))
                given = calls[stage].backward(number, values, kind is Kind.BACKWARD)
                if stage:
                    self.mail.send(("backward", stage - 1, number), _copies(given))

    def broadcast(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        owner = self.schedule.rank_of_stage[stage]
        if self.rank != owner:
            whole: torch.Tensor = self.mail.receive(("result", owner, self.rank))
            assert (whole.shape, whole.dtype) == (x.shape, x.dtype)
            return whole
        for rank, _ in enumerate(self.schedule.ranks):
            if rank != owner:
                self.mail.send(("result", owner, rank), x.detach().clone())
        return x

    def exchange(
        self, gives: Sequence[tuple[torch.Tensor, int]], takes: Sequence[tuple[torch.Tensor, int]]
    ) -> None:
        for x, rank in gives:
            self.mail.send(("exchange", self.rank, rank), x.detach().clone())
        for x, rank in takes:
            came: torch.Tensor = self.mail.receive(("exchange", rank, self.rank))
            assert (came.shape, came.dtype) == (x.shape, x.dtype)
            x.copy_(came)

    def all_reduce(self, x: torch.Tensor) -> None:
        others = [rank for rank, _ in enumerate(self.schedule.ranks) if rank != self.rank]
        for rank in others:
            self.mail.send(("sum", self.rank, rank), x.detach().clone())
        for rank in others:
            x += self.mail.receive(("sum", rank, self.rank))


def _copies(values: Values) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in values.items()}


def _differentiable(crossings: Mapping[str, Crossing]) -> dict[str, Crossing]:
    return {name: x for name, x in crossings.items() if x.differentiable}


def _check(values: Values, expected: Mapping[str, Crossing]) -> None:
    """What is received is what a rank has allocated for it."""
    assert list(values) == list(expected), (list(values), list(expected))
    for name, x in values.items():
        like = expected[name]
        assert (tuple(x.shape), x.dtype) == (like.shape, like.dtype), (name, x.shape, like)
        assert x.is_contiguous()
