"""The results of a traced call as trees of tensors and numbers."""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.result_objects import ResultConstant, ResultObject
from autopar.tracer import packed_sequences
from autopar.tracer.numbers import TracedNumber


def plain_results(results: Any) -> tuple[Any, dict[int, Any]]:
    """Results as trees of tensors and numbers, and the numbers that vary by position.

    Data classes are registered as tree nodes, and objects that hold tensors (a key-value cache) are
    made anew at each call. Constants (a dtype, a class) are given as they are.

    Raises:
        CaptureError: an object is neither.
    """
    _register_dataclasses(results)
    results = pytree.tree_map(_as_node, results)
    leaves, spec = pytree.tree_flatten(results)
    varying = {k: x for k, x in enumerate(leaves) if type(x) is TracedNumber}
    plain = torch.Tensor | bool | int | float | str
    leaves = [x if isinstance(x, plain) else None for x in leaves]  # sizes with symbols, too
    for k, number in varying.items():
        leaves[k] = number.value
    expressions = {k: number.expression for k, number in varying.items()}
    return pytree.tree_unflatten(leaves, spec), expressions


_LEAVES = (torch.Tensor, bool, int, float, str, torch.SymInt, torch.SymFloat, torch.SymBool)
_CONSTANTS = (
    type, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, complex, bytes,
    range, slice, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type(...),
)  # fmt: skip


def _as_node(x: Any, within: tuple[int, ...] = ()) -> Any:
    """A leaf of the results, or a tree node in its place.

    Args:
        within: ids of the objects around it.
    """
    if x is None or isinstance(x, _LEAVES) or type(x) is TracedNumber:
        return x
    if isinstance(x, _CONSTANTS):
        return ResultConstant(x)
    if isinstance(x, packed_sequences.StandIn):
        raise packed_sequences.refusal()
    if id(x) in within or not _is_plain_object(x):
        raise CaptureError(
            f"the model returns a {type(x).__qualname__}, which cannot be carried out of the "
            "capture; return tensors, numbers, strings, and lists, tuples, dicts and plain objects "
            "of them"
        )
    _register_dataclasses(vars(x))
    inside = (*within, id(x))
    namespace = {
        name: pytree.tree_map(lambda leaf: _as_node(leaf, inside), value)
        for name, value in vars(x).items()
    }
    return ResultObject(type(x), namespace)


def _is_plain_object(x: Any) -> bool:
    """Whether an object is its `__dict__`, so that another one with the same is as good."""
    cls: Any = type(x)
    classes = [vars(klass).values() for klass in cls.__mro__]
    return (
        hasattr(x, "__dict__")
        and not isinstance(x, torch.nn.Module)
        and cls.__new__ is object.__new__
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and not hasattr(cls, "__setstate__")
        and not any(isinstance(m, types.MemberDescriptorType) for own in classes for m in own)
    )


def _register_dataclasses(value: Any) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for field in dataclasses.fields(value):
            _register_dataclasses(getattr(value, field.name))
    elif isinstance(value, list | tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            _register_dataclasses(item)
