"""Which Python numbers vary from call to call: arguments, and attributes that the forward reads.

A number is a constant of the program at first. From its second value on, it is an input: the
forward is captured with a `TracedNumber` in its place. If that fails, it stays a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from autopar.ir.numbers import Argument, Attribute, Origin, changed_numbers, is_number
from autopar.ir.reads import Reads
from autopar.runtime.call import Call


class VaryingNumbers:
    """Of one model."""

    def __init__(self) -> None:
        self._first: dict[Any, list[Any]] = {}
        self._arguments: dict[Any, set[Argument]] = {}
        self._attributes: set[Attribute] = set()
        self._constant_arguments: set[Any] = set()
        self._constant_attributes: set[Attribute] = set()

    def of(self, call: Call) -> frozenset[Origin]:
        """Places of numbers that have had another value before, arguments and attributes."""
        arguments = self._varying_arguments(call)
        return frozenset((*arguments, *(self._attributes - self._constant_attributes)))

    def _varying_arguments(self, call: Call) -> set[Argument]:
        where = call.structure
        if not any(map(is_number, call.leaves)) or where in self._constant_arguments:
            return set()
        numbers = [x if is_number(x) else None for x in call.leaves]
        first = self._first.setdefault(where, numbers)
        varying = self._arguments.setdefault(where, set())
        pairs = enumerate(zip(numbers, first, strict=True))
        varying |= {Argument(k) for k, (now, before) in pairs if now is not None and now != before}
        return {p for p in varying if numbers[p.position] is not None}

    def compare(self, model: torch.nn.Module, reads: Iterable[Reads]) -> None:
        """Attributes of which only the number changed since a capture vary from here on."""
        for known in reads:
            self._attributes.update(changed_numbers(model, known))

    @contextmanager
    def kept_constant(self, call: Call) -> Iterator[None]:
        """The numbers of a call are constants from here on, unless the body fails."""
        before = set(self._constant_arguments), set(self._constant_attributes)
        origins = self.of(call)
        attributes = {p for p in origins if isinstance(p, Attribute)}
        self._constant_attributes |= attributes
        if attributes != origins:
            self._constant_arguments.add(call.structure)
        try:
            yield
        except BaseException:
            self._constant_arguments, self._constant_attributes = before
            raise
