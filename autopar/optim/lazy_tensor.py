"""`LazyTensor`: a value of a recording, in the place of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree as pytree

from autopar.comm.dtensor_rules import UnsupportedOperator
from autopar.comm.owned_shards import Owned
from autopar.optim.layout import Layout
from autopar.optim.recording import Value


class NotRecorded(Exception):
    """An operator takes what a recording cannot have."""


class CannotPlan(Exception):
    """A recording cannot run on shards; its operators run on DTensors one after another."""


class LazyTensor(torch.Tensor):
    """A value of a recording: a global shape, and elements when the recording has run.

    Attributes:
        shard: this rank's part and its layout, once it is known. The part is None on ranks that
            hold none.
        view_of: of a view the operator, its arguments and which of its results this is. After a
            recording has run, a view is taken again where it is used.
    """

    is_lazy = True
    shard: tuple[torch.Tensor | None, Layout] | None
    view_of: tuple[Any, Any, Any, int] | None
    _segment: int
    _number: int
    _mesh: DeviceMesh

    @staticmethod
    def of(value: Value, mesh: DeviceMesh, segment: int, number: int) -> LazyTensor:
        x: LazyTensor = torch.Tensor._make_wrapper_subclass(
            LazyTensor, value.shape, strides=value.stride, dtype=value.dtype, device=value.device
        )
        x.shard, x.view_of, x._mesh, x._segment, x._number = None, None, mesh, segment, number
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Outside of a recording it is the DTensor that it became."""
        args, kwargs = pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, (args, kwargs or {}))
        return op(*args, **kwargs)

    def as_dtensor(self) -> Any:
        """The same value over the same memory."""
        if self.view_of is not None:
            op, args, kwargs, index = self.view_of
            with torch.no_grad():
                made = op(*pytree.tree_map_only(LazyTensor, LazyTensor.as_dtensor, args), **kwargs)
            return made if isinstance(made, torch.Tensor) else made[index]
        assert self.shard is not None, "its recording has run"
        local, layout = self.shard
        placements: list[Any] = layout.spec.to_placements(self._mesh.ndim)
        for axis, at in layout.owner:
            placements[axis] = Owned(0, at)
        if local is None:
            local = torch.empty((0, *self.shape[1:]), dtype=self.dtype, device=self.device)
        return DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=self.shape, stride=self.stride()
        )

    def value(self) -> Any:
        """The same value, to be read: a view that shards do not have is one of the whole value."""
        try:
            return self.as_dtensor()
        except UnsupportedOperator:
            assert self.view_of is not None, "a value itself lies in a shard"
        op, args, kwargs, index = self.view_of
        with torch.no_grad():
            made = op(
                *pytree.tree_map_only(LazyTensor, lambda x: x.value().full_tensor(), args), **kwargs
            )
        part = made if isinstance(made, torch.Tensor) else made[index]
        placements = [Replicate()] * self._mesh.ndim
        return DTensor.from_local(part, self._mesh, placements, run_check=False)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor({list(self.shape)}, {self.dtype}, shard={self.shard})"
