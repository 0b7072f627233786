"""Precision policies: the dtypes of parameters at rest, of compute, and of gradient reductions.

As in FSDP's mixed precision, a parameter is cast to the compute dtype before it is gathered, its
gradient is reduced in the dtype of reductions, and the optimizer updates it in the dtype at rest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Precision:
    """Dtypes of a training step, each a name such as "bfloat16" or "bf16", or a `torch.dtype`.

    Args:
        compute: of parameters and inputs as the model sees them, and of the gathers of parameters;
            None leaves them as they are.
        parameters: of parameters at rest and of the optimizer's state ("master weights"); None
            leaves parameters as the model has them.
        reductions: of the sums of gradients over ranks; None for that of compute.
        outputs: of floating-point results; None leaves them as computed.
        cast_inputs: whether floating-point inputs are cast to `compute`.
        keep: names of modules (`*` stands for any text) that compute in the dtype in which their
            parameters are at rest; or of parameters. Batch normalization always keeps its own.

    Raises:
        ValueError: a dtype is not one of floating-point numbers.
    """

    compute: str | None = "bfloat16"
    parameters: str | None = "float32"
    reductions: str | None = "float32"
    outputs: str | None = None
    cast_inputs: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("compute", "parameters", "reductions", "outputs"):
            object.__setattr__(self, name, _dtype_name(name, getattr(self, name)))
        object.__setattr__(self, "keep", tuple(self.keep))

    @staticmethod
    def of(precision: Precision | str | torch.dtype | None) -> Precision | None:
        """A policy from its short form: "bf16" is `Precision("bfloat16")`, and so on.

        Raises:
            ValueError: the dtype is unknown.
        """
        if precision is None or isinstance(precision, Precision):
            return precision
        if _dtype_name("precision", precision) == "float64":
            return Precision("float64", "float64", "float64")
        return Precision(precision)  # type: ignore[arg-type]

    def at_rest(self, x: torch.Tensor) -> torch.dtype:
        """The dtype of a parameter at rest."""
        changes = self.parameters is not None and x.dtype.is_floating_point
        return _dtype(self.parameters) if changes else x.dtype

    def casts(self, model: torch.nn.Module) -> dict[str, Cast]:
        """How parameters are cast, by name."""
        batch_norms = {n for n, module in model.named_modules() if isinstance(module, _BatchNorm)}
        casts = {}
        for name, p in model.named_parameters():
            if not p.dtype.is_floating_point:
                continue
            rest = self.at_rest(p)
            kept = name.rpartition(".")[0] in batch_norms or self.keeps(name)
            compute = rest if kept or self.compute is None else _dtype(self.compute)
            sums = compute if self.reductions is None else _dtype(self.reductions)
            casts[name] = Cast(rest, compute, sums if not kept else rest)
        return casts

    def keeps(self, name: str) -> bool:
        """Whether `keep` names a module or parameter, or a module that contains it."""
        parts = name.split(".")
        prefixes = (".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return any(fnmatchcase(prefix, text) for prefix in prefixes for text in self.keep)

    def input_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The dtype in which the model sees an input."""
        changes = self.cast_inputs and self.compute is not None and x.dtype.is_floating_point
        return _dtype(self.compute) if changes else x.dtype

    def output(self, x: Any) -> Any:
        """A result of the model, in the dtype of results."""
        if self.outputs is None or not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.to(_dtype(self.outputs))

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ", ".join(f"{name} {value}" for name, value in values if isinstance(value, str))


@dataclass(frozen=True)
class Cast:
    """How a program takes an argument.

    Args:
        storage: dtype in which the caller holds it.
        compute: dtype in which the program computes with it.
        reductions: dtype in which its gradient is summed over ranks.
    """

    storage: torch.dtype
    compute: torch.dtype
    reductions: torch.dtype

    @property
    def is_none(self) -> bool:
        """Whether it is taken as it is."""
        return self.storage == self.compute == self.reductions


def _dtype_name(field: str, value: Any) -> str | None:
    if value is None:
        return None
    text = str(value).removeprefix("torch.")
    text = _SHORT.get(text, text)
    if text not in DTYPES:
        raise ValueError(
            f"{field} is {str(value)!r}, which is no dtype to train in; it can be "
            f"{', '.join((*_SHORT, *DTYPES))}"
        )
    return text


def _dtype(name: str | None) -> torch.dtype:
    assert name is not None
    return getattr(torch, name)
