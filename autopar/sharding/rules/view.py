"""Views: rules derived from the shapes of the call.

A regrouped dim keeps its leading factor: merging [b, s] to [b*s], or the inverse, moves contiguous
blocks if the number of parts divides b.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from autopar.sharding.lowerings import windows
from autopar.sharding.rule import Dims, Factor, OpRule, Shape
from autopar.sharding.rules.call import Call


def linear_rule(
    inputs: Sequence[Dims | None], outputs: Sequence[Dims], factors: dict[str, Factor]
) -> OpRule:
    present = frozenset(i for i, dims in enumerate(inputs) if dims is not None)
    return OpRule(tuple(inputs), tuple(outputs), factors, linear=(present,))


def named(source: Shape, names: Sequence[int | None], target: Shape) -> tuple[Dims, Dims, dict]:
    """`names[j]` is the input dim that output dim j carries unchanged, or None."""
    carried = {i for j, i in enumerate(names) if i is not None and source[i] == target[j] != 1}
    factors = {f"d{i}": Factor(source[i]) for i in sorted(carried)}
    dims = tuple(f"d{i}" if i in carried else None for i in range(len(source)))
    out = tuple(
        f"d{i}" if i is not None and i in carried and source[i] == target[j] else None
        for j, i in enumerate(names)
    )
    return dims, out, factors


def numbered(shape: Shape, unsplit: int | None = None) -> tuple[Dims, dict[str, Factor]]:
    """A factor d0, d1, ... per dim of more than one element."""
    names = tuple(f"d{d}" if n > 1 and d != unsplit else None for d, n in enumerate(shape))
    factors = {name: Factor(n) for name, n in zip(names, shape, strict=True) if name is not None}
    return names, factors


def _groups(source: Shape, target: Shape) -> list[tuple[list[int], list[int]]]:
    """Split both shapes into minimal runs of equal products, ignoring dims of size 1."""
    left = [i for i, n in enumerate(source) if n != 1]
    right = [j for j, n in enumerate(target) if n != 1]
    groups = []
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
        groups.append((a, b))
    return groups


def _reshape(call: Call) -> OpRule | None:
    source, target = call.operand(0), call.outputs[0]
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
    return linear_rule([tuple(dims)], [tuple(out)], factors)


def _permuted(call: Call, order: Sequence[int]) -> OpRule:
    source = call.operand(0)
    dims, out, factors = named(source, list(order), call.outputs[0])
    return linear_rule([dims], [out], factors)


def _transpose(call: Call) -> OpRule:
    source = call.operand(0)
    order = list(range(len(source)))
    a, b = call.arguments["dim0"] % len(source), call.arguments["dim1"] % len(source)
    order[a], order[b] = order[b], order[a]
    return _permuted(call, order)


def _t(call: Call) -> OpRule:
    source = call.operand(0)
    return _permuted(call, list(range(len(source)))[::-1])


def _permute(call: Call) -> OpRule:
    source = call.operand(0)
    return _permuted(call, [d % len(source) for d in call.arguments["dims"]])


def aligned(call: Call) -> OpRule:
    """Same rank; dims whose size does not change are carried (slice, split, copies, ...)."""
    source = call.operand(0)
    lead = len(call.outputs[0]) - len(source)
    names = [None] * lead + list(range(len(source)))
    changed = {
        d for target in call.outputs for d in range(len(source)) if target[lead + d] != source[d]
    }
    names = [None if n in changed else n for n in names]
    bound = [named(source, names, target) for target in call.outputs]
    return linear_rule([bound[0][0]], [b[1] for b in bound], bound[0][2])


def _expand(call: Call) -> OpRule:
    """Repeated dims may be split too: the operand lacks them, so its gradient is summed."""
    source, target = call.operand(0), call.outputs[0]
    lead = len(target) - len(source)
    carried = [j >= lead and source[j - lead] == target[j] for j in range(len(target))]
    out, factors = numbered(target)
    dims = tuple(out[lead + d] if carried[lead + d] else None for d in range(len(source)))
    return linear_rule([dims], [out], factors)


# Their bounds are clamped to the extent: if they keep the entire dim, they also keep a shard.
_CLAMPED = frozenset(
    {"aten.slice.Tensor", "aten.split.Tensor", "aten.unsafe_split.Tensor", "aten.chunk.default"}
)


def _cut(call: Call) -> OpRule:
    """A dim that is cut is not split, even if the call keeps all of it."""
    source = call.operand(0)
    rule = aligned(call)
    if len(call.outputs) == 1 and str(call.op) in _CLAMPED:
        return rule
    return rule.without(f"d{call.arguments.get('dim', 0) % len(source)}")


def _broadcast_tensors(call: Call) -> OpRule | None:
    """A rule if nothing is broadcast: every operand and result is split in the same way."""
    shape = call.outputs[0]
    if any(s != shape for s in call.inputs):
        return None
    names, factors = numbered(shape)
    return linear_rule([names] * len(call.inputs), [names] * len(call.outputs), factors)


def _select(call: Call) -> OpRule:
    source = call.operand(0)
    dim = call.arguments["dim"] % len(source)
    names = [d for d in range(len(source)) if d != dim]
    dims, out, factors = named(source, names, call.outputs[0])
    return linear_rule([dims], [out], factors)


def _unbind(call: Call) -> OpRule:
    source = call.operand(0)
    dim = call.arguments.get("dim", 0) % len(source)
    bound = named(source, [d for d in range(len(source)) if d != dim], call.outputs[0])
    return linear_rule([bound[0]], [bound[1]] * len(call.outputs), bound[2])


def _unfold(call: Call) -> OpRule:
    """Windows along one dim, which become the last; that dim is split where they do not overlap."""
    source = call.operand(0)
    dim, size = call.arguments["dimension"] % len(source), call.arguments["size"]
    separate = size == call.arguments["step"] and source[dim] % size == 0 and source[dim] > size
    names = " ".join(f"d{d}" if d != dim or separate else f"[d{d}]" for d in range(len(source)))
    return call.bind(f"{names} -> {names} [w]", linear=((0,),))


def _as_strided(call: Call) -> OpRule | None:
    """Split the first dim that is read completely and in place, if the others stride over it or
    inside."""
    source, target, stride = call.operand(0), call.outputs[0], call.arguments["stride"]
    strides = call.strides[0]
    if not source or call.arguments.get("storage_offset") or strides is None:
        return None
    order = sorted(range(len(source)), key=lambda d: -strides[d])
    dense = all(
        strides[d] == math.prod(source[e] for e in order[i + 1 :]) for i, d in enumerate(order)
    )
    for d in range(min(len(source), len(target))):
        step, period = strides[d], strides[d] * source[d]
        others = [(n, s) for e, (n, s) in enumerate(zip(target, stride, strict=True)) if e != d]
        within = sum((n - 1) * s for n, s in others if s < step)
        steps_over = all(s % period == 0 for _, s in others if s >= step)
        same = source[d] == target[d] and stride[d] == step
        if dense and same and source[d] > 1 and within < step and steps_over:
            names = [f"d{d}:lowered" if e == d else f"[x{e}]" for e in range(len(source))]
            out = [f"d{d}" if e == d else f"[y{e}]" for e in range(len(target))]
            return call.bind(
                f"{' '.join(names)} -> {' '.join(out)}", linear=((0,),), lowering=windows.as_strided
            )
    return None


# Run as a reshape to the local shape, because their arguments (a size, a dim to drop) are global.
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
    "aten.contiguous.default": aligned,
    "aten.clone.default": aligned,
    "aten.alias.default": aligned,
    "aten.detach.default": aligned,
    "aten._to_copy.default": aligned,
    "aten.slice.Tensor": _cut,
    "aten.split.Tensor": _cut,
    "aten.split_with_sizes.default": _cut,
    "aten.chunk.default": _cut,
    "aten.broadcast_tensors.default": _broadcast_tensors,
    "aten.unbind.int": _unbind,
    "aten.unfold.default": _unfold,
    "aten.as_strided.default": _as_strided,
    "aten.unsafe_split.Tensor": _cut,
    "aten.narrow.default": _cut,
    "aten.select.int": _select,
}
