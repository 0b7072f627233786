"""Products that run beside their collective: a gather before, or a reduce-scatter behind them, as a
ring of partial products (Wang et al. 2023, "Overlap communication with dependent computation via
decomposition"; async tensor parallelism).

The gathered operand, or the whole product of which a part is kept, never exists: a rank has one
more shard at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from autopar.comm import steps
from autopar.comm.groups import find_group
from autopar.comm.operators import operator
from autopar.ir.spec import chunk, local_range
from autopar.sharding.lowerings.declared import Collective, Declared, LocalCall, declares
from autopar.sharding.lowerings.shard import Shard
from autopar.sharding.rule import Shape

_ROWS = -2


def _joined(parts: Sequence[torch.Tensor], first: int) -> torch.Tensor:
    rows = sum(part.shape[_ROWS] for part in parts)
    return parts[0].new_empty([*parts[0].shape[:_ROWS], rows, parts[0].shape[-1]])


@operator(_joined)
def join_blocks(parts: Sequence[torch.Tensor], first: int) -> torch.Tensor:
    """Blocks of rows in the order of their ranks; part i is that of rank first - i. One operator,
    so that the programs of all ranks have the same."""
    return torch.cat([parts[(first - r) % len(parts)] for r in range(len(parts))], _ROWS)


@dataclass(frozen=True)
class _Rows:
    """Rows that the ranks of a group have a part of.

    Args:
        lengths: of every rank's part.
        group: its name.
    """

    lengths: tuple[int, ...]
    group: str

    @property
    def ranks(self) -> int:
        """Of the group."""
        return len(self.lengths)

    @property
    def me(self) -> int:
        """This rank."""
        return find_group(self.group).index

    def part(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """A rank's rows of all."""
        return x.narrow(_ROWS, sum(self.lengths[:rank]), self.lengths[rank])

    def passed(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Send to the next rank; receive rows of that rank from the one before."""
        shape = list(x.shape)
        shape[_ROWS] = self.lengths[rank]
        counts = [[0] * self.ranks, [0] * self.ranks]
        counts[0][(self.me + 1) % self.ranks] = x.numel()
        counts[1][(self.me - 1) % self.ranks] = math.prod(shape)
        row = torch.ops.autopar.exchange(x.reshape(-1), *counts, self.group)
        return row.view(shape)

    def gathered(self, x: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Every rank's rows and whose they are, this rank's first, while the next are on their
        way."""
        for step in range(self.ranks):
            source = (self.me - step) % self.ranks
            following = None
            if step < self.ranks - 1:
                following = self.passed(x, (source - 1) % self.ranks)
            yield source, x
            if following is not None:
                x = following

    def reduced(self, of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The sum over the ranks of this rank's rows.

        Args:
            of: this rank's terms for the rows of a rank. They are computed while sums travel.
        """
        total: torch.Tensor | None = None
        for step in range(self.ranks):
            rank = (self.me - 1 - step) % self.ranks
            following = None if total is None else self.passed(total, rank)
            terms = of(rank)
            total = terms if following is None else following + terms
        assert total is not None
        return total


def _columns(x: torch.Tensor) -> torch.Tensor:
    """[rows of all dims, columns]."""
    return x.reshape(-1, x.shape[-1])


def _of_weight(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _columns(grad).t() @ _columns(x)


def _of_bias(grad: torch.Tensor, has_bias: bool) -> torch.Tensor | None:
    return _columns(grad).sum(0) if has_bias else None


class _GatheredLinear(torch.autograd.Function):
    """[*b, m/p, k], [n/p, k] -> [*b, m, n/p]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, rows: _Rows
    ) -> torch.Tensor:
        ctx.rows, ctx.has_bias = rows, bias is not None
        ctx.save_for_backward(x, w)
        parts = [F.linear(part, w, bias) for _, part in rows.gathered(x)]
        return torch.ops.autopar.join_blocks(parts, rows.me)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        rows = ctx.rows
        of_x = rows.reduced(lambda rank: rows.part(grad, rank) @ w)
        of_w = None
        for source, part in rows.gathered(x):
            term = _of_weight(rows.part(grad, source), part)
            of_w = term if of_w is None else of_w + term
        return of_x, of_w, _of_bias(grad, ctx.has_bias), None


class _ScatteredLinear(torch.autograd.Function):
    """[*b, m, k/p], [n, k/p] -> [*b, m/p, n]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, rows: _Rows
    ) -> torch.Tensor:
        ctx.rows, ctx.has_bias = rows, bias is not None
        ctx.save_for_backward(x, w)
        out = rows.reduced(lambda rank: F.linear(rows.part(x, rank), w))
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, w = ctx.saved_tensors
        rows = ctx.rows
        parts, of_w = [], None
        for source, part in rows.gathered(grad):
            parts.append(part @ w)
            term = _of_weight(part, rows.part(x, source))
            of_w = term if of_w is None else of_w + term
        of_x = torch.ops.autopar.join_blocks(parts, rows.me)
        return of_x, of_w, _of_bias(grad, ctx.has_bias), None


def _lengths(size: int, outer: Sequence[tuple[int, int]], ranks: int) -> tuple[int, ...]:
    """Of every rank's part of the rows that other axes leave to this rank and its group.

    Args:
        outer: ranks along each of these axes, and which of them.
    """
    sizes, own = [n for n, _ in outer], [i for _, i in outer]
    size = local_range(size, range(len(outer)), sizes, own)[1]
    return tuple(chunk(size, ranks, r)[1] for r in range(ranks))


def _declared(call: LocalCall) -> Declared:
    """A ring per split factor: the gathered rows, or the sums of those that are kept. Where both
    are split, rows are gathered first."""
    runs: list[Collective] = []
    further = 0
    for factor, operand in (("gather", 0), ("scatter", None)):
        if factor not in call.splits:
            continue
        (axis,) = call.splits[factor]
        ranks, me = call.mesh[axis], call.coords[axis]
        outer = [(call.mesh[a], call.coords[a]) for a in call.splits.get("b1", ())]
        lengths = _lengths(call.arguments["input"][_ROWS], outer, ranks)
        shape = call.results[0] if operand is None else call.operands[0]
        assert shape is not None
        per_row = math.prod(shape) // shape[_ROWS]
        if factor == "gather" and "scatter" in call.splits:
            elements = per_row * sum(lengths)
            runs.append(Collective("all_gather", axis, elements, forward=1))
            runs.append(Collective("reduce_scatter", axis, elements, backward=1))
            continue
        further = ranks - 1
        # one ring passes rows on, the other one sums that come back to their rank
        rings = {"gather": ((me, 1, 1), (me - 1, 0, 1)), "scatter": ((me - 1, 1, 0), (me, 0, 1))}
        for first, forward, backward in rings[factor]:
            for step in range(ranks - 1):
                most = max(lengths[(first - step) % ranks], lengths[(first - step - 1) % ranks])
                elements = most * per_row
                runs.append(Collective("exchange", axis, elements, forward, backward, beside=True))
    weight = call.operands[1]
    assert weight is not None
    # per further step: three products, two of which read the weight, and a sum of its gradient
    return Declared(tuple(runs), kernels=4 * further, elements=6 * further * math.prod(weight))


@declares(_declared)
def collective_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    shard: Shard,
    shapes: Sequence[Shape | None],
) -> torch.Tensor:
    """A linear layer whose rows are gathered (gather), or summed and scattered (scatter), in
    steps."""
    whole = shapes[0]
    assert whole is not None
    outer = [(g.size, g.index) for g in map(find_group, shard["b1"][3])] if "b1" in shard else []
    groups = {name: shard[name][3][0] for name in ("gather", "scatter") if name in shard}
    rows = {n: _Rows(_lengths(whole[_ROWS], outer, find_group(g).size), g)
            for n, g in groups.items()}  # fmt: skip
    if "scatter" not in rows:
        return _GatheredLinear.apply(x, weight, bias, rows["gather"])
    if "gather" in rows:
        dim = x.ndim + _ROWS
        x = steps.all_gather_vary(x, dim, sum(rows["gather"].lengths), groups["gather"])
    return _ScatteredLinear.apply(x, weight, bias, rows["scatter"])
