"""The cache of keys and values of a decoder that generates, laid out by the plan.

A program takes the cache as donated tensors of a fixed length, `[batch, heads, length, head_dim]`,
with the number of tokens in it, and gives them back with the new tokens' keys and values written
behind. Masks hide the rest. So one program serves all tokens.

A decoder with an encoder also reads keys and values of what was encoded. The program of the prompt
writes them whole; those of tokens read them.

transformers' models want a `Cache` of transformers'. The caller holds a `DecoderCache`; within a
program that is being captured, a `_TracedCache` of the program's tensors stands in its place. With
an encoder, these are pairs of caches.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.ir.precision import Precision
from autopar.ir.spec import ShardingSpec, fills_every_rank
from autopar.runtime.cache_classes import ARGUMENT, CacheShape, cache_shapes, traced_cache
from autopar.runtime.call import Call
from autopar.runtime.distribute import shard_of
from autopar.runtime.donated_inputs import DonatedInput
from autopar.runtime.encoder_inputs import ARGUMENT as ENCODER
from autopar.runtime.encoder_inputs import EncoderInputs, encoded, without_encoder

# Lengths are rounded up to these, so that programs serve requests of other lengths, too. One
# position more than is needed is never filled: a full cache would need no mask, which is another
# program.
_LENGTHS = 64


class CacheLayouts:
    """Of the caches of one engine: all have the shapes per layer and the layouts of the first.

    Args:
        precision: policy of the engine; keys and values are in its dtype of compute.

    Attributes:
        shapes: per layer, by the shapes of what is encoded; those of encoded keys and values behind
            the others.
        specs: of keys and values, in turn; empty until a program was planned.
    """

    def __init__(self, precision: Precision | None = None) -> None:
        self.precision = precision
        self.shapes: dict[Any, list[CacheShape]] = {}
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
        encodes: what the next program encodes.
    """

    def __init__(self, layouts: CacheLayouts, length: int, mesh: DeviceMesh) -> None:
        self.layouts, self._mesh = layouts, mesh
        self.length = -(-(length + 1) // _LENGTHS) * _LENGTHS
        self.tokens = 0
        self.tensors: list[DonatedInput] = []
        self.encodes: EncoderInputs | None = None
        self._of_decoder = 0  # tensors, before those of what was encoded

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
        given: dict[str, Any] = {"tokens": torch.tensor(self.tokens), "tensors": self.tensors}
        if self.encodes is not None:
            given["encodes"] = self.encodes.inputs
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
        return given

    def _make(self, model: torch.nn.Module, batch: int) -> None:
        inputs = {} if self.encodes is None else self.encodes.inputs
        key = tuple((name, tuple(x.shape)) for name, x in inputs.items())
        if key not in self.layouts.shapes:
            self.layouts.shapes[key] = cache_shapes(model, inputs)
        layers = self.layouts.shapes[key]
        self._of_decoder = 2 * sum(s.length is None for s in layers)
        specs: list[ShardingSpec | None] = list(self.layouts.specs)
        shapes: list[tuple[tuple[int, ...], torch.dtype]] = []
        for s in layers:
            dtype = s.dtype
            if self.layouts.precision is not None:
                dtype = self.layouts.precision.input_dtype(torch.empty(0, dtype=dtype))
            for width in (s.key_dim, s.value_dim):
                shapes.append(((batch, s.heads, s.length or self.length, width), dtype))
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
        self.encodes = None
        if not self.layouts.specs:
            self.layouts.specs = [x.spec for x in self.tensors if x.spec is not None]

    def reorder(self, index: torch.Tensor) -> None:
        """Take the sequences of these numbers, as beam search does; on all ranks. Beams of one
        sequence share what was encoded."""
        for x in self.tensors[: self._of_decoder]:
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


def call_with(cache: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """A call with the argument of a cache; quick, as it is made for every token."""
    # export knows no dynamic sizes beside arguments that a forward takes by `**`, as this one
    kwargs = {k: v for k, v in kwargs.items() if k != "return_dict"} | {ARGUMENT: cache}
    plain = (torch.Tensor, bool, int, float, str, type(None))
    if "encodes" in cache or not all(
        isinstance(x, plain) for x in (*args, *kwargs.values()) if x is not cache
    ):
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
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs[ARGUMENT]
        cache = traced_cache(self, given)
        own = {ARGUMENT: cache, "return_dict": True}
        if self.config.is_encoder_decoder:
            keys = given["tensors"][-1]
            own[ENCODER] = (
                encoded(self, given["encodes"], len(keys))
                if "encodes" in given
                else without_encoder(self, keys)
            )
        results = forward(self, *args, **kwargs | own)
        kept = {k: v for k, v in results.items() if k != ARGUMENT and not k.startswith("encoder_")}
        return type(results)(**kept), cache.written()

    model.__dict__["forward"] = types.MethodType(traced, model)
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if own is not None:
            model.__dict__["forward"] = own
