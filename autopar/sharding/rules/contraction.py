"""Matrix products: rows where the op's dims are fixed, derived where an argument names them."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding.lowerings import collective_linear, experts
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules.call import Call

# input [tokens sorted by expert, k], weight [experts, k, n], end of each expert's tokens [experts]
_GROUPED = Row(
    "s:lowered k, e:lowered k n, [x] -> s n", linear=((0,), (1,)), lowering=experts.grouped_mm
)
# the same for types of 4 bytes and less, by a kernel
_GROUPED_KERNEL = Row(
    "s:lowered k, e:lowered k n, [x], +n -> s n",
    linear=((0,), (1,)),
    lowering=experts.grouped_mm_kernel,
    when=lambda a: a.get("bias") is None,
)

ROWS: dict[str, Row | tuple[Row, ...]] = {
    "aten.mm.default": Row("m k, k n -> m n", linear=((0,), (1,))),
    "aten.bmm.default": Row("b m k, b k n -> b m n", linear=((0,), (1,))),
    # rows may be gathered before the product, or summed and scattered behind it, in steps
    "aten.linear.default": Row(
        "*b|gather:beside k|scatter:beside, n|gather k|scatter, +n|gather -> *b|scatter n|gather",
        linear=((0,), (1,)),
        lowering=collective_linear.collective_linear,
        moves={"gather": (0, -2), "scatter": (0, -2)},
    ),
    # rows of the weight have a scale each
    "autopar.int8_linear.default": Row("*b k, n k, n -> *b n", linear=((0,),)),
    "autopar.float8_linear.default": Row("*b k, n k, n -> *b n", linear=((0,),)),
    # groups of a row have one, and two weights to a byte
    "autopar.int4_linear.default": Row("*b g [k], n g [h], n g -> *b n", linear=((0,),)),
    "autopar.int8_mm.default": Row("*b k, n k -> *b n", linear=((0,), (1,))),
    "autopar.packed_linear.default": Row("*b k, [p] n k, +[p] n -> *b [p] n", linear=((0,), (1,))),
    "autopar.packed_addmm.default": Row("+[p] n, m k, k [p] n -> m [p] n", linear=((1,), (2,))),
    "aten.outer.default": Row("m, n -> m n", linear=((0,), (1,))),
    "aten.dot.default": Row("k, k -> ", linear=((0,), (1,))),
    "aten.mv.default": Row("m k, k -> m", linear=((0,), (1,))),
    "aten.cdist.default": (
        Row("*b m k, *b n k -> *b m n", when=lambda a: a.get("p", 2) == 1),
        Row("*b m [k], *b n [k] -> *b m n"),
    ),
    "transformers.grouped_mm_fallback.default": _GROUPED,
    "aten._grouped_mm.default": _GROUPED_KERNEL,
}


def _matmul(call: Call) -> OpRule:
    """Batch dims broadcast; a vector has only the summed dim."""
    left, right = call.operand(0), call.operand(1)
    a = "k" if len(left) == 1 else "*b m k"
    b = "k" if len(right) == 1 else "*b k n"
    out = " ".join(
        ["*b" if max(len(left), len(right)) > 2 else ""]
        + (["m"] if len(left) > 1 else [])
        + (["n"] if len(right) > 1 else [])
    )
    return call.bind(f"{a}, {b} -> {out}", linear=((0,), (1,)))


def _einsum(call: Call) -> OpRule | None:
    """The equation is the rule; not where one operand has a letter twice (a diagonal)."""
    equation = str(call.arguments["equation"]).replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [*left.split(","), right]
    letters = [t.removeprefix("...") for t in terms]
    if not arrow or any("." in t or len(set(t)) < len(t) for t in letters):
        return None
    # einsum distinguishes cases, but a factor's name starts in lower case; the dims of the dots
    # lead
    patterns = [
        " ".join(
            ["*dots"] * t.startswith("...") + [c if c.islower() else f"u{c.lower()}" for c in rest]
        )
        for t, rest in zip(terms, letters, strict=True)
    ]
    linear = tuple((i,) for i in range(len(terms) - 1))
    return call.bind(f"{', '.join(patterns[:-1])} -> {patterns[-1]}", linear=linear)


def _added_product(call: Call) -> OpRule:
    """A product with a term of its dims, or of the last ones, which may be 1 and broadcast."""
    term, left, right = (call.operand(i) for i in range(3))
    names = ("b", "m", "n")[3 - len(left) :]
    sizes = (*left[:-1], right[-1])
    place = len(names) - len(term)
    dims = [
        name if size == whole else f"[one{name}]"
        for name, size, whole in zip(names[place:], term, sizes[place:], strict=True)
    ]
    batch = "b " * (len(left) == 3)
    return call.bind(
        f"+{' '.join(dims)}, {batch}m k, {batch}k n -> {batch}m n", linear=((1,), (2,))
    )


DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.addmm.default": _added_product,
    "aten.baddbmm.default": _added_product,
    "aten.matmul.default": _matmul,
    "aten.einsum.default": _einsum,
}
