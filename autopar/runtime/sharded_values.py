"""DTensors as the engine hands them out: where a plain DTensor would lose what the caller does to
it, they carry it out or refuse.

`DTensor.__new__` from a local tensor and a spec, and `_spec`, are private to torch; tested with
2.11 and 2.13.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.comm.dtensor_rules import by_dtensor
from autopar.errors import EngineError


class _Counter:
    def __init__(self) -> None:
        self.events = 0


# how often any parameter was told to require gradients or not to
freezing = _Counter()
# calls of engines and steps of optimizers, which change parameters, gradients and state
training = _Counter()


class _Handed(DTensor):
    """A DTensor of a class of its own."""

    @classmethod
    def of(cls, local: torch.Tensor, spec: Any) -> Any:
        """A DTensor over a local tensor."""
        # the wrapper takes over the offset, and one that has one cannot be copied
        shell = local.new_empty(0) if local.storage_offset() else local
        x = DTensor.__new__(cls, shell, spec, requires_grad=False)
        x._local_tensor = local
        return x

    @classmethod
    def of_dtensor(cls, x: DTensor) -> Any:
        """The same tensor, of this class."""
        return cls.of(x._local_tensor, x._spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = type(self).of(self._local_tensor.detach().clone(), self._spec)
        return twin


class _Editable(_Handed):
    """A DTensor whose values may be replaced and whose parts may be changed, on all ranks alike."""

    def __getitem__(self, index: Any) -> Any:
        if torch.is_grad_enabled() and self.requires_grad:
            return super().__getitem__(index)
        whole = self.full_tensor()
        return _Part.of(whole[_whole(index)], whole, self)

    def __setitem__(self, index: Any, value: Any) -> None:
        whole = self.full_tensor()
        whole[_whole(index)] = _whole(value)
        self.copy_(whole)

    @property
    def data(self) -> Any:
        return type(self).of(self._local_tensor.detach(), self._spec)

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise EngineError(
                f"a sharded tensor of shape {list(self.shape)} and {self.dtype} cannot take data "
                f"of shape {list(value.shape)} and {value.dtype}; convert the model before "
                "auto_engine"
            )
        # another memory, so that what was taken from `data` before keeps its values
        twin = type(self).of(torch.empty_like(self._local_tensor), self._spec)
        twin.copy_(value)
        self._local_tensor = twin._local_tensor

    def lay_out(self, value: DTensor) -> None:
        """Take over the values, the layout and the device of another DTensor of this shape."""
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._local_tensor, self._spec = value._local_tensor, value._spec


class _View(_Editable):
    """A view of all elements, over the same shards."""


def _memory(x: DTensor) -> int:
    return x._local_tensor.untyped_storage()._cdata


_VIEWS = (
    "alias", "detach", "diagonal", "expand", "permute", "reshape", "select", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view",
)  # fmt: skip


def views() -> Iterator[Any]:
    """Operators that give views."""
    for name in _VIEWS:
        packet = getattr(torch.ops.aten, name)
        yield from (getattr(packet, overload) for overload in packet.overloads())


def view(op: Any, args: Any, kwargs: Any) -> Any:
    """A view of a parameter, gradient or state that writes through to its shards."""
    x = args[0]
    with_gradient = torch.is_grad_enabled() and op is not torch.ops.aten.detach.default
    if not isinstance(x, _Editable) or (with_gradient and x.requires_grad):
        return by_dtensor(op, args, kwargs)
    try:
        out = by_dtensor(op, args, kwargs)
        if isinstance(out, DTensor) and _memory(out) == _memory(x):
            return _View.of_dtensor(out)
    except RuntimeError:  # it has no rule, or none for this layout
        pass
    whole = x.full_tensor()
    parts = op(whole, *args[1:], **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda part: _Part.of(part, whole, x), parts)


class ShardedGradient(_Editable):
    """A gradient."""


class ShardedState(_Editable):
    """An entry of an optimizer's state."""


_GRAD: Any = torch.Tensor.grad


def _gradient(p: Any) -> torch.Tensor | None:
    """What autograd computed outside of programs becomes a `ShardedGradient` too."""
    grad: torch.Tensor | None = _GRAD.__get__(p)
    if type(grad) is DTensor:
        grad = ShardedGradient.of_dtensor(grad)
        _GRAD.__set__(p, grad)
    return grad


_REQUIRES_GRAD: Any = torch.Tensor.requires_grad


def _set_requires_grad(p: Any, value: bool) -> None:
    freezing.events += 1
    _REQUIRES_GRAD.__set__(p, value)


