"""Views and other pure data movement: rules derived from the shapes of the call.

A dim that is regrouped keeps its leading factor: merging [b, s] to [b*s] or splitting it again
moves whole contiguous blocks as long as the number of parts divides b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autopar.sharding.lowerings import windows
from autopar.sharding.rule import Dims, Factor, OpRule, Row, Shape
from autopar.sharding.rules.call import Call


def _rule(
    inputs: Sequence[Dims | None], outputs: Sequence[Dims], factors: dict[str, Factor]
) -> OpRule:
    present = frozenset(i for i, dims in enumerate(inputs) if dims is not None)
    return OpRule(tuple(inputs), tuple(outputs), factors, linear=(present,))


def _named(source: Shape, names: Sequence[int | None], target: Shape) -> tuple[Dims, Dims, dict]:
    """`names[j]` is the input dim that output dim j carries whole, or None."""
    kept = {i for j, i in enumerate(names) if i is not None and source[i] == target[j] != 1}
    factors = {f"d{i}": Factor(source[i]) for i in sorted(kept)}
    dims = tuple(f"d{i}" if i in kept else None for i in range(len(source)))
    out = tuple(
        f"d{i}" if i is not None and i in kept and source[i] == target[j] else None
        for j, i in enumerate(names)
    )
    return dims, out, factors


def _groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into minimal runs of equal products, ignoring dims of size 1."""
    left = [i for i, n in enumerate(source) if n != 1]
    right = [j for j, n in enumerate(target) if n != 1]
    found = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        p, q = source[left[i]], target[right[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p *= source[left[i]]
                a.append(left[i])
                i += 1
            else:
                q *= target[right[j]]
                b.append(right[j])
                j += 1
        found.append((a, b))
    return found


def _reshape(call: Call) -> OpRule | None:
    source, target = call.inputs[0], call.outputs[0]
    assert source is not None
    if math.prod(source) == 0:
        return None
    dims: list[str | None] = [None] * len(source)
    out: list[str | None] = [None] * len(target)
    factors = {}
    for a, b in _groups(source, target):
        name = f"d{a[0]}"
        dims[a[0]] = out[b[0]] = name
        size = math.gcd(source[a[0]], target[b[0]])
        if size == 1:
            dims[a[0]] = out[b[0]] = None
            continue
        factors[name] = Factor(size, even=len(a) + len(b) > 2)
    return _rule([tuple(dims)], [tuple(out)], factors)


def _permuted(call: Call, order: Sequence[int]) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    dims, out, factors = _named(source, list(order), call.outputs[0])
    return _rule([dims], [out], factors)


def _transpose(call: Call) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    order = list(range(len(source)))
    a, b = call.arguments["dim0"] % len(source), call.arguments["dim1"] % len(source)
    order[a], order[b] = order[b], order[a]
    return _permuted(call, order)


def _t(call: Call) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    return _permuted(call, list(range(len(source)))[::-1])


def _permute(call: Call) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    return _permuted(call, [d % len(source) for d in call.arguments["dims"]])


def _aligned(call: Call) -> OpRule:
    """Same rank; dims whose size does not change are carried (slice, split, copies, ...)."""
    source = call.inputs[0]
    assert source is not None
    lead = len(call.outputs[0]) - len(source)
    names = [None] * lead + list(range(len(source)))
    changed = {
        d for target in call.outputs for d in range(len(source)) if target[lead + d] != source[d]
    }
    names = [None if n in changed else n for n in names]
    bound = [_named(source, names, target) for target in call.outputs]
    return _rule([bound[0][0]], [b[1] for b in bound], bound[0][2])


def _pad(call: Call) -> OpRule:
    """Padded dims stay whole, also where what is cut off at the other end makes up for it."""
    pad, rank = call.arguments["pad"], len(call.outputs[0])
    padded = {rank - 1 - i // 2 for i, amount in enumerate(pad) if amount}
    rule = _aligned(call).without(*(f"d{d}" for d in padded))
    if not call.arguments.get("value"):
        return rule
    return OpRule(rule.inputs, rule.outputs, rule.factors)  # a pending sum would pad k times


def _expand(call: Call) -> OpRule:
    """Repeated dims may be split too: the operand lacks them, so its gradient is summed."""
    source, target = call.inputs[0], call.outputs[0]
    assert source is not None
    lead = len(target) - len(source)
    carried = [j >= lead and source[j - lead] == target[j] for j in range(len(target))]
    out = tuple(f"d{j}" if n > 1 else None for j, n in enumerate(target))
    dims = tuple(out[lead + d] if carried[lead + d] else None for d in range(len(source)))
    return _rule([dims], [out], {f"d{j}": Factor(n) for j, n in enumerate(target) if n > 1})


def _cut(call: Call) -> OpRule:
    """Like `_aligned`, but dim `dim` is never split, even if a slice of it is the whole."""
    rule = _aligned(call)
    source = call.inputs[0]
    assert source is not None
    name = f"d{call.arguments.get('dim', 0) % len(source)}"
    drop = lambda dims: tuple(None if d == name else d for d in dims)  # noqa: E731
    factors = {k: f for k, f in rule.factors.items() if k != name}
    return _rule([drop(rule.inputs[0] or ())], [drop(o) for o in rule.outputs], factors)


def _broadcast_tensors(call: Call) -> OpRule | None:
    """Only where nothing is broadcast: every operand and result is split alike."""
    shape = call.outputs[0]
    if any(s != shape for s in call.inputs):
        return None
    names = tuple(f"d{d}" if n > 1 else None for d, n in enumerate(shape))
    factors = {f"d{d}": Factor(n) for d, n in enumerate(shape) if n > 1}
    return _rule([names] * len(call.inputs), [names] * len(call.outputs), factors)


def _select(call: Call) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    dim = call.arguments["dim"] % len(source)
    names = [d for d in range(len(source)) if d != dim]
    dims, out, factors = _named(source, names, call.outputs[0])
    return _rule([dims], [out], factors)


def _cat(call: Call) -> OpRule:
    out_shape = call.outputs[0]
    dim = call.arguments.get("dim", 0) % len(out_shape)
    names: Dims = tuple(None if d == dim or n == 1 else f"d{d}" for d, n in enumerate(out_shape))
    factors = {f"d{d}": Factor(n) for d, n in enumerate(out_shape) if names[d] is not None}
    return _rule([names] * len(call.inputs), [names], factors)


def _stack(call: Call) -> OpRule:
    """A new dim, of the operands."""
    shape = call.inputs[0]
    assert shape is not None
    dim = call.arguments.get("dim", 0) % (len(shape) + 1)
    names: Dims = tuple(None if n == 1 else f"d{d}" for d, n in enumerate(shape))
    factors = {f"d{d}": Factor(n) for d, n in enumerate(shape) if n > 1}
    return _rule([names] * len(call.inputs), [(*names[:dim], None, *names[dim:])], factors)


def _unbind(call: Call) -> OpRule:
    source = call.inputs[0]
    assert source is not None
    dim = call.arguments.get("dim", 0) % len(source)
    bound = _named(source, [d for d in range(len(source)) if d != dim], call.outputs[0])
    return _rule([bound[0]], [bound[1]] * len(call.outputs), bound[2])


def _whole(dims: Callable[[Call, int], set[int]]) -> Callable[[Call], OpRule]:
    """Same rank; the dims that `dims` (call, rank) names stay whole, and so do resized ones."""

    def bind(call: Call) -> OpRule:
        rule = _aligned(call)
        source = call.inputs[0]
        assert source is not None
        return rule.without(*(f"d{d}" for d in dims(call, len(source))))

    return bind


def _listed(call: Call, rank: int) -> set[int]:
    dims = call.arguments.get("dims", call.arguments.get("dim"))
    if dims is None or dims == []:
        return set(range(rank))
    return {d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _repeat_interleave(call: Call) -> OpRule:
    """Without a dim the result is flat."""
    return _diagonal(call) if call.arguments.get("dim") is None else _whole(_listed)(call)


def _repeat(call: Call) -> OpRule:
    """Dims that are repeated once are carried; of a repeated dim of one element, the copies."""
    source, target = call.inputs[0], call.outputs[0]
    assert source is not None
    lead = len(target) - len(source)
    names = [d - lead if d >= lead and source[d - lead] == n else None
             for d, n in enumerate(target)]  # fmt: skip
    dims, out, factors = _named(source, names, target)
    return _rule([dims], [out], factors)


def _unfold(call: Call) -> OpRule:
    """Windows along one dim, which stays whole; they become the last dim."""
    source = call.inputs[0]
    assert source is not None
    dim = call.arguments["dimension"] % len(source)
    names = [None if d == dim else d for d in range(len(source))]
    dims, out, factors = _named(source, [*names, None], call.outputs[0])
    return _rule([dims], [out], factors)


def _as_strided(call: Call) -> OpRule | None:
    """The first dim that is read whole and in place: the others step over it, or stay within."""
    source, target, stride = call.inputs[0], call.outputs[0], call.arguments["stride"]
    assert source is not None
    held = call.strides[0]
    if not source or call.arguments.get("storage_offset") or held is None:
        return None
    order = sorted(range(len(source)), key=lambda d: -held[d])
    dense = all(
        held[d] == math.prod(source[e] for e in order[i + 1 :]) for i, d in enumerate(order)
    )
    for d in range(min(len(source), len(target))):
        step, turn = held[d], held[d] * source[d]
        others = [(n, s) for e, (n, s) in enumerate(zip(target, stride, strict=True)) if e != d]
        within = sum((n - 1) * s for n, s in others if s < step)
        steps_over = all(s % turn == 0 for _, s in others if s >= step)
        same = source[d] == target[d] and stride[d] == step
        if dense and same and source[d] > 1 and within < step and steps_over:
            names = [f"d{d}!" if e == d else f"[x{e}]" for e in range(len(source))]
            out = [f"d{d}" if e == d else f"[y{e}]" for e in range(len(target))]
            row = Row(
                f"{' '.join(names)} -> {' '.join(out)}",
                linear=((0,),),
                lowering=windows.as_strided,
            )
            return row.bind(call.inputs, call.outputs)
    return None


def _diagonal(call: Call) -> OpRule:
    """Nothing is split, as of a matrix along its diagonal."""
    inputs = tuple(None if s is None else (None,) * len(s) for s in call.inputs)
    return OpRule(inputs, tuple((None,) * len(s) for s in call.outputs), {})


def _meshgrid(call: Call) -> OpRule:
    """Dim d of every result is operand d."""
    if call.arguments.get("indexing") == "xy":
        return _diagonal(call)
    shape = call.outputs[0]
    factors = {f"d{d}": Factor(n) for d, n in enumerate(shape) if n > 1}
    names: Dims = tuple(f"d{d}" if n > 1 else None for d, n in enumerate(shape))
    inputs = [(names[d],) if s else () for d, s in enumerate(call.inputs)]
    return OpRule(tuple(inputs), (names,) * len(call.outputs), factors)


# Run as a reshape to the local shape: what they are told (a size, a dim to drop) is global.
RESHAPES = frozenset(
    {
        "aten.view.default",
        "aten._unsafe_view.default",
        "aten.reshape.default",
        "aten.flatten.using_ints",
        "aten.unflatten.int",
        "aten.unsqueeze.default",
        "aten.squeeze.dim",
        "aten.squeeze.dims",
        "aten.squeeze.default",
    }
)

DERIVED: dict[str, Callable[[Call], OpRule | None]] = {
    **dict.fromkeys(RESHAPES, _reshape),
    "aten.transpose.int": _transpose,
    "aten.t.default": _t,
    "aten.permute.default": _permute,
    "aten.expand.default": _expand,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.contiguous.default": _aligned,
    "aten.clone.default": _aligned,
    "aten.alias.default": _aligned,
    "aten.detach.default": _aligned,
    "aten._to_copy.default": _aligned,
    "aten.slice.Tensor": _cut,
    "aten.split.Tensor": _cut,
    "aten.split_with_sizes.default": _cut,
    "aten.chunk.default": _cut,
    "aten.broadcast_tensors.default": _broadcast_tensors,
    "aten.concat.default": _cat,
    "aten.concatenate.default": _cat,
    "aten.stack.default": _stack,
    "aten.unbind.int": _unbind,
    "aten.flip.default": _whole(_listed),
    "aten.roll.default": _whole(_listed),
    "aten.fft_fftn.default": _whole(_listed),
    "aten.tril.default": _whole(lambda call, rank: {rank - 1, rank - 2}),
    "aten.triu.default": _whole(lambda call, rank: {rank - 1, rank - 2}),
    "aten.repeat_interleave.self_int": _repeat_interleave,
    "aten.repeat.default": _repeat,
    "aten.tile.default": _repeat,
    "aten.unfold.default": _unfold,
    "aten.as_strided.default": _as_strided,
    "aten.diag.default": _diagonal,
    "aten.meshgrid.indexing": _meshgrid,
    "aten.unsafe_split.Tensor": _cut,
    "aten.narrow.default": _cut,
    "aten.select.int": _select,
    "aten.cat.default": _cat,
}
