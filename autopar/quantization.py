"""`quantize`: linear layers with weights of 8 bits.

A row of a weight (an output feature) has one scale, the largest absolute value over 127, so that
rounding moves a weight by at most half a scale (symmetric quantization per channel; Jacob et al.
2018, section 2, without zero points). "int8-dynamic" rounds the inputs likewise, per token and as
they come, and multiplies integers.

torchao keeps such weights in a tensor subclass. A plan needs them as what they are, parameters that
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
from autopar.operators.int8_linear import int8_linear, int8_mm
from autopar.runtime.deferred_parameters import has_no_values
from autopar.runtime.engine import Engine
from autopar.runtime.sharded_values import ShardedParameter

_LARGEST = 127
SCHEMES = ("int8", "int8-dynamic")


class Int8Linear(nn.Module):
    """A linear layer with a weight of 8 bits.

    Args:
        weight: [out_features, in_features], int8.
        scale: [out_features], of the dtype of the layer it takes the place of.
        bias: [out_features], or None.
        dynamic: inputs are rounded to 8 bits, too, with one scale per row.
    """

    def __init__(
        self, weight: nn.Parameter, scale: nn.Parameter, bias: nn.Parameter | None, dynamic: bool
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale, self.dynamic = weight, scale, dynamic
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: [*b, in_features]

        Returns:
            [*b, out_features]
        """
        scale = self.scale.to(x.dtype)
        if self.dynamic:
            largest = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
            rows = largest / _LARGEST
            rounded = (x / rows).round().clamp(-_LARGEST, _LARGEST).to(torch.int8)
            out = int8_mm(rounded, self.weight).to(x.dtype) * rows * scale
        else:
            out = int8_linear(x, self.weight, scale)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        kind = "int8-dynamic" if self.dynamic else "int8"
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}"


def quantize(model: nn.Module, scheme: str = "int8", *, skip: Collection[str] = ()) -> nn.Module:
    """Round the weights of a model's linear layers to 8 bits, in place.

    Layers that share their weight with another module (a head that is tied to an embedding) stay as
    they are: the other one needs the values.

    Args:
        model: a module, or an engine, whose ranks round their shards. All ranks call it.
        scheme: "int8" rounds weights, "int8-dynamic" inputs, too.
        skip: names of layers that stay, with wildcards ("lm_head", "*.gate").

    Returns:
        the model.

    Raises:
        ValueError: the scheme is unknown, a name in `skip` is none of a linear layer, or there is
            no linear layer.
        RuntimeError: a weight has no values yet.
    """
    if scheme not in SCHEMES:
        more = "; int4 and fp8 are torchao's (pip install torchao), whose layers no plan can split"
        raise ValueError(f"scheme must be one of {SCHEMES}, got {scheme!r}{more}")
    layers = dict(_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    unused = [name for name in skip if not any(fnmatch(layer, name) for layer in layers)]
    if unused:
        raise ValueError(f"skip= names {unused}, and linear layers are {sorted(layers)[:8]}, ...")
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    for name, layer in layers.items():
        weight: Any = layer.weight
        if uses[id(weight)] > 1 or any(fnmatch(name, pattern) for pattern in skip):
            continue
        if has_no_values(weight):
            raise RuntimeError(
                f"{name}.weight has no values to round yet; call quantize after they are read: of "
                "the engine, after its first batch or with example_inputs="
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _rounded(layer, scheme == "int8-dynamic"))
    if isinstance(model, Engine):
        model._autopar_runner.forget_programs()
    return model


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        if name and (type(module) is nn.Linear or transposed):
            yield name, module


@torch.no_grad()
def _rounded(layer: Any, dynamic: bool) -> Int8Linear:
    """A layer with the weight of another one, rounded."""
    weight = layer.weight
    if isinstance(weight, DTensor) and any(isinstance(p, Owned) for p in weight.placements):
        raise ValueError("layers of pipeline stages are not quantized; do so before auto_engine")
    if type(layer) is not nn.Linear:  # transformers' Conv1D has [in_features, out_features]
        weight = weight.t()
    local: Any = weight.to_local() if isinstance(weight, DTensor) else weight.detach()
    largest = local.abs().amax(1)
    if isinstance(weight, DTensor):
        largest = _over_shards(largest, weight)
    scale = (largest / _LARGEST).clamp_min(torch.finfo(local.dtype).tiny)
    rounded = (local / scale[:, None]).round_().to(torch.int8).contiguous()
    new = [_parameter(rounded, weight), _parameter(scale, weight)]
    if getattr(layer.weight, "_handles", ()) is None:  # laid out by a plan
        for p in new:
            p._handles = None
    return Int8Linear(new[0], new[1], layer.bias, dynamic)


def _over_shards(largest: torch.Tensor, weight: DTensor) -> torch.Tensor:
    """The largest values of rows of which ranks have parts."""
    for axis, placement in enumerate(weight.placements):
        if placement.is_shard(1):
            group = weight.device_mesh.get_group(axis)
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
    return largest


def _parameter(local: torch.Tensor, like: Any) -> Any:
    """A parameter of this rank's values, split as the rows of another one."""
    if not isinstance(like, DTensor):
        return nn.Parameter(local, requires_grad=False)
    shape = torch.Size((like.shape[0], *like.shape[1 : local.ndim]))
    placements = [p if p.is_shard(0) or local.ndim == 2 else Replicate() for p in like.placements]
    values = DTensor.from_local(
        local, like.device_mesh, placements, run_check=False,
        shape=shape, stride=torch.empty(shape, device="meta").stride(),
    )  # fmt: skip
    return ShardedParameter.of_values(values, requires_grad=False)
