"""Sizes in a captured graph as formulas in the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any

import sympy
import torch

from autopar.ir.graph import ModelGraph, shape_of
from autopar.ir.sized_graph import SizePair

Shapes = Sequence[Sequence[int]]


@dataclass(frozen=True)
class SizeFormulas:
    """Of a model that was captured with symbols for sizes of inputs.

    Args:
        inputs: sizes of the tensor inputs.
        assumptions: what the capture has found to hold, and the graph is right under.
        formulas: every size of a value in the graph, products of these, and what Python computes
            from them.
    """

    inputs: tuple[tuple[Any, ...], ...]
    assumptions: tuple[Any, ...]
    formulas: tuple[Any, ...]

    @staticmethod
    def of(graph: ModelGraph) -> SizeFormulas | None:
        """None if a size depends on more than the sizes of inputs, or none is a symbol."""
        names = [name for name in graph.inputs if name is not None]
        shapes = tuple(_sizes(graph.placeholders[name].meta["val"].shape) for name in names)
        formulas: dict[Any, None] = {}
        environment: Any = None
        for node in graph.nodes:
            value = node.meta.get("val")
            for x in value if isinstance(value, list | tuple) else (value,):
                if isinstance(x, torch.SymInt | torch.SymFloat):
                    formulas[x.node.expr] = None
                if not isinstance(x, torch.Tensor):
                    continue
                sizes = _sizes(x.shape)
                for part in (sizes, sizes[::-1]):  # dims are joined from either end
                    formulas |= dict.fromkeys(part) | dict.fromkeys(accumulate(part, mul))
                shape: list[Any] = list(x.shape)
                symbolic = (s for s in shape if isinstance(s, torch.SymInt))
                environment = next((s.node.shape_env for s in symbolic), environment)
        if environment is None:
            return None
        assumptions = [guard.expr for guard in environment.guards]
        for symbol, known in environment.var_to_range.items():
            assumptions += [symbol >= known.lower, symbol <= known.upper]
        same = environment.replacements  # symbols that the capture has found to be equal to others
        assumptions = [a.xreplace(same) if isinstance(a, sympy.Basic) else a for a in assumptions]
        known_symbols = {s for shape in shapes for s in shape if isinstance(s, sympy.Symbol)}
        found = [e for e in formulas if isinstance(e, sympy.Basic) and e.free_symbols]
        assumed = [a for a in assumptions if isinstance(a, sympy.Basic) and a.free_symbols]
        if any(e.free_symbols - known_symbols for e in (*found, *assumed)):
            return None
        return SizeFormulas(shapes, tuple(dict.fromkeys(assumed)), tuple(found))

    def values(
        self, pairs: Collection[SizePair], first: Shapes, second: Shapes, new: Shapes
    ) -> dict[SizePair, int] | None:
        """What the integers of two programs are in a third, of other shapes.

        An integer is a multiple of a size in the graph. Where several sizes fit, all have to give
        the same value.

        Args:
            pairs: integers of the programs for the `first` and the `second` shapes of tensor
                inputs.

        Returns:
            None if the graph is not known to be right for the new shapes, or an integer is
            unknown.
        """
        symbols = [self._symbols(shapes) for shapes in (first, second, new)]
        rows: list[tuple[int, ...]] = []
        for formula in self.formulas:
            row: list[Any] = [None if s is None else formula.xreplace(s) for s in symbols]
            if not all(x is not None and x.is_number for x in row):
                return None
            if row[0] == row[1] != row[2]:  # a constant of both programs that does not stay
                return None
            if row[0] != row[1] and all(x.is_Integer for x in row):
                rows.append(tuple(map(int, row)))
        found: dict[SizePair, int] = {}
        for x, y in pairs:
            fitting = {(x * c, a) for a, b, c in rows if x and a and x * b == y * a}
            results = {n // d if n % d == 0 else None for n, d in fitting}
            if len(results) != 1:
                return None
            (value,) = results
            if value is None:
                return None
            found[x, y] = value
        return found

    def _symbols(self, shapes: Shapes) -> Mapping[Any, Any] | None:
        """Values of the symbols for shapes of inputs; None if the graph is not for these."""
        values: dict[Any, Any] = {}
        for formulas, shape in zip(self.inputs, shapes, strict=True):
            if len(formulas) != len(shape):
                return None
            for formula, size in zip(formulas, shape, strict=True):
                if isinstance(formula, sympy.Symbol):
                    values.setdefault(formula, sympy.Integer(size))
        for formulas, shape in zip(self.inputs, shapes, strict=True):
            for formula, size in zip(formulas, shape, strict=True):
                now = formula.xreplace(values) if isinstance(formula, sympy.Basic) else formula
                if now != size:
                    return None
        holds = all(a.xreplace(values) == sympy.true for a in self.assumptions)
        return values if holds else None


def _sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in shape)


def varying_dims(graph: ModelGraph, shapes: Sequence[Shapes]) -> dict[int, list[int]]:
    """Dims in which shapes differ, by the positions of inputs among the flattened ones."""
    positions = [k for k, name in enumerate(graph.inputs) if name is not None]
    dims: dict[int, list[int]] = {}
    for position, same_input in zip(positions, zip(*shapes, strict=True), strict=True):
        if len(set(map(len, same_input))) != 1:
            return {}
        sizes = zip(*same_input, strict=True)
        varying = [d for d, same_dim in enumerate(sizes) if len(set(same_dim)) > 1]
        if varying:
            dims[position] = varying
    return dims


def show_sizes(first: Shapes, second: Shapes, new: Shapes) -> bool:
    """Whether programs for two shapes show how one for the new shapes depends on all sizes that
    these have otherwise. Sizes 0 and 1 have no symbols."""
    for shapes in zip(first, second, new, strict=True):
        if len(set(map(len, shapes))) != 1:
            return False
        for a, b, c in zip(*shapes, strict=True):
            if len({a, b, c}) > 1 and (a == b or min(a, b, c) < 2):
                return False
    return True


def input_shapes(graph: ModelGraph) -> Shapes:
    """Of the tensor inputs."""
    return [shape_of(graph.placeholders[n].meta["val"]) for n in graph.inputs if n is not None]
