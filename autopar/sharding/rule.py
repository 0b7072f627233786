"""How an operator may be split: factor notation, from which strategies follow (`strategies.py`).

A row names the factors of an op's operands and results, as einsum does:

    aten.mm         "m k, k n -> m n"
    aten.addmm      "+n, m k, k n -> m n"            +   the operand is a term added to the result
    aten.layer_norm "*b h:lowered, h, h -> *b h"     *b  any number of leading dims
    aten.topk       "*b [k] -> *b [n], *b [n]"       []  the dim is never split

    aten.attention  "*b ring|q d, *b ring d, .."     |   both may split the dim, ring outermost;
                                                         of *b|x the last dim

A word behind a factor, once in the row, says what a split of it needs:

    lowered   the row's lowering, a local implementation that may run collectives
    complete  as lowered, and results without the factor are complete: no pending sum is left
    window    as lowered, and extents may differ: the lowering fetches the rows that its windows
              reach of other ranks
    axis      as window, along one mesh axis at most
    beside    as axis, and only of use where collectives run beside compute

An assignment of mesh axes to factors determines every layout. Along an axis that splits factor f,
operands and results that have f are split there; a result without f is a pending sum (P); an
operand without f is used differently on every rank, so it enters varying (V) and its gradient is
summed; a term (`+`) of a pending sum enters as P itself, to be counted once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autopar.ir.spec import ShardingSpec, fills_every_rank

Shape = tuple[int, ...]
Dims = tuple[str | None, ...]


@dataclass(frozen=True)
class Factor:
    """An iteration dim of an op.

    Args:
        size: its extent.
        even: the number of parts must divide `size` (dims that are merged or regrouped).
        lowered: splitting it needs the rule's lowering.
        complete: results without the factor are complete: the lowering reduces over it, or the
            op does not read its values.
        other: further extents that tensors have in this dim, where the lowering fits them together
            (a convolution's result is narrower than its input); each must fill every rank.
        half: splitting it divides only half of the op's work; every rank repeats the other half.
        one_axis: one mesh axis at most splits it.
        beside: splitting it is only of use where collectives run beside compute.
    """

    size: int
    even: bool = False
    lowered: bool = False
    complete: bool = False
    other: tuple[int, ...] = ()
    half: bool = False
    one_axis: bool = False
    beside: bool = False

    def allows(self, axes: Sequence[int], mesh: Sequence[int]) -> bool:
        parts = math.prod(mesh[axis] for axis in axes)
        if self.one_axis and len(axes) > 1:
            return False
        if parts > 1 and self.even:
            return self.size % parts == 0
        return all(fills_every_rank(size, axes, mesh) for size in (self.size, *self.other))


def alternatives(dim: str | None) -> tuple[str, ...]:
    """The factors by which a dim may be split."""
    return () if dim is None else tuple(dim.split("|"))


def factors_of(dims: Dims) -> list[str]:
    """The factors by which any of a tensor's dims may be split."""
    return [name for dim in dims for name in alternatives(dim)]


def _without(dims: Dims, unsplit: Collection[str]) -> Dims:
    """Dims that these factors do not split."""
    return tuple(
        "|".join(name for name in alternatives(dim) if name not in unsplit) or None for dim in dims
    )


@dataclass(frozen=True)
class OpRule:
    """A row bound to the shapes of one node.

    Args:
        inputs: per tensor operand its factors per dim (`alternatives`; None: never split), or None
            if absent.
        outputs: the same per tensor result.
        factors: the factors that may be split.
        terms: operands that are added to the result.
        linear: sets of operands in which, jointly, the op is linear: a pending sum passes through.
        lowering: local implementation where a lowered factor is split (or always, if `always`).
        always: the lowering replaces the op on every strategy (random ops).
        joint: factors that jointly split an extent, and it: every rank must have a part.
    """

    inputs: tuple[Dims | None, ...]
    outputs: tuple[Dims, ...]
    factors: Mapping[str, Factor]
    terms: frozenset[int] = frozenset()
    linear: tuple[frozenset[int], ...] = ()
    lowering: Callable[..., Any] | None = None
    always: bool = False
    joint: tuple[tuple[tuple[str, ...], int], ...] = ()

    def without(self, *names: str) -> OpRule:
        """The same, with these factors never split."""
        return replace(
            self,
            inputs=tuple(None if dims is None else _without(dims, names) for dims in self.inputs),
            outputs=tuple(_without(dims, names) for dims in self.outputs),
            factors={n: f for n, f in self.factors.items() if n not in names},
        )

    def by_groups(self, name: str, groups: int) -> OpRule:
        """The same, with the channels of a factor split between groups, never inside one."""
        if groups == 1 or name not in self.factors:
            return self.without(name)
        factor = replace(self.factors[name], size=groups, even=True)
        return replace(self, factors={**self.factors, name: factor})


@dataclass(frozen=True)
class Strategy:
    """One way to run one op on the mesh.

    Args:
        name: per mesh axis the factor it splits, `-` for none, `sum0` where a pending sum passes
            through operand set 0 (`OpRule.linear`). Where several axes split a factor and not in
            ascending order, `b:1 b:0` says which comes first (outermost).
        inputs: required layout of every tensor operand (None: absent).
        outputs: layout of every tensor result.
        splits: factor name to the mesh axes that split it.
        lowered: whether the rule's lowering replaces the op.
        half: the split factors that divide only half of the work.
    """

    name: str
    inputs: tuple[ShardingSpec | None, ...]
    outputs: tuple[ShardingSpec, ...]
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    lowered: bool = False
    half: frozenset[str] = frozenset()

    def share(self, mesh: Sequence[int]) -> float:
        """Fraction of the op's work that each device does."""
        share = 1.0
        for name, axes in self.splits.items():
            part = 1.0 / math.prod(mesh[axis] for axis in axes)
            share *= (1 + part) / 2 if name in self.half else part
        return share


# -- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the rule table: the notation and what it cannot say.

    Args:
        notation: see the module's docstring.
        linear: as in `OpRule`, e.g. `((0,), (1,))` for a product.
        lowering: as in `OpRule`.
        always: as in `OpRule`.
        half: names of factors that are so, as in `Factor`.
        moves: factors whose splits the lowering moves to another dim: its operand, and the dim from
            the end. A call without that dim has no such factor.
        when: the row holds for calls whose bound arguments, by name, satisfy this.
    """

    notation: str
    linear: tuple[tuple[int, ...], ...] = ()
    lowering: Callable[..., Any] | None = None
    always: bool = False
    half: tuple[str, ...] = ()
    moves: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] | None = None

    def applies(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the row holds for a call with these arguments."""
        return self.when is None or self.when(arguments)

    def bind(self, inputs: Sequence[Shape | None], outputs: Sequence[Shape]) -> OpRule:
        """The rule for operands and results of these shapes.

        Raises:
            ValueError: the shapes do not fit the notation.
        """
        left, right = self.notation.split("->")
        patterns = [p.split() for p in left.split(",")]
        results = [p.split() for p in right.split(",")]
        terms = frozenset(i for i, p in enumerate(patterns) if p and p[0].startswith("+"))
        words = dict(_WORD.findall(self.notation))
        if not set(words.values()) <= set(WORDS):
            raise ValueError(f"{self.notation!r}: a factor's word is one of {', '.join(WORDS)}")
        extents = _Extents(words)
        bound_in: list[Dims | None] = []
        for i, shape in enumerate(inputs):
            pattern = patterns[i] if i < len(patterns) else []
            bound_in.append(None if shape is None else extents.match(pattern, shape))
        bound_out = [extents.match(p, s) for p, s in zip(results, outputs, strict=True)]
        joint = [(alternatives(d), n) for d, n in extents.joint]
        factors = extents.factors(self.half)
        for name, (operand, dim) in self.moves.items():
            shape = inputs[operand]
            if name in factors and shape is not None and len(shape) >= -dim:
                own = bound_in[operand]
                assert own is not None
                names = dict.fromkeys((*alternatives(own[dim]), name))
                joint.append((tuple(names), shape[dim]))
            else:
                factors.pop(name, None)
        unsplit = extents.names - factors.keys()
        return OpRule(
            tuple(None if dims is None else _without(dims, unsplit) for dims in bound_in),
            tuple(_without(dims, unsplit) for dims in bound_out),
            factors,
            terms,
            tuple(frozenset(group) | terms for group in self.linear),
            self.lowering,
            self.always,
            tuple(joint),
        )


WORDS = ("lowered", "complete", "window", "axis", "beside")
_DIFFERING = ("window", "axis", "beside")  # words of factors whose extents may differ
_NAME = r"[a-z_]\w*(?::[a-z]+)?"
_TOKEN = re.compile(rf"\+?(\*?)(\[?)({_NAME}(?:\|{_NAME})*)(\]?)(?::[a-z]+)?|\.\.\.")
_WORD = re.compile(r"([a-z_]\w*):(\w+)")


class _Extents:
    """Extents of a row's factors, as the shapes of a call show them.

    Args:
        words: behind the names in the notation.
    """

    def __init__(self, words: Mapping[str, str]) -> None:
        self._words = words
        self._word_of: dict[str, str | None] = {}  # by name, those of leading dims numbered
        self._seen: dict[str, dict[int, None]] = {}
        self.joint: dict[tuple[str, int], None] = {}  # dims that several factors split

    @property
    def names(self) -> set[str]:
        """All factors."""
        return {*self._word_of}

    def match(self, pattern: Sequence[str], shape: Shape) -> Dims:
        """Factor names for the dims of one tensor, whose extents are noted."""
        pattern = [token for token in pattern if token != "+"]
        open_ended = [t for t in pattern if t.startswith(("*", "+*")) or t == "..."]
        spare = len(shape) - (len(pattern) - len(open_ended))
        if spare < 0 or (spare and not open_ended) or len(open_ended) > 1:
            raise ValueError(
                f"a tensor of shape {shape} does not fit the pattern {' '.join(pattern)!r}"
            )
        dims: list[str | None] = []
        for token in pattern:
            match = _TOKEN.fullmatch(token)
            if match is None:
                raise ValueError(f"cannot read {token!r} in the rule pattern {' '.join(pattern)!r}")
            star, bracket, base, _ = match.groups()
            if token == "...":
                dims += [None] * spare
                continue
            base = _WORD.sub(r"\1", base)
            names = [base]
            self._word_of |= {n: self._words.get(n) for n in alternatives(base)}
            if star:
                first, *others = alternatives(base)
                # numbered from the right, so that leading broadcast dims align
                names = [f"{first}{spare - i}" for i in range(spare)]
                self._word_of |= dict.fromkeys(names, self._words.get(first))
                names[-1:] = ["|".join([name, *others]) for name in names[-1:]]
            dims += [None] * len(names) if bracket else names
        for size, dim in zip(shape, dims, strict=True):
            if dim is not None and len(alternatives(dim)) > 1:
                self.joint[dim, size] = None
            for name in alternatives(dim):
                if size != 1 or self._word_of[name] in _DIFFERING:
                    self._seen.setdefault(name, {})[size] = None
        return tuple(None if n == 1 else name for n, name in zip(shape, dims, strict=True))

    def factors(self, half: Collection[str]) -> dict[str, Factor]:
        """Those that may be split; `half` names those that divide only half of the work."""
        factors = {}
        for name, seen in self._seen.items():
            extents, word = tuple(seen), self._word_of[name]
            if word in _DIFFERING:
                factor = Factor(
                    extents[0], lowered=True, other=extents[1:], half=name in half,
                    one_axis=word != "window", beside=word == "beside",
                )  # fmt: skip
            else:
                factor = Factor(
                    math.gcd(*extents),
                    even=len(extents) > 1,
                    lowered=word is not None,
                    complete=word == "complete",
                    half=name in half,
                )
            if min((factor.size, *factor.other)) > 1:
                factors[name] = factor
        return factors
