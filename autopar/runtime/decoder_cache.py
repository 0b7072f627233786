"""The cache of keys and values of a decoder that generates, laid out by the plan.

A program takes the cache as donated tensors of a fixed length, `[batch, heads, length, head_dim]`,
with the number of tokens in it, and gives them back with the new tokens' keys and values written
behind. Masks hide the rest. So one program serves all tokens.

transformers' models want a `Cache` of transformers'. The caller holds a `DecoderCache`; within a
program that is being captured, a `_TracedCache` of the program's tensors stands in its place.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.ir.precision import Precision
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.runtime.call import Call
from autopar.runtime.distribute import shard_of
from autopar.runtime.donated_inputs import DonatedInput

ARGUMENT = "past_key_values"

# Layers that a mask can describe over keys of all positions.
_STATIC = ("full_attention", "sliding_attention", "chunked_attention")
_SLIDING = ("sliding_attention", "chunked_attention")
# Lengths are rounded up to these, so that programs serve requests of other lengths, too. One
# position more than is needed is never filled: a full cache would need no mask, which is another
# program.
_LENGTHS = 64


@dataclass(frozen=True)
class CacheShape:
    """Keys and values of one layer: their heads and the sizes of a head."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype


class CacheLayouts:
    """Of the caches of one engine: all have the shapes per layer and the layouts of the first.

    Args:
        precision: policy of the engine; keys and values are in its dtype of compute.

    Attributes:
        shapes: per layer; empty until they are known.
        specs: of keys and values, in turn; empty until a program was planned.
    """

    def __init__(self, precision: Precision | None = None) -> None:
        self.precision = precision
        self.shapes: list[CacheShape] = []
        self.specs: list[ShardingSpec] = []


