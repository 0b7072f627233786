"""Requests that wait for the same kind of generation, as one call of `generate`.

Prompts are padded on the left to the longest. What a row generates is then what its request
generates alone, as long as no option looks at other tokens than the row's own: so options are
listed that may be batched, and a request with another one runs alone. A request is answered when
its row ends, while other rows go on.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import GenerationConfig

# Options of generation that act on each row, whatever stands on its left.
_BY_ROWS = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff",
    "eta_cutoff", "max_new_tokens", "max_length", "bos_token_id", "eos_token_id", "pad_token_id",
    "use_cache", "transformers_version", "_from_model_config",
}  # fmt: skip
# Values of other options that do nothing, besides None and False.
_OFF = {
    "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0, "length_penalty": 1.0, "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "min_length": 0,
    "guidance_scale": 1,
}  # fmt: skip
_INPUTS = {"input_ids", "attention_mask", "generation_config"}


class ClientLeftError(Exception):
    """Who asked has left before all tokens were generated."""

    def __init__(self) -> None:
        super().__init__("the client left before all tokens were generated")


@dataclass(eq=False)  # two requests may have equal tokens
class Request:
    """A call of `generate`.

    Args:
        arguments: of it, with tensors on the host; no streamer and no tokenizer.
        streamer: gets the tokens, or None.
        has_tokenizer: whether a tokenizer was among the arguments.
        seed: of the random numbers.
        result: what `generate` gives.
        left: set when who asked has left, and nobody reads the result.
    """

    arguments: dict[str, Any]
    streamer: Any = None
    has_tokenizer: bool = False
    seed: int | None = None
    result: Future[Any] = field(default_factory=Future)
    left: threading.Event = field(default_factory=threading.Event)

    def answer(self, result: Any) -> None:
        """Give the result, or an exception, unless the request is answered already."""
        with contextlib.suppress(InvalidStateError):
            if isinstance(result, BaseException):
                self.result.set_exception(result)
            else:
                self.result.set_result(result)

    @property
    def ids(self) -> torch.Tensor:
        """The prompt, [1, tokens]."""
        ids: torch.Tensor = self.arguments["input_ids"]
        return ids

    @property
    def most_tokens(self) -> int:
        """That it generates."""
        return int(self.arguments["generation_config"].max_new_tokens)

    @cached_property
    def key(self) -> tuple[Any, ...] | None:
        """Requests with equal keys may be one batch; None if this one runs alone."""
        config, mask = (self.arguments.get(k) for k in ("generation_config", "attention_mask"))
        if self.seed is not None or not isinstance(config, GenerationConfig):
            return None
        if not {"input_ids"} <= self.arguments.keys() <= _INPUTS or len(self.ids) != 1:
            return None
        options = {k: v for k, v in config.to_diff_dict().items() if _acts(k, v)}
        if not options.keys() <= _BY_ROWS or config.max_new_tokens is None:
            return None
        if mask is not None and not bool(mask.all()):
            return None
        shared = options.keys() - {"max_new_tokens", "max_length"}
        return tuple(sorted((name, repr(options[name])) for name in shared))


def _acts(name: str, value: Any) -> bool:
    off = value is None or value is False or (name in _OFF and value == _OFF[name])
    return name in _BY_ROWS or not off


def without_left(waiting: deque[Request]) -> None:
    """Answer and remove requests that nobody waits for."""
    for request in [r for r in waiting if r.left.is_set()]:
        waiting.remove(request)
        request.answer(ClientLeftError())


def take(waiting: deque[Request], most: int) -> list[Request]:
    """The first request, and the next ones that may be generated with it, in the order in which
    they came.

    Args:
        waiting: of which they are taken; at least one.
        most: requests of a batch.
    """
    first = waiting.popleft()
    key = first.key
    if key is None or most == 1:
        return [first]
    others = [request for request in waiting if request.key == key][: most - 1]
    for request in others:
        waiting.remove(request)
    return [first, *others]


def as_batch(requests: Sequence[Request], rows: int) -> tuple[dict[str, Any], list[int]]:
    """The arguments of `generate` for several requests, and how many tokens each row may have.

    Args:
        rows: of the batch, for which there are programs; rows that no request fills end with their
            first token.
    """
    prompts = [request.ids[0] for request in requests]
    limits = [request.most_tokens for request in requests]
    prompts += prompts[:1] * (rows - len(prompts))
    limits += [1] * (rows - len(limits))
    # Some padding in each row, so that a mask is always needed: without one, it is another program.
    width = max(map(len, prompts)) + 1
    config = copy.deepcopy(requests[0].arguments["generation_config"])
    config.max_new_tokens = max(limits)
    pad = config.pad_token_id
    ids = torch.full((rows, width), 0 if pad is None else int(pad), dtype=prompts[0].dtype)
    mask = torch.zeros(rows, width, dtype=torch.int64)
    for k, prompt in enumerate(prompts):
        ids[k, width - len(prompt) :] = prompt
        mask[k, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "generation_config": config}, limits


class Rows:
    """A streamer of `generate` that answers each request when its row ends.

    Args:
        ends: tokens that end a row.
    """

    def __init__(self, requests: Sequence[Request], ends: Sequence[int]) -> None:
        self._requests, self._ends = requests, frozenset(ends)
        self._tokens: list[list[torch.Tensor]] = [[] for _ in requests]
        self._begun = False

    @property
    def finished(self) -> bool:
        return all(request.result.done() for request in self._requests)

    def put(self, value: torch.Tensor) -> None:
        for k, request in enumerate(self._requests):
            if request.left.is_set():
                request.answer(ClientLeftError())
            if request.result.done():
                continue
            token = value[k : k + 1] if self._begun else request.ids
            try:
                if request.streamer is not None:
                    request.streamer.put(token)
            except Exception as error:  # who asked has left
                request.answer(error)
                continue
            if self._begun:
                self._tokens[k].append(token)
                if int(token) in self._ends or len(self._tokens[k]) == request.most_tokens:
                    self._finish(k)
        self._begun = True

    def end(self) -> None:
        pass  # rows end one by one

    def _finish(self, k: int) -> None:
        request = self._requests[k]
        try:
            if request.streamer is not None:
                request.streamer.end()
        except Exception as error:
            request.answer(error)
            return
        new = torch.cat(self._tokens[k]).to(request.ids)
        request.answer(torch.cat([request.ids, new[None]], dim=1))
