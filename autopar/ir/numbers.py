"""Python numbers that vary from call to call and are inputs of a captured program.

An annealed weight, a step counter or a float argument is read anew at each call. What the forward
computes from such numbers in Python is an `Expression`, evaluated in Python at each call. Where it
meets a tensor, its value is a constant of the graph that is filled at each call. Where Python asks
for it (a branch, a size, a text), the answer of the capture is a `Condition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autopar.ir.reads import Reads, equal, value_of


@dataclass(frozen=True)
class Attribute:
    """
    Args:
        path: of the module; "" is the model.
        name: of the attribute; `config.beta` for one of an object that the module holds.
    """

    path: str
    name: str

    def value(self, model: torch.nn.Module, leaves: Sequence[Any]) -> Any:
        return value_of(model, self.path, self.name)

    def __str__(self) -> str:
        return f"{self.path or 'the model'}.{self.name}"


@dataclass(frozen=True)
class Argument:
    """
    Args:
        position: among the flattened inputs.
    """

    position: int

    def value(self, model: torch.nn.Module, leaves: Sequence[Any]) -> Any:
        return leaves[self.position]

    def __str__(self) -> str:
        return f"argument {self.position}"


Origin = Attribute | Argument
Values = Mapping[Origin, Any]


@dataclass(frozen=True)
class Expression:
    """A value computed in Python from numbers that vary.

    Args:
        operands: origins, expressions and constants.
    """

    function: Callable[..., Any]
    operands: tuple[Any, ...]

    @property
    def size(self) -> int:
        """Number of operations."""
        return 1 + sum(x.size for x in self.operands if isinstance(x, Expression))


def evaluate(expression: Any, values: Values) -> Any:
    """The value of an origin, an expression or a constant."""
    if isinstance(expression, Attribute | Argument):
        return values[expression]
    if isinstance(expression, Expression):
        return expression.function(*(evaluate(x, values) for x in expression.operands))
    return expression


@dataclass(frozen=True)
class Condition:
    """An answer that Python got while the forward was captured; others need another program.

    Args:
        expression: what was asked for.
        value: the answer.
        source: `file:line` in the user's code.
        text: that line.
    """

    expression: Expression | Origin
    value: Any
    source: str
    text: str

    def holds(self, values: Values) -> bool:
        try:
            return equal(self.value, evaluate(self.expression, values))
        except (ArithmeticError, TypeError, ValueError):  # the other side of an earlier branch
            return False

    def __str__(self) -> str:
        return f"{self.source}: {self.text}\n  asks for a number, captured as {self.value!r}"


@dataclass(frozen=True)
class Numbers:
    """The numbers of a program that vary.

    Args:
        types: the type of each; another type needs another program.
        tensors: by placeholder of the graph, which value it takes and of which dtype.
        conditions: in the order in which Python asked.
    """

    types: Mapping[Origin, type] = field(default_factory=dict)
    tensors: Mapping[str, tuple[Expression | Origin, torch.dtype]] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()

    def values(self, model: torch.nn.Module, leaves: Sequence[Any]) -> dict[Origin, Any]:
        """As they are now.

        Args:
            leaves: the flattened inputs.
        """
        return {origin: origin.value(model, leaves) for origin in self.types}

    def failed(self, values: Values) -> Condition | str | None:
        """Why the program does not serve these values; None if it does."""
        for origin, kind in self.types.items():
            if type(values[origin]) is not kind:
                return f"{origin} was of type {kind.__name__} and is {values[origin]!r}"
        return next((c for c in self.conditions if not c.holds(values)), None)

    def fill(
        self, constants: Mapping[str, torch.Tensor], values: Values
    ) -> Mapping[str, torch.Tensor]:
        """The constants of the graph for a call."""
        if not self.tensors:
            return constants
        filled = {
            name: torch.tensor(evaluate(expression, values), dtype=dtype)
            for name, (expression, dtype) in self.tensors.items()
        }
        return {**constants, **filled}


def is_number(value: Any) -> bool:
    """Whether a value can vary as an input of a program: an int or a float, and no bool."""
    return type(value) in (int, float)


def changed_numbers(model: torch.nn.Module, reads: Reads) -> list[Attribute]:
    """The attributes of which only the number is another one than a program was captured with."""
    changed = []
    for read in reads.attributes:
        if read.compared != "value" or not is_number(read.value):
            continue
        now = value_of(model, read.path, read.name)
        if type(now) is type(read.value) and not equal(read.value, now):
            changed.append(Attribute(read.path, read.name))
    return changed
