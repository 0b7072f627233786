"""What a model with an encoder encodes, until the program of its prompt runs.

`generate` of transformers calls the encoder on its own, before its loop. An engine has one program
of the encoder and of the decoder's first tokens, so that one plan lays out the weights of both. It
writes the keys and values of what was encoded to the cache. The programs of later tokens read them,
and take nothing else of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

ARGUMENT = "encoder_outputs"


class EncoderInputs(dict[str, Any]):
    """Stands for the results of an encoder, of which it has none.

    Attributes:
        inputs: what the encoder is called with; tensors of one row per sequence, whatever the
            number of beams.
    """

    def __init__(self, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.inputs = dict(inputs)

    @staticmethod
    def of(given: Any) -> EncoderInputs | None:
        """Of the argument of a call: what is to be encoded, or the results of an encoder."""
        if given is None or isinstance(given, EncoderInputs):
            return given
        hidden = given if isinstance(given, torch.Tensor) else given[0]
        return EncoderInputs({ARGUMENT: hidden})


class _NotedEncoder:
    """Notes what an encoder is called with."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self.forward = encoder.forward  # whose arguments are looked at

    def __call__(self, **inputs: Any) -> EncoderInputs:
        return EncoderInputs({k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)})


@contextmanager
def noted_encoder(model: torch.nn.Module, encoder: Callable[[], torch.nn.Module]) -> Iterator[None]:
    """While on, a model's encoder is not run when it is called.

    Args:
        encoder: gives it.
    """
    noted = _NotedEncoder(encoder())
    model.__dict__["get_encoder"] = lambda *_, **__: noted
    try:
        yield
    finally:
        del model.__dict__["get_encoder"]


def encoded(model: Any, inputs: Mapping[str, torch.Tensor], rows: int) -> Any:
    """The results of a model's encoder, for the decoder.

    Args:
        inputs: of `EncoderInputs`.
        rows: of the decoder; the beams of a sequence are next to each other.
    """
    from transformers.modeling_outputs import BaseModelOutput

    if ARGUMENT in inputs:
        hidden = inputs[ARGUMENT]
    else:
        hidden = model.get_encoder()(**inputs, return_dict=True)[0]
    if hidden.shape[0] != rows:
        hidden = hidden.repeat_interleave(rows // hidden.shape[0], 0)
    return BaseModelOutput(last_hidden_state=hidden)


def without_encoder(model: Any, keys: torch.Tensor) -> Any:
    """The same where keys and values are in the cache: of the right shape, without a meaning.

    Args:
        keys: of what was encoded, [rows, heads, length, head_dim].
    """
    from transformers.modeling_outputs import BaseModelOutput

    width = getattr(model.config, "hidden_size", 1)
    hidden = keys.new_zeros(keys.shape[0], keys.shape[2], width)
    return BaseModelOutput(last_hidden_state=hidden)


def without_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of the whole model, whose encoder runs for every token."""
    given = kwargs.get(ARGUMENT)
    if not isinstance(given, EncoderInputs):
        return kwargs
    rows = next(x for k, x in kwargs.items() if k.startswith("decoder_input")).shape[0]
    inputs = {k: x.repeat_interleave(rows // x.shape[0], 0) for k, x in given.inputs.items()}
    return {k: v for k, v in kwargs.items() if k != ARGUMENT} | inputs
