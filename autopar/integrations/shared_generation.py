"""`generate` that rank 0 is asked for, and that all ranks run.

A server has its requests on rank 0 alone, and an engine's program runs on all ranks. So rank 0
sends the arguments of each `generate` to the others, which wait for them. What it alone decides,
to end a generation that nobody reads any more, it tells the others after every few tokens.

An error that every rank has is that of the request, and the next one is served. Where some ranks
have one and others go on, their programs are no longer in step, and the error ends the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from transformers import StoppingCriteria, StoppingCriteriaList

from autopar.comm import world
from autopar.errors import EngineError

log = logging.getLogger(__name__)

# Ranks wait for requests as long as it takes.
_IDLE = timedelta(days=365)
_ERRORS_WITHIN_S = 30.0
# Tokens after which rank 0 says whether to go on: a message costs as much as a small program.
_ASKED_EVERY = 8


class SharedGeneration:
    """`generate` of an engine, called on rank 0 and run by all ranks.

    Made on all ranks; those other than 0 then `follow`.

    Args:
        engine: of a model of transformers that generates text.
        tokenizer: of the model, for stop strings; the same on all ranks.
    """

    def __init__(self, engine: Any, tokenizer: Any) -> None:
        self.engine, self._tokenizer = engine, tokenizer
        self._device: torch.device = next(engine.parameters()).device
        self._alone = dist.get_world_size() == 1
        self._group: Any = None
        if not self._alone:
            self._group = dist.new_group(backend="gloo", timeout=_IDLE)
        self._requests = 0
        self._one_at_a_time = threading.Lock()
        self._ending = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)  # configurations, names: what a server reads

    def generate(self, *, streamer: Any = None, tokenizer: Any = None, **arguments: Any) -> Any:
        """Generate on all ranks; called on rank 0, from any thread.

        Args:
            streamer: gets the tokens, on rank 0. An exception of its ends the generation.
            tokenizer: all ranks take their own in its place.
            arguments: of the engine's `generate`.

        Raises:
            EngineError: the server ends, or another rank has died.
            ValueError: there is no token to begin with.
        """
        ids = arguments.get("input_ids")
        if ids is None:
            ids = arguments.get("inputs")
        if ids is not None and not ids.shape[-1]:
            raise ValueError("the prompt is empty: there is no token to go on from")
        with self._one_at_a_time:
            if self._ending.is_set():
                raise EngineError("the server is ending")
            arguments["tokenizer"] = tokenizer is not None
            arguments["streamer"] = streamer is not None
            self._send(pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), arguments))
            guarded = None if streamer is None else _GuardedStreamer(streamer)
            result = self._run(
                arguments, guarded, lambda: self._ending.is_set() or _failed(guarded)
            )
        if guarded is not None and guarded.error is not None:
            raise guarded.error
        if self._ending.is_set():
            raise EngineError("the server ended before all tokens were generated")
        return result

    def follow(self) -> None:
        """Run what rank 0 is asked for, until it ends; on the other ranks.

        Raises:
            EngineError: this rank is out of step with the others, or rank 0 has died.
        """
        while (arguments := self._receive()) is not None:
            streamer = _NoStreamer() if arguments["streamer"] else None
            try:
                self._run(arguments, streamer, lambda: False)
            except _OutOfStepError:
                raise
            except Exception as error:
                log.info("the request failed on all ranks: %s", error)

    def end(self) -> None:
        """End the generation that runs, and the other ranks' waiting; on rank 0."""
        self._ending.set()
        with self._one_at_a_time:
            self._send(None)

    def _run(self, arguments: dict[str, Any], streamer: Any, stops: Callable[[], bool]) -> Any:
        self._requests += 1
        arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.to(self._device), arguments)
        arguments["tokenizer"] = self._tokenizer if arguments["tokenizer"] else None
        criterion = _StopTogether(self._group, stops)
        arguments |= {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([criterion])}
        try:
            if self._device.type == "cuda":  # a thread's own
                torch.cuda.set_device(self._device)
            return self.engine.generate(**arguments)
        except Exception as error:
            self._meet_after(error)
            raise

    def _meet_after(self, error: Exception) -> None:
        """Wait until every rank has failed at the same request.

        Raises:
            EngineError: some rank did not.
        """
        if self._alone:
            return
        store, place = world.store(), f"autopar/generate/{self._requests}"
        store.set(f"{place}/{dist.get_rank()}", "failed")
        others = [f"{place}/{r}" for r in range(dist.get_world_size())]
        begin = time.monotonic()
        while not store.check(others):
            if time.monotonic() - begin > _ERRORS_WITHIN_S:
                raise _OutOfStepError(
                    f"rank {dist.get_rank()} failed at a request that other ranks did not fail "
                    f"at: {error}"
                ) from error
            time.sleep(0.01)

    def _send(self, arguments: dict[str, Any] | None) -> None:
        if not self._alone:
            with world.explained_failures():
                dist.broadcast_object_list([arguments], src=0, group=self._group)

    def _receive(self) -> dict[str, Any] | None:
        received: list[Any] = [None]
        with world.explained_failures():
            dist.broadcast_object_list(received, src=0, group=self._group)
        arguments: dict[str, Any] | None = received[0]
        return arguments


class _OutOfStepError(EngineError):
    """Ranks no longer run the same programs."""


class _StopTogether(StoppingCriteria):
    """Ends a generation on all ranks when rank 0 wants it."""

    def __init__(self, group: Any, stops: Callable[[], bool]) -> None:
        self._group, self._stops, self._calls = group, stops, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._calls += 1
        stops = False
        if self._calls % _ASKED_EVERY == 0:
            told = torch.tensor([self._stops()])
            if self._group is not None:
                dist.broadcast(told, src=0, group=self._group)
            stops = bool(told)
        return torch.full((len(input_ids),), stops, device=input_ids.device)


class _GuardedStreamer:
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


def _failed(streamer: _GuardedStreamer | None) -> bool:
    return streamer is not None and streamer.error is not None


class _NoStreamer:
    """On ranks other than 0."""

    def put(self, value: torch.Tensor) -> None:
        pass

    def end(self) -> None:
        pass
