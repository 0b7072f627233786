"""Classes of caches that transformers' models are called with.

Three kinds stand in for a cache of transformers: what `generate` holds (`held_cache`), what a model
writes to while a program is captured (`traced_cache`), and what notes the shapes that it writes.
With an encoder, each is a pair: of the decoder's own keys and values, and of those of what was
encoded.

Private to transformers here: the attributes of its layers of caches; tested with 5.23.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import EngineError
from autopar.runtime.encoder_inputs import ARGUMENT as ENCODER
from autopar.runtime.encoder_inputs import encoded

ARGUMENT = "past_key_values"

# Layers that a mask can describe over keys of all positions.
_STATIC = ("full_attention", "sliding_attention", "chunked_attention")
_SLIDING = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one layer: their heads and the sizes of a head.

    Args:
        length: of what was encoded; None for the positions of the cache.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    length: int | None = None


def layer_types(model: Any) -> list[str]:
    """Of each layer of a decoder.

    Raises:
        EngineError: one keeps what no cache of a fixed length holds.
    """
    from transformers.cache_utils import get_layer_types_and_kwargs

    config = model.config.get_text_config(decoder=True)
    kinds: list[str] = get_layer_types_and_kwargs(config)[0]
    other = sorted(set(kinds) - set(_STATIC))
    if other:
        raise EngineError(
            f"{type(model).__name__} has layers of the kinds {other}, and a cache of a fixed "
            f"length holds keys and values of {', '.join(_STATIC)} only. Call the engine token by "
            "token with use_cache=False, or generate on one device"
        )
    return kinds


def cache_shapes(model: Any, encodes: Mapping[str, torch.Tensor]) -> list[CacheShape]:
    """The shapes of keys and values, from a run of the model on tensors without memory.

    Args:
        encodes: inputs of the encoder; empty without one.

    Raises:
        EngineError: the model does not write its cache as transformers' do.
    """
    probe, layers = _classes().probe(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            n: torch.empty(tuple(t.shape), dtype=t.dtype, device="cpu") for n, t in tensors.items()
        }
        ids = torch.zeros(1, 1, dtype=torch.int64)
        kwargs: dict[str, Any] = {ARGUMENT: probe, "use_cache": True}
        if encodes:
            kwargs["decoder_input_ids"] = ids
            for name, x in encodes.items():
                kwargs[name] = torch.empty((1, *x.shape[1:]), dtype=x.dtype, device="cpu")
            if ENCODER in kwargs:
                kwargs[ENCODER] = encoded(model, kwargs, 1)
        else:
            kwargs["input_ids"] = ids
        torch.func.functional_call(model, fakes, kwargs=kwargs)
    shapes = [layer.shape for layer in layers]
    if None in shapes:
        raise EngineError(
            f"{type(model).__name__} wrote nothing to the cache of its layers "
            f"{[k for k, s in enumerate(shapes) if s is None]}; generate on one device"
        )
    return shapes


def held_cache(model: Any, tensors: Any) -> Any:
    """The cache as transformers' generation sees it.

    Args:
        tensors: the `CacheTensors`.
    """
    return _classes().held(model, tensors)


def traced_cache(model: Any, given: Mapping[str, Any]) -> Any:
    """The cache of a program that is being captured; its `written()` has what it writes, and `()`
    for tensors that it leaves as they are.

    Args:
        given: what the program takes in its place.
    """
    return _classes().traced(model, given)


@functools.cache
def _classes() -> types.SimpleNamespace:
    """Caches of transformers', which is optional."""
    from transformers.cache_utils import Cache, EncoderDecoderCache, StaticLayer

    class _Layer(StaticLayer):
        """A layer of all positions, whatever part of them a mask shows."""

        def __init__(self, kind: str, length: int) -> None:
            super().__init__(max_cache_len=length)
            self.is_sliding = kind in _SLIDING
            self.is_initialized = True

    class _HeldLayer(_Layer):
        """As generation sees it: how many tokens there are."""

        def __init__(self, kind: str, tensors: Any) -> None:
            super().__init__(kind, tensors.length)
            self._tensors = tensors

        @property
        def batch_size(self) -> int:
            return self._tensors.tensors[0].shape[0] if self._tensors.tensors else -1

        def get_seq_length(self) -> int:
            return self._tensors.tokens

        def update(self, *_: Any, **__: Any) -> Any:
            raise EngineError("a cache of an engine is written by the engine's programs")

    class _TracedLayer(_Layer):
        """Of a program that is being captured."""

        def __init__(self, kind: str, keys: Any, values: Any, tokens: Any) -> None:
            super().__init__(kind, keys.shape[2])
            self.keys, self.values, self.tokens = keys, values, tokens
            self.batch_size = keys.shape[0]

        def get_seq_length(self) -> Any:
            return self.tokens

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            places = torch.arange(keys.shape[2], device=keys.device) + self.tokens
            self.keys = self.keys.index_copy(2, places, keys)
            self.values = self.values.index_copy(2, places, values)
            return self.keys, self.values

        def written(self) -> list[Any]:
            return [self.keys, self.values]

    class _EncodedLayer(_Layer):
        """Keys and values of what was encoded: written once, or read."""

        def __init__(self, keys: Any, values: Any, *, read: bool) -> None:
            super().__init__(_STATIC[0], keys.shape[2])
            self.keys, self.values, self.read = keys, values, read

        def get_seq_length(self) -> int:
            return int(self.keys.shape[2]) if self.read else 0

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            self.keys, self.values = keys, values
            return keys, values

        def written(self) -> list[Any]:
            return [(), ()] if self.read else [self.keys, self.values]

    class _ProbeLayer(_Layer):
        """Notes what is written."""

        shape: CacheShape | None = None

        def __init__(self, kind: str, *, encoded: bool = False) -> None:
            super().__init__(kind, 1)
            self._encoded = encoded

        def get_seq_length(self) -> int:
            return 0

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            length = keys.shape[2] if self._encoded else None
            sizes = keys.shape[1], keys.shape[3], values.shape[3]
            self.shape = CacheShape(*sizes, keys.dtype, length)
            return keys, values

    class DecoderCache(Cache):
        """A cache that lies on the ranks as the plan says; `generate` makes it."""

        def __init__(self, model: Any, tensors: Any) -> None:
            super().__init__(layers=[_HeldLayer(kind, tensors) for kind in layer_types(model)])
            self.sharded = tensors

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            self.sharded.reorder(beam_idx)

        def reset(self) -> None:
            self.sharded.tokens = 0

    class DecoderCacheWithEncoder(EncoderDecoderCache):
        """The same with keys and values of what was encoded."""

        def __init__(self, model: Any, tensors: Any) -> None:
            super().__init__(DecoderCache(model, tensors), DecoderCache(model, tensors))
            self.sharded = tensors

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            self.sharded.reorder(beam_idx)

        def reset(self) -> None:
            raise EngineError("begin with a new cache where something else is encoded")

    def held(model: Any, tensors: Any) -> Any:
        pair = model.config.is_encoder_decoder
        return (DecoderCacheWithEncoder if pair else DecoderCache)(model, tensors)

    class _TracedCache(Cache):
        def written(self) -> list[Any]:
            return [x for layer in self.layers for x in layer.written()]

    class _TracedPair(EncoderDecoderCache):
        def written(self) -> list[Any]:
            return [*self.self_attention_cache.written(), *self.cross_attention_cache.written()]

    def traced(model: Any, given: Mapping[str, Any]) -> Any:
        tensors, kinds = given["tensors"], layer_types(model)
        pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
        own, of_encoder = pairs[: len(kinds)], pairs[len(kinds) :]
        layers = [
            _TracedLayer(kind, *pair, given["tokens"])
            for kind, pair in zip(kinds, own, strict=True)
        ]
        cache = _TracedCache(layers=layers)
        if not of_encoder:
            return cache
        read = "encodes" not in given
        encoded = [_EncodedLayer(*pair, read=read) for pair in of_encoder]
        return _TracedPair(cache, _TracedCache(layers=encoded))

    def probe(model: Any) -> Any:
        """A cache, and its layers."""
        layers = [_ProbeLayer(kind) for kind in layer_types(model)]
        if not model.config.is_encoder_decoder:
            return Cache(layers=layers), layers
        encoded = [_ProbeLayer(_STATIC[0], encoded=True) for _ in layers]
        pair = EncoderDecoderCache(Cache(layers=layers), Cache(layers=encoded))
        return pair, [*layers, *encoded]

    return types.SimpleNamespace(held=held, traced=traced, probe=probe)
