"""Reductions of split values: sums of the ranks' parts, which messages complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from autopar.ir.spec import ShardingSpec
from autopar.optim.layout import Layout, reduced_over
from autopar.optim.parts import Parts
from autopar.optim.pieces import (
    mean_of_sum,
    plain_sum,
    root_of_sum,
    roots_of_sums,
    square_sum,
    square_sums,
)
from autopar.optim.recording import Call, bound, ref

_ATEN = torch.ops.aten


class Reductions(Parts):
    """Norms and means."""

    def _norm(self, call: Call) -> None:
        """A norm over dims."""
        arguments = bound(call)
        x = arguments["self"].number
        order, dim = arguments.get("ord", 2), arguments.get("dim")
        keep, dtype = arguments.get("keepdim", False), arguments.get("dtype")
        dims = tuple(range(len(self.recording.values[x].shape))) if dim in (None, ()) else dim
        self._one_norm(call, x, call.results[0], order, dims, keep, dtype)

    def _norms(self, call: Call) -> None:
        """Norms of all tensors in a list."""
        arguments = bound(call)
        order, dtype = arguments.get("ord", 2), arguments.get("dtype")
        together: dict[torch.dtype, list[tuple[int, int]]] = {}
        for place, result in zip(arguments["self"], call.results, strict=True):
            x = place.number
            value, layout = self.recording.values[x], self._complete(x)
            if order == 2 and dtype is None and any(layout.spec.dims) and not layout.owner:
                together.setdefault(value.dtype, []).append((x, result))
                continue
            single = Call(_ATEN.linalg_vector_norm.default, (place, order), (), (result,))
            self._one_norm(single, x, result, order, range(len(value.shape)), False, dtype)
        for group in together.values():
            self._split_norms(group)

    def _split_norms(self, group: Sequence[tuple[int, int]]) -> None:
        """Norms of tensors that are split, each with its result."""
        parts: dict[int, int] = {}
        totals, whole = [], Layout.replicated(0)
        for x, result in group:
            value, made = self.recording.values[x], self.recording.values[result]
            layout = self._complete(x)
            parts[x] = self._in(x, layout)
            totals.append(self._fresh(made._replace(dtype=_real(_wider(value.dtype)))))
            across = tuple(sorted(a for axes in layout.spec.dims for a in axes))
            self._define(totals[-1], Layout(ShardingSpec((), across)))
            self._work(layout, self._bytes_us(value.shape, layout, value.dtype))
        xs = tuple(ref(x) for x, _ in group)
        single = Call(_ATEN._foreach_norm.Scalar, (xs,), (), ())
        self._run(square_sums, single, parts, [self.held[t] for t in totals], lists=True)
        parts = {t: self._in(t, whole) for t in totals}
        makes = [self._define(result, whole) for _, result in group]
        dtype = self.recording.values[group[0][1]].dtype
        single = single._replace(args=(tuple(map(ref, totals)), dtype))
        self._run(roots_of_sums, single, parts, makes, lists=True)

    def _one_norm(
        self, call: Call, x: int, result: int, order: Any, dims: Sequence[int], keep: bool,
        dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        # squares, since sums of them over ranks are the whole's
        pieces = (square_sum, root_of_sum) if order == 2 else None
        self._reduction(call, x, result, dims, keep, dtype, pieces)

    def _mean(self, call: Call) -> None:
        arguments = bound(call)
        x, result = arguments["self"].number, call.results[0]
        shape, dims = self.recording.values[x].shape, arguments.get("dim")
        dims = tuple(range(len(shape))) if dims in (None, ()) else dims
        count = math.prod(shape[d] for d in dims)
        keep, dtype = arguments.get("keepdim", False), arguments.get("dtype")
        self._reduction(call, x, result, dims, keep, dtype, (plain_sum, mean_of_sum), (count,))

    def _reduction(
        self, call: Call, x: int, result: int, dims: Sequence[int], keep: bool,
        dtype: torch.dtype | None, pieces: tuple[Any, Any] | None, rest: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        """A reduction over dims.

        Args:
            pieces: what each rank computes of its part, to be summed over ranks, and what becomes
                of the sum. None: the reduction is of whole tensors.
            rest: arguments of the second one.
        """
        value, made = self.recording.values[x], self.recording.values[result]
        layout = self._complete(x)
        reduced = {d % len(value.shape) for d in dims} if value.shape else set()
        across = sorted(a for d in reduced for a in layout.spec.dims[d])
        whole = Layout.replicated(len(made.shape))
        if across and pieces is None:
            layout, across = Layout.replicated(len(value.shape)), []
        parts = {x: self._in(x, layout)}
        left = reduced_over(layout, reduced, keep, len(value.shape))
        if not across or pieces is None:
            self._run(call.op, call, parts, [self._define(result, left)])
        else:
            wide = value.dtype if dtype is None else dtype
            wide = torch.float32 if wide in (torch.bfloat16, torch.float16) else wide
            pending = left.with_spec(ShardingSpec(left.spec.dims, tuple(across)))
            kept = made.dtype if pieces[0] is plain_sum else _real(wide)
            total = self._fresh(made._replace(dtype=_wider(kept)))
            single = Call(call.op, (ref(x), tuple(sorted(reduced)), keep, wide), (), ())
            self._run(pieces[0], single, parts, [self._define(total, pending)])
            single = Call(call.op, (ref(total), *rest, made.dtype), (), ())
            parts = {total: self._in(total, whole)}
            self._run(pieces[1], single, parts, [self._define(result, whole)])
        self._work(layout, self._bytes_us(value.shape, layout, value.dtype))


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _real(dtype: torch.dtype) -> torch.dtype:
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(dtype, dtype)
