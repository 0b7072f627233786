"""Casts of arguments: those of a precision policy, and those of parameters that are only cast.

Such a parameter is cast where the program begins, so that its gathers are of the cast values: half
of the bytes under autocast. Gradients are summed in the dtype at rest, as without distribution.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from autopar.ir.graph import ModelGraph
from autopar.ir.precision import Cast, Precision

_TO = torch.ops.aten._to_copy.default


def with_casts(
    graph: ModelGraph,
    precision: Precision | None,
    model: torch.nn.Module,
    example: Any,
    *,
    cast_first: bool = True,
) -> ModelGraph:
    """The graph, which was captured under the policy, with the casts of its arguments.

    Args:
        example: (args, kwargs) in the caller's dtypes.
        cast_first: whether parameters that the graph only casts are cast where it begins.
    """
    casts: dict[str, Cast] = {}
    if precision is not None:
        by_name = precision.casts(model)
        casts = {k: by_name[name] for k, name in graph.parameters.items() if name in by_name}
        for name, x in zip(graph.inputs, pytree.tree_leaves(example), strict=True):
            if name is not None:
                dtype = graph.placeholders[name].meta["val"].dtype
                casts[name] = Cast(x.dtype, dtype, dtype)
    for name in graph.parameters if cast_first else ():
        node = graph.placeholders[name]
        dtype = _narrower_dtype(node)
        if name not in casts and dtype is not None:
            casts[name] = Cast(node.meta["val"].dtype, dtype, node.meta["val"].dtype)
            _take_as(node, dtype)
    casts = {name: cast for name, cast in casts.items() if not cast.is_none}
    return dataclasses.replace(graph, casts=casts, precision=precision)


def keep_modules(clone: torch.nn.Module, precision: Precision | None) -> None:
    """Let the modules of a copy that the policy keeps compute in the dtype at rest, too: their
    inputs are cast to it, and their results to the dtype of compute, but for scalars (losses)."""
    if precision is None or precision.compute is None:
        return
    wrapped: list[str] = []
    for name, module in clone.named_modules():
        called = type(module).forward is not torch.nn.Module.forward  # unlike a ModuleList
        if not precision.keeps(name) or not called or name.startswith(tuple(wrapped)):
            continue
        wrapped.append(f"{name}.")
        own = (precision.at_rest(p) for p in module.parameters() if p.dtype.is_floating_point)
        module.forward = functools.partial(
            _in_dtype, module.forward, precision.kept_dtype(own), getattr(torch, precision.compute)
        )


def _in_dtype(
    forward: Callable[..., Any], dtype: torch.dtype, after: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    args, kwargs = pytree.tree_map(lambda x: _to(x, after, dtype), (args, kwargs))
    return pytree.tree_map(lambda x: _to(x, dtype, after, dims=1), forward(*args, **kwargs))


def _to(x: Any, source: torch.dtype, target: torch.dtype, dims: int = 0) -> Any:
    casts = isinstance(x, torch.Tensor) and x.dtype == source and x.ndim >= dims
    return x.to(target) if casts else x


def _narrower_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype to which all users of a parameter cast it, if it is a shorter one."""
    if not node.users or any(not _casts_only(user) for user in node.users):
        return None
    dtypes = {user.meta["val"].dtype for user in node.users}
    dtype = dtypes.pop()
    shorter = dtype.is_floating_point and dtype.itemsize < node.meta["val"].dtype.itemsize
    return dtype if shorter and not dtypes else None


def _casts_only(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return (
        node.target is _TO
        and set(node.kwargs) <= {"dtype"}
        and isinstance(value, torch.Tensor)
        and value.stride() == node.args[0].meta["val"].stride()  # type: ignore[union-attr]
    )


def _take_as(node: fx.Node, dtype: torch.dtype) -> None:
    """Give a placeholder the dtype that its users cast it to."""
    (cast, *_) = node.users
    node.meta["val"] = cast.meta["val"]
    for user in list(node.users):
        user.replace_all_uses_with(node)
        node.graph.erase_node(user)