class CacheTensors:
    """The tensors of a cache.

    Args:
        layouts: of the engine.
        length: positions that it holds.
        mesh: that it is laid out on.

    Attributes:
        tokens: written so far.
        tensors: keys and values of each layer in turn; empty until the batch is known.
    """

    def __init__(self, layouts: CacheLayouts, length: int, mesh: DeviceMesh) -> None:
        self.layouts, self._mesh = layouts, mesh
        self.length = -(-(length + 1) // _LENGTHS) * _LENGTHS
        self.tokens = 0
        self.tensors: list[DonatedInput] = []

    @property
    def laid_out(self) -> bool:
        return any(x.spec is not None for x in self.tensors)

    def argument(self, model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, Any]:
        """What a program takes in the place of the cache.

        Args:
            tokens: of the call, [batch, tokens, ...].

        Raises:
            EngineError: the batch is not that of the tokens in the cache, or they are too many.
        """
        batch, new = tokens.shape[:2]
        if not self.tensors:
            self._make(model, batch)
        if self.tensors[0].shape[0] != batch:
            raise EngineError(
                f"the cache holds {self.tensors[0].shape[0]} sequences, and the call has {batch}; "
                "begin with a new cache"
            )
        if self.tokens + new > self.length:
            raise EngineError(
                f"the cache has {self.length} positions, of which {self.tokens} are filled, and "
                f"the call has {new} tokens; pass a larger max_length to generate()"
            )
        return {"tokens": torch.tensor(self.tokens), "tensors": self.tensors}

    def _make(self, model: torch.nn.Module, batch: int) -> None:
        if not self.layouts.shapes:
            self.layouts.shapes = _shapes(model)
        specs: list[ShardingSpec | None] = list(self.layouts.specs)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        for s in self.layouts.shapes:
            dtype = s.dtype
            if self.layouts.precision is not None:
                dtype = self.layouts.precision.input_dtype(torch.empty(0, dtype=dtype))
            for width in (s.key_dim, s.value_dim):
                shapes.append(((batch, s.heads, self.length, width), dtype))
        specs = specs or [None] * len(shapes)
        for (shape, dtype), spec in zip(shapes, specs, strict=True):
            fits = spec is not None and all(
                fills_every_rank(n, axes, tuple(self._mesh.shape))
                for n, axes in zip(shape, spec.dims, strict=True)
            )
            self.tensors.append(DonatedInput.of(shape, dtype, spec if fits else None))

    def written(self, new: int) -> None:
        """Count the tokens that a program has written, and note the layouts of the first."""
        self.tokens += new
        if not self.layouts.specs:
            self.layouts.specs = [x.spec for x in self.tensors if x.spec is not None]

    def reorder(self, index: torch.Tensor) -> None:
        """Take the sequences of these numbers, as beam search does; on all ranks."""
        for x in self.tensors:
            assert x.spec is not None
            assert x.local is not None
            local = x.local
            coords = self._mesh.get_coordinate()
            assert coords is not None, "the mesh is over all processes"
            batch = ShardingSpec((x.spec.dims[0], *[()] * (x.ndim - 1)))
            if x.spec.dims[0]:  # sequences go from rank to rank
                local = _gathered(local, x.shape[0], batch, self._mesh)
            local = local.index_select(0, index.to(local.device))
            x.local = shard_of(local, batch, tuple(self._mesh.shape), tuple(coords)).contiguous()


def _gathered(
    local: torch.Tensor, batch: int, spec: ShardingSpec, mesh: DeviceMesh
) -> torch.Tensor:
    """All sequences of what a rank holds of them."""
    shape = torch.Size((batch, *local.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    split = DTensor.from_local(
        local, mesh, spec.to_placements(mesh.ndim), run_check=False, shape=shape, stride=stride
    )
    return split.full_tensor()


def sharded(cache: Any) -> CacheTensors | None:
    """The tensors of a `DecoderCache`; None of anything else."""
    tensors = getattr(cache, "sharded", None)
    return tensors if isinstance(tensors, CacheTensors) else None


def decoder_cache(model: torch.nn.Module, tensors: CacheTensors) -> Any:
    """The cache as transformers' generation sees it."""
    return _classes().held(model, tensors)


def call_with(cache: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call with the argument of a cache; quick, as it is made for every token."""
    # export knows no dynamic sizes beside arguments that a forward takes by `**`, as this one
    kwargs = {k: v for k, v in kwargs.items() if k != "return_dict"} | {ARGUMENT: cache}
    plain = (torch.Tensor, bool, int, float, str, type(None))
    if not all(isinstance(x, plain) for x in (*args, *kwargs.values()) if x is not cache):
        return Call.of(args, kwargs)
    leaves: list[Any] = list(args)
    for x in kwargs.values():
        leaves += [cache["tokens"], *cache["tensors"]] if x is cache else [x]
    return Call(args, kwargs, leaves, (len(args), len(cache["tensors"]), *kwargs))


@contextmanager
def with_cache(model: torch.nn.Module, call: Call) -> Iterator[None]:
    """While on, calling the model with the tensors of a cache gives its results, and the tensors
    with what it writes; elsewhere the model is as it is."""
    given = call.kwargs.get(ARGUMENT)
    if not isinstance(given, Mapping) or "tensors" not in given:
        yield
        return
    own = model.__dict__.get("forward")
    forward = type(model).forward

    @functools.wraps(forward)
    def traced(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        cache = _classes().traced(self, kwargs[ARGUMENT])
        results = forward(self, *args, **{**kwargs, ARGUMENT: cache, "return_dict": True})
        kept = {k: v for k, v in results.items() if k != ARGUMENT}
        return type(results)(**kept), cache.written()

    model.__dict__["forward"] = types.MethodType(traced, model)
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own


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


def _shapes(model: Any) -> list[CacheShape]:
    """The shapes of keys and values, from a run of the model on tensors without memory.

    Raises:
        EngineError: the model does not write its cache as transformers' do.
    """
    probe = _classes().probe(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fakes = {
            n: torch.empty(tuple(t.shape), dtype=t.dtype, device="cpu") for n, t in tensors.items()
        }
        ids = torch.zeros(1, 1, dtype=torch.int64)
        kwargs = {"input_ids": ids, ARGUMENT: probe, "use_cache": True}
        torch.func.functional_call(model, fakes, kwargs=kwargs)
    shapes = [layer.shape for layer in probe.layers]
    if None in shapes:
        raise EngineError(
            f"{type(model).__name__} wrote nothing to the cache of its layers "
            f"{[k for k, s in enumerate(shapes) if s is None]}; generate on one device"
        )
    return shapes


@functools.cache
def _classes() -> types.SimpleNamespace:
    """Caches of transformers', which is optional."""
    from transformers.cache_utils import Cache, StaticLayer

    class _Layer(StaticLayer):
        """A layer of all positions, whatever part of them a mask shows."""

        def __init__(self, kind: str, length: int) -> None:
            super().__init__(max_cache_len=length)
            self.is_sliding = kind in _SLIDING
            self.is_initialized = True

    class _HeldLayer(_Layer):
        """As generation sees it: how many tokens there are."""

        def __init__(self, kind: str, tensors: CacheTensors) -> None:
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

    class _ProbeLayer(_Layer):
        """Notes what is written."""

        shape: CacheShape | None = None

        def get_seq_length(self) -> int:
            return 0

        def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
            self.shape = CacheShape(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype)
            return keys, values

    class DecoderCache(Cache):
        """A cache that lies on the ranks as the plan says; `generate` makes it."""

        def __init__(self, model: Any, tensors: CacheTensors) -> None:
            super().__init__(layers=[_HeldLayer(kind, tensors) for kind in layer_types(model)])
            self.sharded = tensors

        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            self.sharded.reorder(beam_idx)

        def reset(self) -> None:
            self.sharded.tokens = 0

    class _TracedCache(Cache):
        def __init__(self, model: Any, given: Mapping[str, Any]) -> None:
            tensors = given["tensors"]
            pairs = zip(layer_types(model), tensors[::2], tensors[1::2], strict=True)
            super().__init__(layers=[_TracedLayer(*pair, given["tokens"]) for pair in pairs])

        def written(self) -> list[Any]:
            return [x for layer in self.layers for x in (layer.keys, layer.values)]

    class _Probe(Cache):
        def __init__(self, model: Any) -> None:
            super().__init__(layers=[_ProbeLayer(kind, 1) for kind in layer_types(model)])

    return types.SimpleNamespace(held=DecoderCache, traced=_TracedCache, probe=_Probe)
