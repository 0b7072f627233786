"""What kernels replace, as patterns of operators, by torch's pattern matcher.

`torch._inductor.pattern_matcher` is private to torch (tested with 2.13). Only this file uses it. A
pattern is a call whose arguments are patterns: `Arg` names what stands in a place, one name always
the same value. What a pattern computes inside is used by the pattern alone, as often as it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.fx as fx
from torch._inductor.pattern_matcher import CallFunction, KeywordArg, PatternExpr, is_match

aten = torch.ops.aten

Arg = KeywordArg


@dataclass(frozen=True)
class Matched:
    """Operators that a pattern matched.

    Args:
        nodes: in order; the last one has the result.
        bound: what stands in the named places: nodes and constants.
        views: what is made of the widened operand of the kernel before it is used.
        added: the addition among them, whose result the kernel gives as well.
    """

    nodes: tuple[fx.Node, ...]
    bound: Mapping[str, Any]
    views: tuple[fx.Node, ...] = ()
    added: fx.Node | None = None

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose results the kernel gives."""
        return (self.nodes[-1],) if self.added is None else (self.nodes[-1], self.added)


def matched(pattern: PatternExpr, node: fx.Node) -> Matched | None:
    """How a pattern ends in this node; None if it does not."""
    match = pattern.match(node)
    if not is_match(match):
        return None
    # the matcher passes over keywords that a pattern does not name
    calls = {p: n for p, n in match.ctx.pattern_to_node.items() if isinstance(p, CallFunction)}
    if any(node is not None and set(node.kwargs) - set(p.kwargs) for p, node in calls.items()):
        return None
    return Matched(tuple(dict.fromkeys(match.nodes)), match.kwargs)


def _call(op: Any, *args: Any, users: int = 1, **kwargs: Any) -> CallFunction:
    return CallFunction(op, *args, _users=users, **kwargs)


def _either(op: Any, a: Any, b: Any, flip: bool) -> CallFunction:
    """A call whose operands may be exchanged."""
    return _call(op, b, a) if flip else _call(op, a, b)


def _cast(x: Any, dtype: str, users: int = 1) -> CallFunction:
    return _call(aten._to_copy.default, x, dtype=Arg(dtype), users=users)


_FLIPS = (False, True)


def rms_norm() -> Iterator[PatternExpr]:
    """`weight * (x * rsqrt(mean(x²) + eps))` with x widened for both or for the mean alone (T5), or
    not; rounded before the weight (Llama), or behind it (Gemma)."""
    for outer, inner in product(_FLIPS, _FLIPS):
        for widened, rounded in ((0, ""), (1, "first"), (2, "first"), (2, "last")):
            wide = _cast(Arg("x"), "wide", users=widened) if widened else Arg("x")
            x = wide if widened == 2 else Arg("x")
            squares = _call(aten.pow.Tensor_Scalar, wide, 2)
            variance = _call(aten.mean.dim, squares, Arg("dims"), True)
            rstd = _call(aten.rsqrt.default, _call(aten.add.Tensor, variance, Arg("eps")))
            x_hat: PatternExpr = _either(aten.mul.Tensor, x, rstd, inner)
            if rounded == "first":
                x_hat = _cast(x_hat, "first")
            out = _either(aten.mul.Tensor, Arg("weight"), x_hat, outer)
            yield _cast(out, "last") if rounded == "last" else out


def rotary() -> Iterator[PatternExpr]:
    """`x * cos + rotate_half(x) * sin`."""
    for outer, left, right in product(_FLIPS, _FLIPS, _FLIPS):
        x, cos, sin = Arg("x"), Arg("cos"), Arg("sin")
        first = _call(aten.slice.Tensor, x, Arg("dim"), 0, Arg("half"))
        second = _call(aten.slice.Tensor, x, Arg("dim"), Arg("half"), Arg("end"))
        turned = _call(aten.cat.default, [_call(aten.neg.default, second), first], Arg("cat_dim"))
        straight = _either(aten.mul.Tensor, x, cos, left)
        yield _either(
            aten.add.Tensor, straight, _either(aten.mul.Tensor, turned, sin, right), outer
        )


def swiglu() -> Iterator[PatternExpr]:
    """`silu(gate) * up`."""
    for flip in _FLIPS:
        yield _either(aten.mul.Tensor, _call(aten.silu.default, Arg("gate")), Arg("up"), flip)


def geglu() -> Iterator[PatternExpr]:
    """`gelu(gate) * up`."""
    for flip in _FLIPS:
        for gelu in (
            _call(aten.gelu.default, Arg("gate"), approximate=Arg("approximate")),
            _call(aten.gelu.default, Arg("gate")),
        ):
            yield _either(aten.mul.Tensor, gelu, Arg("up"), flip)


def masked_softmax() -> Iterator[PatternExpr]:
    """`softmax(scale * x + mask + bias)`, with a scale and a bias or not; in float32 and rounded,
    or in the dtype of x."""
    for scaled, biased, wide, left, right in product(*[_FLIPS[::-1]] * 5):  # the largest first
        if right and not biased:
            continue
        x = _call(aten.mul.Tensor, Arg("x"), Arg("scale")) if scaled else Arg("x")
        sums: PatternExpr = _either(aten.add.Tensor, x, Arg("mask"), left)
        if biased:
            sums = _either(aten.add.Tensor, sums, Arg("bias"), right)
        if wide:
            out = _call(aten.softmax.int, sums, Arg("dim"), Arg("wide"))
            yield _call(aten._to_copy.default, out, dtype=Arg("rounded"))
            yield out
        yield _call(aten.softmax.int, sums, Arg("dim"))
