"""DTensors as the engine hands them out: where a plain DTensor would lose what the caller does to
it, they carry it out or refuse.

`DTensor.__new__` from a local tensor and a spec, and `_spec`, are private to torch; tested with
2.11 and 2.13.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree

from autopar.comm.dtensor_rules import by_dtensor
from autopar.errors import EngineError
from autopar.runtime.gathered_part import GatheredPart
from autopar.runtime.watched_shard import WatchedShard


class _Freezing:
    """Counts how often any parameter was told to require gradients or not to."""

    def __init__(self) -> None:
        self.count = 0


freezing = _Freezing()


class _Editable(DTensor):
    """A DTensor whose values may be replaced and whose parts may be changed, on all ranks alike."""

    # Of a parameter that no plan has laid out yet, and of what was taken of it (`p.data`,
    # `p.detach()`): all of these, which take the layout with it.
    _handles: list[weakref.ref[_Editable]] | None = None

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
        return cls.of(_plain(x._local_tensor), x._spec)

    def _handle(self, x: _Editable) -> _Editable:
        """Let another tensor over the same memory be laid out with this one."""
        if self._handles is not None:
            x._handles = self._handles
            self._handles[:] = [ref for ref in self._handles if ref() is not None]
            self._handles.append(weakref.ref(x))
        return x

    def to_local(self, **options: Any) -> torch.Tensor:
        self._local_tensor = _plain(self._local_tensor)
        return super().to_local(**options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        memo[id(self)] = twin = type(self).of(self._local_tensor.detach().clone(), self._spec)
        return twin

    def __getitem__(self, index: Any) -> Any:
        if torch.is_grad_enabled() and self.requires_grad:
            return super().__getitem__(index)
        whole = self.full_tensor()
        return GatheredPart.of(whole[_whole(index)], whole, self)

    def __setitem__(self, index: Any, value: Any) -> None:
        whole = self.full_tensor()
        whole[_whole(index)] = _whole(value)
        self.copy_(whole)

    def numpy(self, *, force: bool = False) -> Any:
        """The values of the whole tensor. All ranks call this."""
        return self.full_tensor().numpy(force=force)

    @property
    def data(self) -> Any:
        return self._handle(type(self).of(self._local_tensor.detach(), self._spec))

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
        if self._handles is not None:
            self._handles = []

    def lay_out(self, value: DTensor) -> None:
        """Take over the values, the layout and the device of another DTensor of this shape."""
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self._local_tensor, self._spec = _plain(value._local_tensor), value._spec
        handles, self._handles = self._handles or (), None
        for handle in (ref() for ref in handles):
            if handle is not None:
                handle._handles = None
                handle.lay_out(value)


class _View(_Editable):
    """A view of all elements, over the same shards."""


def _plain(x: torch.Tensor) -> torch.Tensor:
    """The same memory, as a tensor that is neither watched nor a view, which would keep its base:
    `DTensor.from_local` makes one."""
    x = x.give() if isinstance(x, WatchedShard) else x
    return x.detach() if x._is_view() else x


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
    if x._handles is None or op is torch.ops.aten.detach.default:
        try:
            out = by_dtensor(op, args, kwargs)
            if isinstance(out, DTensor) and _memory(out) == _memory(x):
                return x._handle(_View.of_dtensor(out))
        except RuntimeError:  # it has no rule, or none for this layout
            pass
    whole = x.full_tensor()
    parts = op(whole, *args[1:], **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda p: GatheredPart.of(p, whole, x), parts)


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
    freezing.count += 1
    _REQUIRES_GRAD.__set__(p, value)


class ShardedParameter(_Editable):
    """A parameter of an engine."""

    @classmethod
    def of_values(cls, x: DTensor, requires_grad: bool) -> Any:
        """A parameter over a DTensor's shard."""
        p = cls.of_dtensor(x)
        p._is_param = True  # an nn.Parameter, as isinstance and modules see it
        p._handles = []
        return p.requires_grad_(requires_grad)

    grad: Any = property(_gradient, _GRAD.__set__, lambda p: _GRAD.__set__(p, None))
    requires_grad: Any = property(_REQUIRES_GRAD.__get__, _set_requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        self.requires_grad = requires_grad
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = super().__deepcopy__(memo)
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        twin._handles = None if self._handles is None else []
        twin.grad = copy.deepcopy(self.grad, memo)
        return twin.requires_grad_(self.requires_grad)


def _whole(value: Any) -> Any:
    return pytree.tree_map_only(DTensor, DTensor.full_tensor, value)


class SavedShard(_Editable):
    """An entry of a state dict. Pickled, it would be one rank's shard under the whole's name."""

    @classmethod
    def of_handle(cls, x: DTensor) -> Any:
        """Over the memory of a parameter, as an entry of a plain state dict is."""
        saved = cls.of_dtensor(x)
        return x._handle(saved) if isinstance(x, _Editable) else saved

    def _refuse(self) -> EngineError:
        return EngineError(
            f"this is a shard of a tensor of shape {list(self.shape)}, and saving it would lose "
            "the other ranks' parts: save with torch.distributed.checkpoint, or the whole tensors "
            "of engine.full_state_dict(), which all ranks must call"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._refuse()

    def untyped_storage(self) -> Any:
        raise self._refuse()
