"""What a lowering declares beside its function: the collectives that it runs, forward and backward.

The planner prices a strategy by the declaration, and the rule proof compares it with what runs.
A lowering without a declaration runs no collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from autopar.sharding.rule import Dims, Shape


@dataclass(frozen=True)
class LocalCall:
    """One lowered call on one rank, by shapes: all that a declaration may depend on.

    Args:
        arguments: by schema name, defaults left out; tensors are given as their global shapes.
        operands: local shapes of the tensor operands (None: absent).
        results: local shapes of the tensor results.
        dims: per operand its factor per dim, as in `OpRule`.
        sizes: global extent of every split factor.
        splits: every split factor's mesh axes, outermost first.
        mesh: ranks per axis.
        coords: the rank.
        floating: whether the first operand has a floating or complex dtype.
    """

    arguments: Mapping[str, Any]
    operands: tuple[Shape | None, ...]
    results: tuple[Shape, ...]
    dims: tuple[Dims | None, ...]
    sizes: Mapping[str, int]
    splits: Mapping[str, tuple[int, ...]]
    mesh: tuple[int, ...]
    coords: tuple[int, ...]
    floating: bool

    @property
    def first(self) -> Shape:
        """Local shape of the first operand."""
        shape = self.operands[0]
        assert shape is not None
        return shape

    def axes(self, initials: str) -> list[int]:
        """Mesh axes that split factors whose names begin with one of these letters."""
        return [a for name, axes in self.splits.items() if name[0] in initials for a in axes]


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind along one mesh axis.

    Args:
        kind: of `autopar.cluster.link.PASSES`.
        axis: of the mesh.
        elements: of the buffer, on the side that is not split.
        forward: how many the forward runs.
        backward: how many the backward runs, where the first operand takes a gradient.
        wide: in float32 where the first operand has 16 bits.
        beside: the lowering computes while it runs.
    """

    kind: str
    axis: int
    elements: int
    forward: int = 0
    backward: int = 0
    wide: bool = False
    beside: bool = False


@dataclass(frozen=True)
class Declared:
    """What one call of a lowering does beyond the operator's own kernels.

    Args:
        collectives: in the order of the forward.
        passes: kernels, forward and backward, that read and write the first operand's shard once.
        kernels: further kernels.
        elements: that these read and write.
        saved: elements that it keeps for the backward, in the dtype of the first operand, beyond
            what the operator keeps of its operands and results.
    """

    collectives: tuple[Collective, ...] = ()
    passes: int = 0
    kernels: int = 0
    elements: int = 0
    saved: int = 0


Lowering = Callable[..., Any]
Declaration = Callable[[LocalCall], Declared]
Elements = Callable[[LocalCall], int]
F = TypeVar("F", bound=Lowering)

DECLARATIONS: dict[Lowering, Declaration] = {}


def declares(declaration: Declaration) -> Callable[[F], F]:
    """Decorates a lowering with its declaration."""

    def register(lowering: F) -> F:
        DECLARATIONS[lowering] = declaration
        return lowering

    return register


def declared(lowering: Lowering, call: LocalCall) -> Declared:
    """The collectives that a lowering runs for a call, and its extra passes."""
    declaration = DECLARATIONS.get(lowering)
    return Declared() if declaration is None else declaration(call)


# -- declarations that several lowerings share --------------------------------------------------


def all_reduces(
    initials: str, elements: Elements, *, forward: int, backward: int = 0, passes: int = 0
) -> Declaration:
    """So many all-reduces of `elements` along every axis that splits one of the factors.

    Args:
        initials: first letters of the factors' names.
    """

    def declaration(call: LocalCall) -> Declared:
        count, axes = elements(call), call.axes(initials)
        reductions = tuple(Collective("all_reduce", a, count, forward, backward) for a in axes)
        return Declared(reductions, passes if axes else 0)

    return declaration


def one_element(call: LocalCall) -> int:
    """A scalar."""
    return 1


def first_result(call: LocalCall) -> int:
    """As many elements as the first result has on this rank."""
    return math.prod(call.results[0])


def statistics_over(initials: str) -> Elements:
    """As many elements as the first operand has on this rank without the normalized dims."""

    def elements(call: LocalCall) -> int:
        dims = call.dims[0]
        assert dims is not None
        others = zip(call.first, dims, strict=True)
        return math.prod(n for n, name in others if name is None or name[0] not in initials)

    return elements