class ShardedParameter(_Editable):
    """A parameter of an engine."""

    @classmethod
    def of_values(cls, x: DTensor, requires_grad: bool) -> Any:
        """A parameter over a DTensor's shard."""
        p = cls.of_dtensor(x)
        p._is_param = True  # an nn.Parameter, as isinstance and modules see it
        return p.requires_grad_(requires_grad)

    grad: Any = property(_gradient, _GRAD.__set__, lambda p: _GRAD.__set__(p, None))
    requires_grad: Any = property(_REQUIRES_GRAD.__get__, _set_requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin.grad = copy.deepcopy(self.grad, memo)
        return twin.requires_grad_(self.requires_grad)


def _whole(value: Any) -> Any:
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, value)


_WRITING = {"__setitem__", "__set__"} | {
    f"__i{name}__" for name in "add and floordiv mod mul or pow sub truediv xor".split()
}


class _Part(torch.Tensor):
    """A view of a gathered tensor. It is gathered again if the shards were written since, and what
    is written to it is written to the shards as well."""

    _gathered: torch.Tensor
    _sharded: _Editable

    @classmethod
    def of(cls, x: torch.Tensor, gathered: torch.Tensor, sharded: _Editable) -> Any:
        if x.untyped_storage()._cdata != gathered.untyped_storage()._cdata:
            return x  # indexed by tensors: a copy in eager PyTorch too
        part = x.as_subclass(cls)
        part._gathered, part._sharded = gathered, sharded
        if not hasattr(gathered, "_gathered_at"):
            gathered._gathered_at = training.events  # type: ignore[attr-defined]
        return part

    @torch.no_grad()
    def _refresh(self, to_write: bool) -> None:
        """Gather again before a write, and before a read if a step came between. (One rank alone
        may read what has been gathered.)"""
        gathered: Any = self._gathered
        if to_write or gathered._gathered_at != training.events:
            gathered.copy_(self._sharded.full_tensor())
            gathered._gathered_at = training.events

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = name in _WRITING or (name.endswith("_") and not name.endswith("__"))
        written = cls._among(args[0] if in_place else kwargs.get("out"))
        parts = cls._among((args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            for part in parts:
                part._refresh(bool(written))
        args, kwargs = pytree.tree_map_only(
            cls, lambda x: x.as_subclass(torch.Tensor), (args, kwargs)
        )
        out = func(*args, **kwargs)
        for part in written:
            part._sharded.copy_(part._gathered)
        first = parts[0]
        return cls.of(out, first._gathered, first._sharded) if type(out) is torch.Tensor else out

    @classmethod
    def _among(cls, values: Any) -> list[_Part]:
        """Parts in nested values, one of each gathered tensor."""
        parts = (x for x in pytree.tree_leaves(values) if isinstance(x, cls))
        return list({id(x._gathered): x for x in parts}.values())


# What a deferred result answers without its values.
_DESCRIPTIONS = frozenset(
    getattr(torch.Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf")
) | {
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.numel,
    torch.Tensor.is_floating_point,
    torch.Tensor.is_inference,
}


class DeferredResult(torch.Tensor):
    """A result of the program that is gathered where it is first read, on all ranks alike.

    Any function of torch finds the whole tensor, with its gradient.
    """

    _gather: Callable[[], torch.Tensor]
    _gathered: torch.Tensor | None

    @staticmethod
    def of(local: DTensor, gather: Callable[[], torch.Tensor]) -> DeferredResult:
        """A result of a DTensor's shape, dtype and device.

        Args:
            gather: gives the whole tensor.
        """
        result: DeferredResult = torch.Tensor._make_wrapper_subclass(
            DeferredResult, local.shape, dtype=local.dtype, device=local.device,
            requires_grad=local.requires_grad,
        )  # fmt: skip
        result._gather, result._gathered = gather, None
        return result

    @property
    def _version(self) -> int:  # type: ignore[override]
        return 0 if self._gathered is None else self._gathered._version

    def whole(self) -> torch.Tensor:
        """The whole tensor, on every rank."""
        if self._gathered is None:
            self._gathered = self._gather()
        return self._gathered

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


class SavedShard(_Editable):
    """An entry of a state dict. Pickled, it would be one rank's shard under the whole's name."""

    def _refuse(self) -> EngineError:
        return EngineError(
            f"this is a shard of a tensor of shape {list(self.shape)}, and saving it would lose "
            "the other ranks' parts: save with torch.distributed.checkpoint, or get whole tensors "
            "on all ranks with torch.distributed.checkpoint.state_dict.get_model_state_dict("
            "engine, options=StateDictOptions(full_state_dict=True))"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._refuse()

    def untyped_storage(self) -> Any:
        raise self._refuse()
