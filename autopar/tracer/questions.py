"""The operators that ask for values, and others that a capture has to carry out in its own way.

`HANDLERS` says by the name of a function what `BranchResolver` does when the forward calls it.

`torch.fx.experimental.symbolic_shapes.free_unbacked_symbols` is private (tested with torch 2.13).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.ir.graph import mark_leaf
from autopar.ir.guards import on_own_thread
from autopar.tracer import packed_sequences
from autopar.tracer.gradient_hooks import GradientNode, ValueHooks
from autopar.tracer.hidden_writes import HiddenWrites
from autopar.tracer.proxies import current_tracer, slot_of
from autopar.tracer.source import asking_frame, current_line, user_frame
from autopar.tracer.statistics import instance_norm


class Resolver(Protocol):
    """`BranchResolver`, as handlers use it."""

    hooks: ValueHooks
    writes: HiddenWrites

    def __enter__(self) -> Any: ...
    def __exit__(self, *error: Any) -> None: ...
    def value(self, t: torch.Tensor) -> Any: ...
    def is_random(self, t: torch.Tensor) -> bool: ...
    def record(self, kind: Any, value: Any, note: str) -> Any: ...


UNCHECKED = "a check that only raises; not made"

_DATA: Any = vars(torch._C.TensorBase)["data"].__get__
_SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__
_GRAD_FN: Any = vars(torch._C.TensorBase)["grad_fn"].__get__
_REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__set__


def _number(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    t = args[0]
    if func.__name__ == "item" and resolver.is_random(t):
        return t  # so that a comparison with it is known to be random
    if t.numel() != 1:
        return func(*args, **kwargs)
    floating = isinstance(t, FakeTensor) and t.dtype.is_floating_point
    try:
        value = resolver.value(t.reshape(()) if t.ndim else t)
    except CaptureError:
        if floating and func.__name__ == "item":
            return t.detach().reshape(()).clone()  # arithmetic on it needs no number
        raise
    cast = _CASTS.get(func.__name__)
    return value if cast is None else cast(value)


def _list(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    value = resolver.value(args[0])
    return on_own_thread(value.tolist) if isinstance(value, torch.Tensor) else value


def _nonzero(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    mask, rest = args[0], (*args[1:], *kwargs.values())
    if func.__name__ == "where" and (rest or len(args) > 1):
        return func(*args, **kwargs)
    as_tuple = func.__name__ == "where" or True in rest
    try:
        indices = _indices(resolver, mask)
    except CaptureError as error:
        if as_tuple:  # writing at these places needs no count
            return _Places(mask != 0, error)
        raise
    return indices.unbind(1) if as_tuple else indices


def _indices(resolver: Resolver, mask: torch.Tensor) -> torch.Tensor:
    """`mask.nonzero()`, with a number of rows that the example batch decides."""
    count = int(resolver.value((mask != 0).sum()))
    return torch.ops.aten.nonzero_static(mask, size=count)


def _select(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """Indexing: masks by their indices, tensors as slice ends by their values."""

    def number(end: Any) -> Any:
        return int(resolver.value(end)) if isinstance(end, torch.Tensor) else end

    source, index = args
    items = list(index) if isinstance(index, tuple) else [index]
    plain: list[Any] = []
    for item in items:
        if isinstance(item, slice):
            plain.append(slice(*map(number, (item.start, item.stop, item.step))))
        elif _is_mask(item):
            plain += _indices(resolver, item).unbind(1)
        else:
            plain.append(item)
    if not any(map(_is_mask, items)) and not any(isinstance(i, slice) for i in items):
        return func(*args, **kwargs)
    return func(source, tuple(plain) if isinstance(index, tuple) or len(plain) > 1 else plain[0])


def _write(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`x[torch.where(mask)] = value` is `x[mask] = value`."""
    target, index, value = args
    return func(target, index.mask if isinstance(index, _Places) else index, value)


