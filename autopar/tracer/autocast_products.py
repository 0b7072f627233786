"""Einsums and tensor dots under autocast, whose operands autocast casts inside of them.

Both stay one operator in a graph, and autocast has rules for the products inside alone. So operands
are cast where torch would cast them: before a product, and not where nothing is summed.

    torch.einsum("bd,edh->ebh", x, w)     a product: x and w in the dtype of autocast
    torch.einsum("i,j->ij", x, w)         no product: x and w as they are
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from autopar.errors import CaptureError


class AutocastProducts(TorchFunctionMode):
    """Casts the operands of einsums and tensor dots in its context.

    Raises:
        CaptureError: an einsum of three operands or more; the dtypes between its products depend on
            their order.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch._C._is_any_autocast_enabled():
            return func(*args, **kwargs)
        if func is torch.tensordot:
            args = (*_cast(args[:2]), *args[2:])
        elif func is torch.einsum:
            equation, operands = _equation(args)
            args = (equation, *_operands(equation, operands))
        return func(*args, **kwargs)


def _equation(args: Sequence[Any]) -> tuple[str, Sequence[torch.Tensor]]:
    """The equation and the operands, of any of the forms that einsum takes: an equation, operands
    or a list of them; or each operand with a list of the numbers of its dims, and the result's."""
    if isinstance(args[0], str):
        return args[0], args[1] if isinstance(args[1], list | tuple) else args[1:]
    count = len(args) // 2
    inputs = ",".join(map(_letters, args[1 : 2 * count : 2]))
    output = f"->{_letters(args[-1])}" if len(args) % 2 else ""
    return inputs + output, args[: 2 * count : 2]


def _letters(dims: Sequence[Any]) -> str:
    """In the order of torch's, which decides that of a result whose dims are not given."""
    letters = string.ascii_uppercase + string.ascii_lowercase
    return "".join("..." if d is Ellipsis else letters[d] for d in dims)


def _operands(equation: str, operands: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    cast = _cast(operands)
    if all(x is y for x, y in zip(cast, operands, strict=True)) or len(operands) < 2:
        return operands
    if len(operands) > 2:
        raise CaptureError(
            f"einsum of {len(operands)} operands ({equation!r}) under autocast: the dtypes between "
            "its products depend on their order; write it as einsums of two operands each"
        )
    return cast if _sums(equation, operands) else operands


def _sums(equation: str, operands: Sequence[torch.Tensor]) -> bool:
    """Whether something is summed over a dim of both operands."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    labels = inputs.split(",")
    counts = Counter(inputs)
    kept = set(output) if arrow else {label for label in counts if counts[label] == 1}
    sizes = [_sizes(of, x) for of, x in zip(labels, operands, strict=True)]
    both = (set(labels[0]) & set(labels[1])) - kept - {"."}
    return any(all(size[label] != 1 for size in sizes) for label in both)


def _sizes(labels: str, x: torch.Tensor) -> dict[str, int]:
    """Sizes of the dims of an operand that have a label."""
    before, _, after = labels.partition("...")
    dims = [*range(len(before)), *range(x.ndim - len(after), x.ndim)]
    return {label: x.shape[d] for label, d in zip(before + after, dims, strict=True)}


def _cast(operands: Sequence[Any]) -> list[Any]:
    """In the dtype of autocast, where that is on for their device."""
    return [
        x.to(torch.get_autocast_dtype(x.device.type))
        if isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and x.dtype is not torch.float64
        and torch.is_autocast_enabled(x.device.type)
        else x
        for x in operands
    ]
