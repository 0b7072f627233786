"""Precision policies: the dtypes of parameters at rest, of compute, and of gradient reductions.

As in FSDP's mixed precision, a parameter is cast to the compute dtype before it is gathered, its
gradient is reduced in the dtype of reductions, and the optimizer updates it in the dtype at rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
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
        keep: a name, or several, of modules that compute in the dtype at rest (`*` stands for any
            text), those without parameters in that of `parameters`, or float32. Batch normalization
            always keeps its own.

    Raises:
        ValueError: a dtype is not one of floating-point numbers, or `keep` is not text.
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
        given: Any = self.keep
        keep = (given,) if isinstance(given, str) else given
        if not isinstance(keep, Sequence) or not all(isinstance(name, str) for name in keep):
            raise ValueError(f"keep takes names of modules, got {given!r}")
        object.__setattr__(self, "keep", tuple(keep))

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
        names: dict[int, list[str]] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        for name, p in model.named_parameters():
            if not p.dtype.is_floating_point:
                continue
            rest = self.at_rest(p)
            tied = names[id(p)]
            kept = any(n.rpartition(".")[0] in batch_norms or self.keeps(n) for n in tied)
            compute = rest if kept or self.compute is None else _dtype(self.compute)
            sums = compute if self.reductions is None else _dtype(self.reductions)
            casts[name] = Cast(rest, compute, sums if not kept else rest)
        return casts

    def check(self, model: torch.nn.Module) -> None:
        """Refuse names in `keep` that the model does not have, and parameters that are shared by a
        module that is kept and one that is not.

        Raises:
            ValueError: with the names.
        """
        modules = [name for name, _ in model.named_modules() if name]
        unknown = [text for text in self.keep if not any(fnmatchcase(n, text) for n in modules)]
        if unknown:
            close = get_close_matches(unknown[0], modules, n=3)
            hint = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"precision: no module is called {unknown[0]!r}, as keep says{hint}")
        first: dict[int, str] = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            other = first.setdefault(id(p), name)
            if self.keeps(name) != self.keeps(other):
                pair = [name, other] if self.keeps(name) else [other, name]
                raise ValueError(
                    f"precision: keep has the module of {pair[0]}, which is the same parameter as "
                    f"{pair[1]}; keep both modules, or neither"
                )

    def kept_dtype(self, own: Iterable[torch.dtype]) -> torch.dtype:
        """The dtype in which a kept module computes.

        Args:
            own: of its floating-point parameters at rest.
        """
        return next(iter(own), _dtype(self.parameters or "float32"))

    def keeps(self, name: str) -> bool:
        """Whether `keep` names a module, or one that contains the module or parameter."""
        parts = name.split(".") if name else []
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

    @contextmanager
    def methods(self, device_type: str) -> Iterator[None]:
        """For methods of a model other than its forward, which find parameters at rest: autocast to
        the dtype of compute, unless there is an autocast already or none to that dtype."""
        short = self.compute in ("bfloat16", "float16")
        if not short or torch.is_autocast_enabled(device_type):
            yield
            return
        with torch.autocast(device_type, _dtype(self.compute)):
            yield

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        texts = [f"{name} {value}" for name, value in values if isinstance(value, str)]
        if not self.cast_inputs:
            texts.append("inputs as they are")
        return ", ".join([*texts, *(f"kept: {name}" for name in self.keep)])


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


def enabled_autocasts() -> tuple[tuple[str, torch.dtype], ...]:
    """Device types that an autocast is on for, each with its dtype."""
    return tuple(
        (kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    )


@contextmanager
def under_autocasts(autocasts: Iterable[tuple[str, torch.dtype]]) -> Iterator[None]:
    """Autocasts as `enabled_autocasts` gave them."""
    with ExitStack() as stack:
        for kind, dtype in autocasts:
            stack.enter_context(torch.autocast(kind, dtype))
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Graphs hold the casts of the autocast that they were captured under. What traces or runs them
    does so without one, or regions that leave the autocast would be cast."""
    with ExitStack() as stack:
        for kind, _ in enabled_autocasts():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


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
