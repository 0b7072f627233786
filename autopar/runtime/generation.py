"""`generate` of transformers' models on an engine.

The loop is transformers' own (`GenerationMixin`), on every rank alike. Its cache is a
`DecoderCache`, and the program of one token is planned first: it decides the layouts of weights and
of the cache, which the program of the prompt takes over.

Private to transformers here: the methods of `GenerationMixin` that are replaced below, tested with
5.23.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from autopar.errors import EngineError
from autopar.runtime.cache_classes import ARGUMENT, held_cache, layer_types
from autopar.runtime.decoder_cache import sharded
from autopar.runtime.encoder_inputs import noted_encoder

log = logging.getLogger(__name__)

# Arguments of `generate` that need another loop, another model, or ranks that differ.
_REFUSED = {
    "assistant_model": "a draft model has programs of its own; leave it out",
    "assistant_early_exit": "its first layers are another program; leave it out",
    "synced_gpus": "ranks stop together, since they have the same tokens; leave it out",
    "custom_generate": "its loop may keep another cache; leave it out",
    "prompt_lookup_num_tokens": "it crops the cache; leave it out",
    "prefill_chunk_size": "the prompt is one program; leave it out",
    "guidance_scale": "it runs a second sequence with a cache of its own; leave it out",
}
_NEUTRAL = {"guidance_scale": 1}  # values that ask for nothing


def generates(model_class: type) -> bool:
    """Whether a class of models generates as transformers' do."""
    return any(
        c.__name__ == "GenerationMixin" and c.__module__.startswith("transformers.")
        for c in model_class.__mro__
    )