def _masked_select(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    source, mask = args
    shape = torch.broadcast_shapes(source.shape, mask.shape)
    return source.expand(shape)[tuple(_indices(resolver, mask.expand(shape)).unbind(1))]


def _property(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`x.detach()` for `x.data`, which would leave the capture."""
    if func == _DATA:
        return _detach(resolver, torch.Tensor.detach, args, {})
    value = func(*args, **kwargs)
    asked = func == _GRAD_FN and value is not None and asking_frame() is user_frame()
    return GradientNode(value) if asked else value


def _hook(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`x.register_hook(hook)`."""
    t, hook = args[0], args[1] if len(args) > 1 else kwargs["hook"]
    if slot_of(t, current_tracer()) is None:
        return func(*args, **kwargs)
    return resolver.hooks.register(t, hook)


def _retain(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`x.retain_grad()`, which does nothing for a parameter."""
    slot = slot_of(args[0], current_tracer())
    if slot is None or isinstance(args[0], torch.nn.Parameter):
        return func(*args, **kwargs)
    line = current_line()
    raise CaptureError(
        f"{line}: `{line.text}` keeps the gradient of a value inside of the program, where the "
        "caller could not read it; take it by a hook (h.register_hook)"
    )


def _detach(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    return resolver.writes.detached(args[0], func(*args, **kwargs))


def _set(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`x.data = value` is a write into x."""
    if func != _SET_DATA or slot_of(args[0], current_tracer()) is None:
        return _leaf(resolver, func, args, kwargs)
    with resolver, torch.no_grad():
        args[0].copy_(args[1])
    return None


def _leaf(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """Mark the leaf of `x.requires_grad = True`: eager PyTorch computes its gradient."""
    t, rest = args[0], [*args[1:], *kwargs.values()]
    slot = slot_of(t, current_tracer())
    setter = func == _REQUIRES_GRAD or func.__name__ == "requires_grad_"
    if setter and rest in ([], [True]) and slot is not None and not t.requires_grad:
        mark_leaf(slot.proxy.node)
    return func(*args, **kwargs)


def _within(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """A function of torch that is written in Python and asks for values itself."""
    with resolver:
        return _body(func)(*args, **kwargs)


def _instance_norm(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    plain = func is torch.nn.functional.instance_norm
    return (instance_norm if plain else func)(*args, **kwargs)


def _recurrent(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(args[0], packed_sequences.Rows):
        rows, _, *rest = args
        return packed_sequences.recurrent(func.__name__, rows, *rest)
    sizes = args[1] if len(args) > 2 and isinstance(args[2], list | tuple | torch.Tensor) else None
    if isinstance(sizes, torch.Tensor) and not sizes.is_floating_point():  # packed by the caller
        raise packed_sequences.refusal()
    return func(*args, **kwargs)


def _pack(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    with resolver:
        return packed_sequences.packed(resolver.value, *args)


def _pad(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    with resolver:
        return packed_sequences.padded(*args)


def _assert(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch._assert(condition, message)`."""
    condition, message = args[0], args[1] if len(args) > 1 else kwargs.get("message", "")
    if isinstance(condition, FakeTensor):
        try:
            condition = bool(resolver.value(condition))
        except CaptureError:
            condition = resolver.record("check", True, UNCHECKED)
    assert condition, message


def _equal(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    a, b = args
    return a.shape == b.shape and bool(resolver.value((a == b).all()))


def _contains(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    return bool(resolver.value((args[0] == args[1]).any()))


def _sizes(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """Operators that take numbers: tensors of no dims by their values."""

    unknown: list[CaptureError] = []

    def number(value: Any) -> Any:
        if not isinstance(value, FakeTensor) or value.ndim:
            return value
        try:
            return resolver.value(value)
        except CaptureError as error:
            unknown.append(error)
            return value  # the operator may take it as it is

    # not the object of a method, nor what torch.tensor copies
    keep = int(isinstance(args[0], torch.Tensor) and func.__name__ not in _RANGES)
    rest, kwargs = pytree.tree_map(number, (tuple(args[keep:]), kwargs))
    result = func(*args[:keep], *rest, **kwargs)
    if unknown and free_unbacked_symbols(pytree.tree_leaves(result)):
        raise unknown[0]  # the value is a size
    return result


def _example_result(resolver: Resolver, func: Any, args: Any, kwargs: Any) -> Any:
    """Operators whose result has a data-dependent shape: the result on the example batch."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, FakeTensor)]
    repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
    known_size = isinstance(repeats, int) or kwargs.get("output_size") is not None
    if not tensors or (func.__name__ == "repeat_interleave" and known_size):
        return func(*args, **kwargs)
    values = iter([resolver.value(t) for t in tensors])

    def real(x: Any) -> Any:
        return torch.as_tensor(next(values)) if isinstance(x, FakeTensor) else x

    results = on_own_thread(
        lambda: func(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs))
    )
    # as constants of the graph
    return pytree.tree_map_only(
        torch.Tensor,
        lambda t: torch.tensor(t.tolist(), dtype=t.dtype, device=t.device),
        results,
    )


class _Places(tuple[Any, ...]):
    """Indices of a mask on activations, whose number is unknown: asking for it raises the error."""

    mask: torch.Tensor
    error: CaptureError

    def __new__(cls, mask: torch.Tensor, error: CaptureError) -> _Places:
        places = super().__new__(cls)
        places.mask, places.error = mask, error
        return places

    def __iter__(self) -> Any:
        raise self.error

    def __getitem__(self, key: Any) -> Any:
        raise self.error

    def __len__(self) -> int:
        return self.mask.ndim


@functools.cache
def _body(func: Any) -> Any:
    """A function of torch without its question whether a torch-function mode is on."""
    asked = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = func.__globals__ | dict.fromkeys(asked, lambda *_: False)
    body = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _is_mask(item: Any) -> bool:
    return isinstance(item, FakeTensor) and item.dtype in (torch.bool, torch.uint8)


_CASTS: dict[str, Callable[[Any], Any]] = {
    "__bool__": bool, "is_nonzero": bool, "__float__": float, "__int__": int, "__index__": int,
}  # fmt: skip
_RANGES = ("arange", "linspace", "zeros", "ones", "full", "empty")
HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("__bool__", "is_nonzero", "__int__", "__index__", "__float__", "item"), _number
    ),
    "tolist": _list,
    **dict.fromkeys(("nonzero", "argwhere", "where"), _nonzero),
    "__getitem__": _select,
    "__setitem__": _write,
    "masked_select": _masked_select,
    "equal": _equal,
    "gaussian_nll_loss": _within,
    "_assert": _assert,
    "_pack_padded_sequence": _pack,
    "_pad_packed_sequence": _pad,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    "instance_norm": _instance_norm,
    "__contains__": _contains,
    "__get__": _property,
    "detach": _detach,
    "register_hook": _hook,
    "retain_grad": _retain,
    "__set__": _set,
    "requires_grad_": _leaf,
    **dict.fromkeys(
        (*_RANGES, "tensor", "narrow", "split", "view", "reshape", "expand", "repeat", "pad",
         "new_zeros", "new_ones", "new_full", "new_empty", "interpolate"),
        _sizes,
    ),
    **dict.fromkeys(
        ("unique", "unique_consecutive", "bincount", "repeat_interleave"), _example_result
    ),
}  # fmt: skip
