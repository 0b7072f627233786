"""Data movement that makes new tensors: joining, repeating, padding, rolling, regrouping pixels."""

from __future__ import annotations

from collections.abc import Callable

from autopar.sharding.lowerings import repeat
from autopar.sharding.rule import Dims, OpRule
from autopar.sharding.rules.call import Call
from autopar.sharding.rules.view import aligned, linear_rule, named, numbered


def _pad(call: Call) -> OpRule:
    """Padded dims are not split, even if a negative padding at the other end keeps the extent."""
    pad, rank = call.arguments["pad"], len(call.outputs[0])
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    rule = aligned(call).without(*(f"d{d}" for d in padded))
    if not call.arguments.get("value") or not padded:
        return rule
    return OpRule(
        rule.inputs, rule.outputs, rule.factors
    )  # the padding would be added once per rank


def _cat(call: Call) -> OpRule:
    """The dim along which tensors are joined is not split, unless there is one tensor."""
    out_shape = call.outputs[0]
    dim = call.arguments.get("dim", 0) % len(out_shape)
    names, factors = numbered(out_shape, dim if len(call.inputs) > 1 else None)
    return linear_rule([names] * len(call.inputs), [names], factors)


def _stack(call: Call) -> OpRule:
    """A new dim, of the operands."""
    shape = call.operand(0)
    dim = call.arguments.get("dim", 0) % (len(shape) + 1)
    names, factors = numbered(shape)
    return linear_rule([names] * len(call.inputs), [(*names[:dim], None, *names[dim:])], factors)


def _unsplit_dims(dims: Callable[[Call, int], set[int]]) -> Callable[[Call], OpRule]:
    """Same rank; the dims that `dims` (call, rank) names are not split, nor are resized ones."""

    def bind(call: Call) -> OpRule:
        rule = aligned(call)
        source = call.operand(0)
        return rule.without(*(f"d{d}" for d in dims(call, len(source))))

    return bind


def _listed(call: Call, rank: int) -> set[int]:
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _in_blocks(call: Call) -> OpRule:
    """Every element along a dim becomes a block, or every block becomes an element."""
    source, target = call.operand(0), call.outputs[0]
    names = " ".join(
        f"d{d}" if min(pair) > 1 else f"[d{d}]"
        for d, pair in enumerate(zip(source, target, strict=True))
    )
    return call.bind(f"{names} -> {names}", linear=((0,),))


def _repeat_interleave(call: Call) -> OpRule:
    """Without a dim the result is flat and split by blocks of the first dim. An output size is that
    of the global result, so the lowering leaves it out."""
    source = call.operand(0)
    if call.arguments.get("dim") is not None:
        if call.arguments.get("output_size") is None:
            return _in_blocks(call)
        repeated = call.arguments["dim"] % len(source)
        names = " ".join(
            f"d{d}{':lowered' if d == repeated else ''}" if n > 1 else f"[d{d}]"
            for d, n in enumerate(source)
        )
        return call.bind(f"{names} -> {names}", linear=((0,),), lowering=repeat.interleave)
    first = next((d for d, n in enumerate(source) if n > 1), None)
    names = " ".join("b" if d == first else f"[d{d}]" for d in range(len(source)))
    out = "[b]" if first is None else "b"
    return call.bind(f"{names} -> {out}", linear=((0,),))


def _repeat(call: Call) -> OpRule:
    """Dims that are repeated once are carried; of a repeated dim of one element, the copies."""
    source, target = call.operand(0), call.outputs[0]
    lead = len(target) - len(source)
    names = [d - lead if d >= lead and source[d - lead] == n else None
             for d, n in enumerate(target)]  # fmt: skip
    dims, out, factors = named(source, names, target)
    return linear_rule([dims], [out], factors)


def _unsplit(call: Call) -> OpRule:
    """As of a matrix along its diagonal."""
    inputs = [None if s is None else (None,) * len(s) for s in call.inputs]
    return linear_rule(inputs, [(None,) * len(s) for s in call.outputs], {})


def _meshgrid(call: Call) -> OpRule:
    """Dim d of every result is operand d; the first two change places in "xy"."""
    shape, places = call.outputs[0], list(range(len(call.inputs)))
    if call.arguments.get("indexing") == "xy":
        places[:2] = places[:2][::-1]
    names, factors = numbered(shape)
    inputs: list[Dims] = [
        (names[d],) if s else () for d, s in zip(places, call.inputs, strict=True)
    ]
    return linear_rule(inputs, [names] * len(call.outputs), factors)


DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.concat.default": _cat,
    "aten.concatenate.default": _cat,
    "aten.stack.default": _stack,
    "aten.flip.default": _unsplit_dims(_listed),
    "aten.roll.default": _unsplit_dims(_listed),
    "aten.fft_fftn.default": _unsplit_dims(_listed),
    "aten.tril.default": _unsplit_dims(lambda call, rank: {rank - 1, rank - 2}),
    "aten.triu.default": _unsplit_dims(lambda call, rank: {rank - 1, rank - 2}),
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.repeat.default": _repeat,
    "aten.tile.default": _repeat,
    "aten.diag.default": _unsplit,
    "aten.meshgrid.indexing": _meshgrid,
    "aten.cat.default": _cat,
    "aten.pixel_shuffle.default": _in_blocks,
    "aten.pixel_unshuffle.default": _in_blocks,
}
