"""Parameters of an engine before they have values: from `auto_engine` until a plan says which part
of them each rank holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from autopar.errors import EngineError
from autopar.runtime.deferred_tensors import Deferred, DeferredTensor
from autopar.runtime.sharded_values import ShardedParameter


class DeferredParameter(ShardedParameter):
    """A parameter without values. `lay_out` makes it a `ShardedParameter`; until then it refuses
    all that reads or writes values, which would be lost."""

    _autopar_name: str

    @classmethod
    def of(cls, local: torch.Tensor, spec: Any) -> Any:
        # a wrapper on the meta device could not move to the mesh's later
        x = DTensor.__new__(
            cls, torch.empty(0, dtype=local.dtype, device=spec.mesh.device_type), spec,
            requires_grad=False,
        )  # fmt: skip
        x._local_tensor = local
        return x

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        raise next(x for x in leaves if isinstance(x, cls))._refuse(func)

    def _refuse(self, what: Any) -> EngineError:
        return EngineError(
            f"parameter {self._autopar_name} has no values before the first batch, and {what} "
            "needs them; pass example_inputs= to auto_engine, which plans and computes values at "
            "once, or move this after the first batch"
        )

    def full_tensor(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("full_tensor")

    def to_local(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("to_local")

    def redistribute(self, *args: Any, **kwargs: Any) -> Any:
        raise self._refuse("redistribute")

    @property
    def data(self) -> Any:
        raise self._refuse(".data")

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise self._refuse(".data")

    def __getitem__(self, index: Any) -> Any:
        raise self._refuse("indexing")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._refuse("indexing")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self._refuse("a copy")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"parameter of shape {list(self.shape)} and {self.dtype} without values"

    def lay_out(self, value: DTensor) -> None:
        super().lay_out(value)
        self.__dict__.pop("_deferred", None)
        del self._autopar_name
        self.__class__ = ShardedParameter  # type: ignore[assignment]


def has_no_values(p: torch.Tensor) -> bool:
    """Whether a parameter or buffer is deferred, or on the meta device."""
    return isinstance(p, DeferredTensor | DeferredParameter) or p.is_meta


def record_of(p: torch.Tensor) -> Deferred | None:
    """How the values of a parameter that has none are computed, if that is known."""
    return p.__dict__.get("_deferred") if has_no_values(p) else None


def refuse_without_values(model: torch.nn.Module) -> None:
    """Refuse parameters without values in a model that is laid out already.

    Raises:
        EngineError: naming the first.
    """
    for name, p in model.named_parameters():
        if not isinstance(p, UninitializedParameter) and has_no_values(p):
            raise EngineError(
                f"parameter {name} came into the model after its first batch and has no values; "
                "build modules that replace others outside of deferred_init and on the CPU"
            )


def deferred_parameter(p: torch.Tensor, mesh: DeviceMesh, name: str) -> DeferredParameter:
    """The DTensor in the place of a parameter without values, replicated."""
    local = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
    values = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    new: DeferredParameter = DeferredParameter.of_values(values, p.requires_grad)
    new._autopar_name = name
    return new
