"""The results of a traced call as trees of tensors and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.tracer.numbers import TracedNumber


def plain_results(results: Any) -> tuple[Any, dict[int, Any]]:
    """Results as trees of tensors and numbers, and the numbers that vary by position.

    Data classes are registered as tree nodes. Other objects (a key-value cache) become None.
    """
    _register_dataclasses(results)
    leaves, spec = pytree.tree_flatten(results)
    varying = {k: x for k, x in enumerate(leaves) if type(x) is TracedNumber}
    plain = torch.Tensor | bool | int | float | str
    leaves = [x if isinstance(x, plain) else None for x in leaves]
    for k, number in varying.items():
        leaves[k] = number.value
    expressions = {k: number.expression for k, number in varying.items()}
    return pytree.tree_unflatten(leaves, spec), expressions


def _register_dataclasses(value: Any) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for field in dataclasses.fields(value):
            _register_dataclasses(getattr(value, field.name))
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            _register_dataclasses(item)
