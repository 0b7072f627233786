"""`quantize`: linear layers with weights of 8 or 4 bits.

A row of a weight (an output feature) has one scale, the largest absolute value over the largest
number of 8 bits, so that rounding to integers moves a weight by at most half a scale (symmetric
quantization per channel; Jacob et al. 2018, section 2, without zero points). "int8-dynamic" rounds
the inputs likewise, per token and as they come, and multiplies integers. "float8" has the numbers
of `float8_e4m3fn` (Micikevicius et al. 2022). "int4" has a scale for each group of 32 weights of a
row, which lets the largest of a group be -8 of the levels -8 to 7 (ggml's Q4_0).

torchao keeps such weights in tensor subclasses. A plan needs them as what they are, parameters that
have layouts and operators that have rules; so they are plain tensors of a module here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from autopar.comm.owned_shards import Owned
from autopar.operators.quantized_linear import (
    GROUP,
    float8_linear,
    int4_linear,
    int4_packed,
    int8_linear,
    int8_mm,
)
from autopar.runtime.deferred_parameters import has_no_values
from autopar.runtime.engine import Engine
from autopar.runtime.sharded_values import ShardedParameter

_LARGEST_INT8, _LARGEST_FLOAT8 = 127, torch.finfo(torch.float8_e4m3fn).max
_LOWEST_INT4, _LEVELS_INT4 = -8, 16
SCHEMES = ("int8", "int8-dynamic", "float8", "int4")


class QuantizedLinear(nn.Module):
    """A linear layer with a weight of 8 or 4 bits.

    Args:
        weight: [out_features, in_features], int8, or for float8 its bytes as uint8; for int4
            [out_features, groups, bytes of a group], uint8.
        scale: [out_features], for int4 [out_features, groups], of the dtype of the layer it takes
            the place of; float32 in that of float16, whose range is too short for scales.
        bias: [out_features], or None.
        scheme: one of `SCHEMES`.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None, scheme: str
    ) -> None:
        super().__init__()
        self.out_features = weight.shape[0]
        self.in_features = weight.shape[1] * (GROUP if scheme == "int4" else 1)
        self.weight, self.scale, self.scheme = weight, scale, scheme
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [*b, in_features]

        Returns:
            [*b, out_features]
        """
        scale = self.scale.to(_dtype_of_scales(x.dtype))
        if self.scheme == "int8-dynamic":
            out = self._with_rounded_inputs(x.detach(), scale)
            if torch.is_grad_enabled() and x.requires_grad:
                # the rounding has no slope: the gradient is that of inputs as they are
                through = int8_linear(x, self.weight, scale)
                out = through + (out - through).detach()
        elif self.scheme == "int8":
            out = int8_linear(x, self.weight, scale)
        elif self.scheme == "float8":
            out = float8_linear(x, self.weight, scale)
        else:
            out = int4_linear(x.unflatten(-1, (-1, GROUP)), self.weight, scale)
        return out if self.bias is None else out + self.bias

    def _with_rounded_inputs(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        wide = x.to(scale.dtype)
        largest = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
        rows = largest / _LARGEST_INT8
        rounded = (wide / rows).round().clamp(-_LARGEST_INT8, _LARGEST_INT8).to(torch.int8)
        out: torch.Tensor = int8_mm(rounded, self.weight).to(wide.dtype) * rows * scale
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def _dtype_of_scales(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def check_scheme(scheme: str) -> None:
    """
    Raises:
        ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}")


def quantize(model: nn.Module, scheme: str = "int8", *, skip: Collection[str] = ()) -> nn.Module:
    """Round the weights of a model's linear layers to 8 or 4 bits, in place.

    Layers that share their weight with another module (a head that is tied to an embedding) stay as
    they are: the other one needs the values.

    Args:
        model: a module, or an engine, whose ranks round their shards. All ranks call it.
        scheme: "int8", "float8" and "int4" round weights, "int8-dynamic" inputs, too.
        skip: names of layers that stay, with wildcards ("lm_head", "*.gate").

    Returns:
        the model.

    Raises:
        ValueError: the scheme is unknown, a name in `skip` is none of a linear layer, no linear
            layer is left, or the groups of "int4" do not divide a layer.
        RuntimeError: a weight has no values yet.
    """
    check_scheme(scheme)
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(_nothing_to_quantize(model))
    unused = [name for name in skip if not any(fnmatch(layer, name) for layer in layers)]
    if unused:
        raise ValueError(f"skip= names {unused}, and linear layers are {sorted(layers)[:8]}, ...")
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    chosen = {
        name: layer
        for name, layer in layers.items()
        if uses[id(layer.weight)] == 1 and not any(fnmatch(name, pattern) for pattern in skip)
    }
    if not chosen:
        raise ValueError(
            f"{type(model).__name__}: all linear layers share their weights with other modules, or "
            "are named in skip="
        )
    if scheme == "int4":
        for name, layer in chosen.items():
            _refuse_parts_of_groups(name, layer)
    for name, layer in chosen.items():
        weight: Any = layer.weight
        # `autopar plan` builds models on the meta device, for their shapes
        planned = weight.is_meta and torch.get_default_device().type == "meta"
        if has_no_values(weight) and not planned:
            raise RuntimeError(
                f"{name}.weight has no values to round yet; call quantize after they are read: of "
                "the engine, after its first batch or with example_inputs="
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _rounded(layer, scheme))
    if isinstance(model, Engine):
        model._autopar_runner.forget_programs()
    return model


