"""What ends a generation that all ranks run, and what its tokens go to on each rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import StoppingCriteria

# Tokens after which rank 0 says whether to go on: a message costs as much as a small program.
_ASKED_EVERY = 8


class StopTogether(StoppingCriteria):
    """Ends a generation on all ranks when rank 0 wants it, and rows that have all their tokens.

    Args:
        limits: new tokens of each row; None where `generate` counts them itself.
    """

    def __init__(
        self, group: Any, stops: Callable[[], bool], limits: Sequence[int] | None = None
    ) -> None:
        self._group, self._stops, self._limits, self._calls = group, stops, limits, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._calls += 1  # once per token
        stops = False
        if self._calls % _ASKED_EVERY == 0:
            told = torch.tensor([self._stops()])
            if self._group is not None:
                dist.broadcast(told, src=0, group=self._group)
            stops = bool(told)
        if stops or self._limits is None:
            return torch.full((len(input_ids),), stops, device=input_ids.device)
        return torch.tensor(self._limits, device=input_ids.device) <= self._calls


class GuardedStreamer:
    """A streamer whose exceptions wait until all ranks have stopped."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self.error: Exception | None = None

    def put(self, value: torch.Tensor) -> None:
        self._guarded(self._streamer.put, value)

    def end(self) -> None:
        self._guarded(self._streamer.end)

    def _guarded(self, call: Callable[..., None], *args: Any) -> None:
        if self.error is not None:
            return
        try:
            call(*args)
        except Exception as error:
            self.error = error


class NoStreamer:
    """On ranks other than 0."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass
