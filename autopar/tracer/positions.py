"""What is known of integers and masks that a graph computes from positions alone.

Integers are a sum of one vector per dim, such as `key - query + 4`. Masks are a conjunction of
bands, `low <= key - query <= high`, and of values of other nodes. Both are exact: the vectors are
concrete, and whatever is not of these forms is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

Shape = tuple[int, ...]
# Per dim of a view the dim that it shows, None if it is new or repeats one element.
DimMap = Sequence[int | None]

_LARGEST = 2**31 - 1  # so that no dtype of positions overflows


# -- integers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Positions:
    """Integers: a constant and a vector for each dim with which they vary.

    Args:
        vectors: int64, of the length of their dim, the first element 0.
    """

    shape: Shape
    constant: int
    vectors: Mapping[int, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(shape: Shape, constant: int, vectors: Mapping[int, torch.Tensor]) -> Positions | None:
        """The sum of these; None if its elements are too large."""
        varying = {}
        largest = 0
        for dim, vector in vectors.items():
            first = int(vector[0])
            constant += first
            if bool((vector != first).any()):
                varying[dim] = vector - first
                largest += int(varying[dim].abs().max())
        return Positions(shape, constant, varying) if abs(constant) + largest < _LARGEST else None

    def viewed(self, dims: DimMap, shape: Shape) -> Positions:
        vectors = {
            new: self.vectors[old]
            for new, old in enumerate(dims)
            if old is not None and old in self.vectors
        }
        return Positions(shape, self.constant, vectors)

    def narrowed(self, dim: int, start: int, shape: Shape) -> Positions | None:
        """Elements of a dim from `start` on."""
        vectors = dict(self.vectors)
        if dim in vectors:
            vectors[dim] = vectors[dim][start : start + shape[dim]]
        return Positions.of(shape, self.constant, vectors)

    def plus(self, other: Positions, factor: int = 1) -> Positions | None:
        """The sum with a multiple of others of the same shape."""
        vectors = dict(self.vectors)
        for dim, vector in other.vectors.items():
            scaled = vector * factor
            vectors[dim] = vectors[dim] + scaled if dim in vectors else scaled
        return Positions.of(self.shape, self.constant + factor * other.constant, vectors)

    def times(self, factor: int) -> Positions | None:
        vectors = {dim: vector * factor for dim, vector in self.vectors.items()}
        return Positions.of(self.shape, self.constant * factor, vectors)


def slope(vector: torch.Tensor) -> int | None:
    """The difference of all neighbors; None if they differ."""
    steps = vector[1:] - vector[:-1]
    first = int(steps[0])
    return first if bool((steps == first).all()) else None


# -- masks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Within:
    """`low <= index in dim second - index in dim first <= high`, where first < second."""

    first: int
    second: int
    low: int | None
    high: int | None

    def and_(self, other: Within) -> Within:
        """Both, of the same dims."""
        lows = [b for b in (self.low, other.low) if b is not None]
        highs = [b for b in (self.high, other.high) if b is not None]
        return replace(self, low=max(lows, default=None), high=min(highs, default=None))

    def between(self, first: int, second: int) -> Within:
        """The same of other dims, in any order."""
        if first < second:
            return Within(first, second, self.low, self.high)
        low, high = (None if b is None else -b for b in (self.high, self.low))
        return Within(second, first, low, high)


@dataclass(frozen=True)
class Given:
    """The booleans of a node.

    Args:
        dims: per dim the dim of the node with which they vary, or None.
    """

    node: fx.Node
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Conjunction:
    """All of these; True without any.

    Args:
        never: False everywhere.
    """

    within: tuple[Within, ...] = ()
    given: tuple[Given, ...] = ()
    never: bool = False

    def and_(self, other: Conjunction) -> Conjunction:
        within = {(w.first, w.second): w for w in self.within}
        for w in other.within:
            dims = (w.first, w.second)
            within[dims] = within[dims].and_(w) if dims in within else w
        given = tuple(dict.fromkeys((*self.given, *other.given)))
        return Conjunction(tuple(within.values()), given, self.never or other.never)

    def viewed(self, dims: DimMap) -> Conjunction | None:
        """Of a view; None if it does not show a dim that varies."""
        place = {old: new for new, old in enumerate(dims) if old is not None}
        if not self._dims() <= place.keys():
            return None
        within = tuple(w.between(place[w.first], place[w.second]) for w in self.within)
        given = tuple(
            replace(g, dims=tuple(None if old is None else g.dims[old] for old in dims))
            for g in self.given
        )
        return replace(self, within=within, given=given)

    @property
    def is_half(self) -> bool:
        """Whether it is one bound, so that its inverse is one too."""
        if len(self.within) != 1 or self.given or self.never:
            return False
        return (self.within[0].low is None) != (self.within[0].high is None)

    def inverse(self) -> Conjunction:
        """Where it is not, if `is_half`."""
        (w,) = self.within
        low = None if w.high is None else w.high + 1
        high = None if w.low is None else w.low - 1
        return Conjunction((replace(w, low=low, high=high),))

    def _dims(self) -> set[int]:
        """The dims with which it varies."""
        within = {d for w in self.within for d in (w.first, w.second)}
        return within | {i for g in self.given for i, d in enumerate(g.dims) if d is not None}

    def narrowed(self, dim: int, start: int) -> Conjunction | None:
        """Elements of a dim from `start` on; None if other nodes vary with it."""
        if any(g.dims[dim] is not None for g in self.given):
            return None
        within = []
        for w in self.within:
            by = {w.first: start, w.second: -start}.get(dim, 0)
            low, high = (None if b is None else b + by for b in (w.low, w.high))
            within.append(replace(w, low=low, high=high))
        return replace(self, within=tuple(within))


@dataclass(frozen=True)
class Levels:
    """One value where a mask shows, another where it does not; of booleans, True and False.

    Args:
        inside, outside: tensors of one element.
    """

    shape: Shape
    where: Conjunction
    inside: torch.Tensor
    outside: torch.Tensor

    @staticmethod
    def constant(shape: Shape, value: torch.Tensor) -> Levels:
        return Levels(shape, Conjunction(), value, value)

    @staticmethod
    def mask(shape: Shape, where: Conjunction) -> Levels:
        shown, hidden = (torch.tensor(x, device="cpu") for x in (True, False))
        return Levels(shape, where, shown, hidden)

    def inverse(self) -> Levels:
        """The same values by the inverse of the mask, which is one bound."""
        return Levels(self.shape, self.where.inverse(), self.outside, self.inside)

    @property
    def is_constant(self) -> bool:
        where = self.where
        same = torch.equal(self.inside, self.outside)
        return same or where.never or not (where.within or where.given)

    @property
    def value(self) -> torch.Tensor:
        """Of a constant."""
        return self.outside if self.where.never else self.inside

    @property
    def is_mask(self) -> bool:
        """Whether they are what the conjunction says."""
        booleans = self.inside.dtype == torch.bool
        return booleans and bool(self.inside) and not bool(self.outside)


# -- comparisons ----------------------------------------------------------------------------------


def above(x: Positions, bound: int) -> Conjunction | None:
    """Where integers are greater than a bound; None if that is no band."""
    constant = x.constant - bound
    if not x.vectors:
        return Conjunction(never=constant <= 0)
    if len(x.vectors) == 1:
        ((_, vector),) = x.vectors.items()
        values = vector + constant > 0
        if bool(values.all()) or not bool(values.any()):
            return Conjunction(never=not bool(values.any()))
        return None
    if len(x.vectors) > 2:
        return None
    (first, a), (second, b) = sorted(x.vectors.items())
    step = slope(b)
    if step is None or slope(a) != -step:
        return None
    # step * (second - first) + constant > 0
    if step > 0:
        return Conjunction((Within(first, second, -constant // step + 1, None),))
    return Conjunction((Within(first, second, None, -(-constant // -step) - 1),))


def compared(kind: str, x: Positions) -> Conjunction | None:
    """Where integers are `lt`, `le`, `gt`, `ge` or `eq` 0; None if that is no band."""
    negative = x.times(-1)
    if negative is None:
        return None
    if kind == "gt":
        return above(x, 0)
    if kind == "ge":
        return above(x, -1)
    if kind == "lt":
        return above(negative, 0)
    if kind == "le":
        return above(negative, -1)
    if kind == "eq":
        bounds = above(x, -1), above(negative, -1)
        return None if bounds[0] is None or bounds[1] is None else bounds[0].and_(bounds[1])
    return None