def _nothing_to_quantize(model: nn.Module) -> str:
    name = type(model).__name__
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return f"{name} is quantized already"
    if type(model) is nn.Linear:
        return "layers are replaced in the module that has them: give nn.Sequential(layer)"
    return f"{name} has no linear layer to quantize"


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if name and (type(module) is nn.Linear or transposed):
            yield name, module


def _weight_of(layer: Any) -> Any:
    """[out_features, in_features]"""
    # transformers' Conv1D has the transpose
    return layer.weight if type(layer) is nn.Linear else layer.weight.t()


def _refuse_parts_of_groups(name: str, layer: Any) -> None:
    """
    Raises:
        ValueError: the groups of int4 do not divide the inputs of a layer, or a rank's part.
    """
    weight, ranks = _weight_of(layer), 1
    if isinstance(weight, DTensor):
        for axis, placement in enumerate(weight.placements):
            ranks *= weight.device_mesh.size(axis) if placement.is_shard(1) else 1
    if weight.shape[1] % (ranks * GROUP) == 0:
        return
    split = f", split over {ranks} ranks," if ranks > 1 else ""
    remedy = "quantize before auto_engine, or name" if ranks > 1 else "name"
    raise ValueError(
        f"{name} has {weight.shape[1]} inputs{split} and int4 rounds groups of {GROUP} of them; "
        f"{remedy} the layer in skip="
    )


@torch.no_grad()
def _rounded(layer: Any, scheme: str) -> QuantizedLinear:
    """A layer with the weight of another one, rounded."""
    weight = _weight_of(layer)
    if isinstance(weight, DTensor) and any(isinstance(p, Owned) for p in weight.placements):
        raise ValueError("layers of pipeline stages are not quantized; do so before auto_engine")
    local: Any = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    local = local.to(_dtype_of_scales(local.dtype))
    tiny = torch.finfo(local.dtype).tiny
    columns: tuple[tuple[int, ...], tuple[int, ...]] = (weight.shape[1],), ()
    if scheme == "int4":
        groups = local.unflatten(1, (-1, GROUP))
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = extreme / _LOWEST_INT4
        scale = scale.where(scale.abs() >= tiny, tiny)
        levels = (groups / scale[..., None]).round_() - _LOWEST_INT4
        rounded = int4_packed(levels.clamp_(0, _LEVELS_INT4 - 1).to(torch.uint8))
        columns = (weight.shape[1] // GROUP, GROUP // 2), (weight.shape[1] // GROUP,)
    else:
        largest = local.abs().amax(1)
        if isinstance(weight, DTensor):
            largest = _over_shards(largest, weight)
        most = _LARGEST_FLOAT8 if scheme == "float8" else _LARGEST_INT8
        scale = (largest / most).clamp_min(tiny)
        values = local / scale[:, None]
        if scheme == "float8":
            rounded = values.clamp_(-most, most).to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            rounded = values.round_().to(torch.int8)
    new = [
        _parameter(x.contiguous(), weight, rest)
        for x, rest in zip((rounded, scale), columns, strict=True)
    ]
    if getattr(layer.weight, "_handles", ()) is None:  # laid out by a plan
        for p in new:
            p._handles = None
    return QuantizedLinear(new[0], new[1], layer.bias, scheme)


def _over_shards(largest: torch.Tensor, weight: DTensor) -> torch.Tensor:
    """The largest values of rows of which ranks have parts."""
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard(1):
            group = weight.device_mesh.get_group(axis)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return largest


def _parameter(local: torch.Tensor, like: Any, columns: tuple[int, ...]) -> Any:
    """A parameter of this rank's values, split as the rows, and as the columns if it has any, of
    another one.

    Args:
        columns: all dims but the first, over all ranks.
    """
    if not isinstance(like, DTensor):
        return nn.Parameter(local, requires_grad=False)
    shape = torch.Size((like.shape[0], *columns))
    placements = [p if p.is_shard(0) or columns else Replicate() for p in like.placements]
    values = DTensor.from_local(
        local, like.device_mesh, placements, run_check=False,
        shape=shape, stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip
    return ShardedParameter.of_values(values, requires_grad=False)
