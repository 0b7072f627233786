"""Samplers as rows of a table: the op, the shape of its operand, and a choice per argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autopar.testing.rules.draw import Arguments, Draw, sampler

# Draws one argument, for the shape that the call's operands have.
Argument = Callable[[Draw, list[int]], Any]


class Several(tuple[Any, ...]):
    """Values of several arguments."""


def calls(
    names: str,
    shape: tuple[int, int] | Callable[[Draw], list[int]],
    *arguments: Any,
    fixed: Sequence[str] = (),
    **keywords: Any,
) -> None:
    """Registers a sampler of the named ATen ops.

    Args:
        shape: least and greatest number of dims, or a function that draws the shape.
        arguments, keywords: an `Argument` each, or a value as it is.
        fixed: as in `Sample`.
    """

    def draw_call(draw: Draw) -> Arguments:
        sizes = shape(draw) if callable(shape) else draw.shape(*shape)

        def value(argument: Any) -> Any:
            return argument(draw, sizes) if callable(argument) else argument

        values: list[Any] = []
        for argument in map(value, arguments):
            values += argument if isinstance(argument, Several) else [argument]
        return tuple(values), {name: value(keyword) for name, keyword in keywords.items()}

    sampler(*(f"aten.{name}" for name in names.split()), fixed=fixed)(draw_call)


# -- shapes -------------------------------------------------------------------------------------


def with_ones(low: int, high: int) -> Callable[[Draw], list[int]]:
    """Shapes with many dims of one element."""
    return lambda draw: [1 if draw.chance(40) else n for n in draw.shape(low, high)]


def with_two(low: int, high: int) -> Callable[[Draw], list[int]]:
    """Shapes whose dims have two elements or more."""
    return lambda draw: [n + 1 for n in draw.shape(low, high)]


# -- arguments ----------------------------------------------------------------------------------

any_kind, distinct, booleans, uniform = (
    Draw.any_kind, Draw.permutation, Draw.booleans, Draw.uniform,
)  # fmt: skip


def normal(draw: Draw, shape: list[int]) -> torch.Tensor:
    return draw.normal(*shape)


def scalar(draw: Draw, shape: list[int]) -> torch.Tensor:
    return draw.normal()


def matching(draw: Draw, shape: list[int]) -> list[int]:
    """The shape itself."""
    return shape


def size(draw: Draw, shape: list[int]) -> int:
    return draw.size()


def dim(draw: Draw, shape: list[int]) -> int:
    return draw.dim(max(len(shape), 1))


def new_dim(draw: Draw, shape: list[int]) -> int:
    """A dim of a result that has one more."""
    return draw.dim(len(shape) + 1)


def dims(draw: Draw, shape: list[int]) -> list[int]:
    return draw.dims(len(shape))


def flag(draw: Draw, shape: list[int]) -> bool:
    return draw.chance()


def integer(low: int, high: int) -> Argument:
    return lambda draw, shape: draw.integer(low, high)


def integers(low: int, high: int) -> Argument:
    """A tensor of integers from low, ..., high - 1."""
    return lambda draw, shape: draw.integers(shape, low, high)


def one_of(*options: Any) -> Argument:
    return lambda draw, shape: draw.choice(options)


def at_times(percent: int, *arguments: Any) -> Argument:
    """All of these arguments with that probability, else none of them."""

    def draw_some(draw: Draw, shape: list[int]) -> Several:
        chosen = arguments if draw.chance(percent) else ()
        return Several(a(draw, shape) if callable(a) else a for a in chosen)

    return draw_some
