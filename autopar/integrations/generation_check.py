"""What `generate` refuses in the options of a request, before any rank runs a program.

`generate` checks options one after the other until its loop begins. A server runs that part on
rank 0 alone, before it answers: whatever fails there fails by what the request asks for, is no
error of the server, and needs no list of options here. What fails in the loop is the server's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers.generation import GenerationMode, StopStringCriteria

_LOOPS = {
    GenerationMode.GREEDY_SEARCH: "greedy search",
    GenerationMode.SAMPLE: "sampling",
    GenerationMode.BEAM_SEARCH: "beam search",
    GenerationMode.BEAM_SAMPLE: "beam search with sampling",
    # the engine says why not
    GenerationMode.ASSISTED_GENERATION: "",
}
_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


class RequestError(ValueError):
    """A request that cannot be served, whatever the server does."""


def check_options(
    engine: Any, tokenizer: Any, input_ids: torch.Tensor, config: GenerationConfig, *, streams: bool
) -> None:
    """Refuse what `generate` refuses; nothing is run, and nothing changes.

    Args:
        engine: of a model of transformers that generates text.
        tokenizer: for stop strings.
        input_ids: of the prompt, [1, tokens].
        streams: whether tokens are wanted as they come.

    Raises:
        RequestError: in the words of what refuses it.
    """
    config = copy.deepcopy(config)
    stop, config.stop_strings = config.stop_strings, None
    try:
        mode = config.get_generation_mode()
        if mode not in _LOOPS:
            ways = ", ".join(filter(None, _LOOPS.values()))
            raise RequestError(f"they ask for {mode.value}, and the server generates by {ways}")
        if streams and mode in _BEAMS:
            raise RequestError("num_beams: beams have no tokens to stream before the last one")
        GenerationMixin.generate(
            engine,
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            custom_generate=_try_processors,
        )
    except Exception as error:
        raise RequestError(f"the options of generation: {error}") from error
    if stop:
        try:
            StopStringCriteria(tokenizer, stop)
        except Exception as error:
            raise RequestError(f"stop (stop_strings): {error}") from error


def _try_processors(
    model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **_: Any
) -> torch.Tensor:
    """In the place of the loop: some processors check their values at the first token."""
    for processor in logits_processor:
        if isinstance(getattr(processor, "model", None), torch.nn.Module):
            raise RequestError(f"{type(processor).__name__} runs the model beside the generation")
    # those that sample check their values when they are made, and sort the vocabulary
    others = [p for p in logits_processor if not type(p).__name__.endswith("Warper")]
    vocabulary = model.config.get_text_config().vocab_size
    scores = torch.zeros(len(input_ids), vocabulary, device=input_ids.device)
    LogitsProcessorList(others)(input_ids, scores)
    return input_ids