def members(model_class: type) -> dict[str, Any]:
    """What the class of an engine has in the place of methods of `GenerationMixin`."""
    own: Any = model_class

    @functools.wraps(own.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._autopar_runner.check_generates()
        if not _has_own_cache(self):  # the model's own forward, with whole parameters
            with self._autopar_runner.whole_parameters():
                return own.generate(self, *args, **kwargs)
        _refuse(kwargs)
        with torch.no_grad(), _same_draws():
            return own.generate(self, *args, **kwargs)

    def prepare_cache(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], mode: Any,
        batch_size: int, max_cache_length: int, *rest: Any,
    ) -> None:  # fmt: skip
        if not _has_own_cache(self):
            own._prepare_cache_for_generation(
                self, generation_config, model_kwargs, mode, batch_size, max_cache_length, *rest
            )
            return
        _refuse(generation_config.to_dict())
        given = model_kwargs.get(ARGUMENT)
        if given is not None:
            if sharded(given) is None:
                raise EngineError(
                    f"past_key_values is a {type(given).__name__}, and an engine writes caches "
                    "of a fixed length that its plan lays out; leave past_key_values out, or pass "
                    "that of an earlier result of this engine"
                )
            given._is_user_defined = True
            return
        if generation_config.use_cache is False:
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "static", "hybrid"):
            raise EngineError(
                f"cache_implementation={kind!r} is no cache of a fixed length, and the program of "
                "a token is compiled for one; leave it out, or pass 'static'"
            )
        longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        model_kwargs[ARGUMENT] = held_cache(self, self._autopar_runner.new_cache(longest))

    @functools.wraps(own.prepare_inputs_for_generation)
    def prepare_inputs(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("tokenizer", None)  # of stop strings, which transformers hands to the model
        prepare = functools.partial(own.prepare_inputs_for_generation, self)
        tensors = sharded(kwargs.get(ARGUMENT))
        begins = tensors is not None and not tensors.layouts.specs and not tensors.tokens
        if begins and not args and not self.config.is_encoder_decoder:
            _plan_a_token(self, prepare, input_ids, kwargs)
        return prepare(input_ids, *args, **kwargs)

    def prepare_encoder(self: Any, *args: Any, **kwargs: Any) -> Any:
        prepare = functools.partial(own._prepare_text_encoder_decoder_kwargs_for_generation, self)
        if not _has_own_cache(self):
            return prepare(*args, **kwargs)
        with noted_encoder(self, functools.partial(own.get_encoder, self)):
            return prepare(*args, **kwargs)

    def never(self: Any, *_: Any, **__: Any) -> bool:
        return False  # the engine has compiled the model

    def as_it_is(self: Any) -> AbstractContextManager[None]:
        return nullcontext()

    return _of_whisper(own) | {
        "generate": generate,
        "prepare_inputs_for_generation": prepare_inputs,
        "_prepare_cache_for_generation": prepare_cache,
        "_prepare_text_encoder_decoder_kwargs_for_generation": prepare_encoder,
        "_valid_auto_compile_criteria": never,
        "_optimize_model_for_decode": as_it_is,
    }


def _of_whisper(own: Any) -> dict[str, Any]:
    """Methods of Whisper, which generates for segments of audio, one after the other."""
    # public ones that call the model: they run on shards, too
    members = {
        name: getattr(own, name)
        for name in ("generate_with_fallback", "detect_language")
        if hasattr(own, name)
    }
    if members:

        def postprocess(self: Any, seek_outputs: Any, **kwargs: Any) -> Any:
            if isinstance(seek_outputs, Mapping):  # it would take the tensors of the cache apart
                kept = {k: v for k, v in seek_outputs.items() if k != ARGUMENT}
                seek_outputs = type(seek_outputs)(**kept)
            return own._postprocess_outputs(self, seek_outputs, **kwargs)

        members["_postprocess_outputs"] = postprocess
    return members


def _has_own_cache(model: Any) -> bool:
    """Whether a model keeps keys and values of its layers in a `Cache`, and nothing else."""
    keeps = model._supports_default_dynamic_cache()
    if model.config.is_encoder_decoder:  # those of what was encoded, too
        keeps &= hasattr(sys.modules[type(model).__module__], "EncoderDecoderCache")
    if not keeps:
        log.warning(
            "%s generates with whole parameters on every rank: no cache of keys and values",
            type(model).__name__,
        )
        return False
    layer_types(model)
    return True


def _refuse(arguments: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if arguments.get(name) and arguments[name] != _NEUTRAL.get(name):
            raise EngineError(f"generate({name}=...) does not run on an engine: {why}")


def _plan_a_token(
    engine: Any, prepare: Callable[..., Any], input_ids: torch.Tensor, kwargs: Mapping[str, Any]
) -> None:
    """Plan the program of one token after the prompt.

    Args:
        prepare: the model's `prepare_inputs_for_generation`.
        kwargs: its arguments for the prompt.
    """
    later = {k: v for k, v in kwargs.items() if k not in _OF_THE_PROMPT}
    later = engine._update_model_kwargs_for_generation({}, later, is_encoder_decoder=False)
    longer = torch.cat([input_ids, input_ids[:, -1:]], dim=1)
    tensors = sharded(kwargs[ARGUMENT])
    assert tensors is not None
    tensors.tokens = input_ids.shape[1]
    try:
        inputs = prepare(longer, next_sequence_length=1, **later)
        engine._autopar_runner.plan_with_cache(**inputs, return_dict=True)
    finally:
        tensors.tokens = 0


_OF_THE_PROMPT = ("next_sequence_length", "is_first_iteration", "inputs_embeds")


@contextmanager
def _same_draws() -> Iterator[None]:
    """All ranks draw what rank 0 draws. A rank whose generators were in other states has these
    again afterwards."""
    if dist.get_world_size() == 1:
        yield
        return
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    mine = torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None
    states: list[Any] = [mine]
    dist.broadcast_object_list(states)
    differ = not all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(mine, states[0], strict=True)
    )
    _set(states[0])
    try:
        yield
    finally:
        if differ:
            _set(mine)


def _set(states: Any) -> None:
    cpu, cuda = states
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
