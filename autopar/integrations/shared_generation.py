"""`generate` that rank 0 is asked for, and that all ranks run.

A server has its requests on rank 0 alone, and an engine's program runs on all ranks. So rank 0
sends the arguments of each `generate` to the others, which wait for them. What it alone decides,
to end a generation that nobody reads any more, it tells the others after every few tokens. One
thread of rank 0 generates, for one request, or for several that wait (`batched_requests.py`).

An error that every rank has is that of the request, and the next one is served. Where some ranks
have one and others go on, their programs are no longer in step, and the error ends the process.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree
from transformers import StoppingCriteriaList

from autopar.comm import world
from autopar.errors import EngineError
from autopar.integrations.batched_requests import (
    ClientLeftError,
    Request,
    Rows,
    as_batch,
    take,
    without_left,
)
from autopar.integrations.generation_check import RequestError, check_options
from autopar.integrations.generation_ends import GuardedStreamer, NoStreamer, StopTogether

log = logging.getLogger(__name__)

# Ranks wait for requests as long as it takes.
_IDLE = timedelta(days=365)
_ERRORS_WITHIN_S = 30.0
# An attribute of a generation_config, which has no option for it.
SEED = "autopar_seed"


class SharedGeneration:
    """`generate` of an engine, called on rank 0 and run by all ranks.

    Made on all ranks; those other than 0 then `follow`.

    Args:
        engine: of a model of transformers that generates text.
        tokenizer: of the model, for stop strings; the same on all ranks.
        batch: requests that are generated together, at most.
    """

    def __init__(self, engine: Any, tokenizer: Any, batch: int = 1) -> None:
        self.engine, self._tokenizer, self._batch = engine, tokenizer, batch
        self._device: torch.device = next(engine.parameters()).device
        self._alone = dist.get_world_size() == 1
        self._group: Any = None
        if not self._alone:
            self._group = dist.new_group(backend="gloo", timeout=_IDLE)
        self._requests = 0
        text = engine.config.get_text_config()
        self._positions = int(getattr(text, "max_position_embeddings", None) or 0)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None
        self._ending = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)  # configurations, names: what a server reads

    def generate(
        self,
        *,
        streamer: Any = None,
        tokenizer: Any = None,
        left: threading.Event | None = None,
        **arguments: Any,
    ) -> Any:
        """Generate on all ranks; called on rank 0, from any thread.

        Args:
            streamer: gets the tokens, on rank 0. An exception of its ends the generation.
            tokenizer: all ranks take their own in its place.
            left: is set when who asked has left, which ends the generation.
            arguments: of the engine's `generate`. A generation_config gets the number of new
                tokens that the model has positions for, and may have `autopar_seed`, an integer.

        Raises:
            ClientLeftError: who asked has left.
            EngineError: the server ends, or another rank has died.
            RequestError: there is no token to begin with, or no position for another one.
        """
        config = arguments.get("generation_config")
        self._check(arguments, config)
        seed = None if config is None else vars(config).pop(SEED, None)
        arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.cpu(), arguments)
        request = Request(dict(arguments), streamer, tokenizer is not None, seed)
        request.left = left or request.left
        _ = request.key  # what is wrong with it is told here, not where all are served
        with self._changed:
            if self._ending.is_set():
                raise ServerEndsError("the server is ending")
            self._waiting.append(request)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return request.result.result()

    def check(self, arguments: dict[str, Any], config: Any, *, streams: bool) -> None:
        """Refuse what `generate` would refuse, before an answer begins; on rank 0.

        Args:
            arguments: of `generate`: the prompt.
            config: with the options of the request.
            streams: whether the answer is streamed.

        Raises:
            RequestError: naming the option, where its check does.
        """
        self._check(arguments, config)
        check_options(self.engine, self._tokenizer, arguments["input_ids"], config, streams=streams)

    def _check(self, arguments: dict[str, Any], config: Any) -> None:
        """Refuse a prompt that is empty or too long; let no more tokens be generated than fit."""
        ids = arguments.get("input_ids")
        ids = arguments.get("inputs") if ids is None else ids
        if ids is None:
            return
        length = ids.shape[-1]
        if not length:
            raise RequestError("the prompt is empty: there is no token to go on from")
        if not self._positions:
            return
        left = self._positions - length
        if left < 1:
            raise RequestError(
                f"the prompt has {length:,} tokens, and the model has {self._positions:,} "
                "positions, of which the first new token takes one: shorten the prompt to "
                f"{self._positions - 1:,} tokens"
            )
        if config is not None and config.max_new_tokens is not None:
            config.max_new_tokens = min(config.max_new_tokens, left)

    def _work(self) -> None:
        """Generate what is waited for, until the server ends; in a thread of rank 0."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ending.is_set())
                if self._ending.is_set():
                    return
                without_left(self._waiting)
                if not self._waiting:
                    continue
                self._running = take(self._waiting, self._batch)
            error: Exception = EngineError("the generation ended before all tokens were there")
            try:
                self._answer(self._running)
            except Exception as raised:
                error = raised
            for request in self._running:
                request.answer(error)  # unless it has its tokens

    def _answer(self, requests: Sequence[Request]) -> None:
        """Run `generate` for one request, or for several at once."""
        first = requests[0]
        if first.seed is not None:
            torch.manual_seed(first.seed)
        if len(requests) == 1:
            streamer = None if first.streamer is None else GuardedStreamer(first.streamer)
            arguments = {**first.arguments, "tokenizer": first.has_tokenizer}
            arguments |= {"streamer": streamer is not None, "limits": None}
            self._send(arguments)

            def stops() -> bool:
                failed = streamer is not None and streamer.error is not None
                return failed or first.left.is_set() or self._ending.is_set()

            result = self._run(arguments, streamer, stops)
            if streamer is not None and streamer.error is not None:
                raise streamer.error
            if first.left.is_set():
                raise ClientLeftError
            first.answer(result)
            return
        arguments, limits = as_batch(requests, self._batch)
        ends = arguments["generation_config"].eos_token_id
        rows = Rows(requests, ends if isinstance(ends, list) else [] if ends is None else [ends])
        arguments |= {"tokenizer": False, "streamer": True, "limits": limits}
        self._send(arguments)
        self._run(arguments, rows, lambda: self._ending.is_set() or rows.finished)

    def follow(self) -> None:
        """Run what rank 0 is asked for, until it ends; on the other ranks.

        Raises:
            EngineError: this rank is out of step with the others, or rank 0 has died.
        """
        while (arguments := self._receive()) is not None:
            streamer = NoStreamer() if arguments["streamer"] else None
            try:
                self._run(arguments, streamer, lambda: False)
            except _OutOfStepError:
                raise
            except Exception as error:
                log.info("the request failed on all ranks: %s", error)
        self._meet()

    def stop(self) -> None:
        """Answer all requests that they are not served, and end the generation that runs as soon as
        it can; on rank 0, from any thread or a signal's handler."""
        self._ending.set()
        # the thread that a handler interrupts may hold the lock
        threading.Thread(target=self._refuse, daemon=True).start()

    def _refuse(self) -> None:
        with self._changed:
            for request in (*self._running, *self._waiting):
                request.answer(ServerEndsError("the server ended before all tokens were generated"))
            self._changed.notify_all()

    def end(self) -> None:
        """The same, and end the other ranks' waiting; on rank 0."""
        self.stop()
        if self._worker is not None:
            self._worker.join()
        self._send(None)
        self._meet()

    def _meet(self) -> None:
        """Wait until all ranks have the last message."""
        if not self._alone:
            with world.explained_failures():
                dist.barrier(group=self._group)

    def _run(self, arguments: dict[str, Any], streamer: Any, stops: Callable[[], bool]) -> Any:
        self._requests += 1
        arguments = pytree.tree_map_only(torch.Tensor, lambda x: x.to(self._device), arguments)
        arguments["tokenizer"] = self._tokenizer if arguments["tokenizer"] else None
        criterion = StopTogether(self._group, stops, arguments.pop("limits"))
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


class ServerEndsError(EngineError):
    """The server has been told to end."""


class _OutOfStepError(EngineError):
    """Ranks no longer run the same programs."""
