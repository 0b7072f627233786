"""What programs of steps call besides operators: parts of norms, and messages of many values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from autopar.optim.layout import Box, Coords, Layout, common, coordinates


def square_sum(
    x: torch.Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype
) -> torch.Tensor:
    """This rank's part of the sum of squares over dims."""
    wide = None if dtype == x.dtype else dtype
    return torch.linalg.vector_norm(x, 2, dim, keepdim, dtype=wide).square_()


def root_of_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The norm whose square is given."""
    return x.sqrt().to(dtype)


def square_sums(xs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """This rank's parts of the sums of squares of several tensors of one type."""
    half = xs[0].dtype in (torch.bfloat16, torch.float16)
    norms = torch._foreach_norm(list(xs), 2, torch.float32 if half else None)
    return torch.stack(norms).square_().unbind()


def roots_of_sums(xs: Sequence[torch.Tensor], dtype: torch.dtype) -> Sequence[torch.Tensor]:
    """The norms whose squares are given."""
    return torch.stack(list(xs)).sqrt_().to(dtype).unbind()


def plain_sum(
    x: torch.Tensor, dim: Sequence[int], keepdim: bool, dtype: torch.dtype
) -> torch.Tensor:
    """This rank's part of the sum over dims."""
    return x.sum(tuple(dim), keepdim, dtype=dtype)


def mean_of_sum(x: torch.Tensor, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The mean of `count` elements whose sum is given."""
    return (x / count).to(dtype)


def narrowed(x: torch.Tensor, box: Box) -> torch.Tensor:
    """A part of a tensor; a view.

    Args:
        box: per dim the start in x and the length.
    """
    for dim, (start, length) in enumerate(box):
        if start or length != x.shape[dim]:
            x = x.narrow(dim, start, length)
    return x


def relative(part: Box, of: Box) -> Box:
    """Where a part lies in another one that has it."""
    return tuple(
        (start - other, length) for (start, length), (other, _) in zip(part, of, strict=True)
    )


class SumOverRanks(torch.nn.Module):
    """Sums of parts of several values over all ranks, in one all-reduce.

    Args:
        shapes: of the values, as wholes.
        boxes: where this rank's parts lie in them; None if a part does not count here, because
            another rank has the same one.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], boxes: Sequence[Box | None], dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self._shapes, self._boxes = list(shapes), list(boxes)
        self._sizes = [math.prod(shape) for shape in shapes]
        self._dtype, self._device = dtype, device
        self._of_numbers = not any(shapes) and None not in boxes

    def forward(self, *parts: torch.Tensor | None) -> list[torch.Tensor]:
        if self._of_numbers:
            row = torch.stack(parts)  # type: ignore[arg-type]
        else:
            row = torch.zeros(sum(self._sizes), dtype=self._dtype, device=self._device)
            places = row.split(self._sizes)
            for x, place, shape, box in zip(parts, places, self._shapes, self._boxes, strict=True):
                if box is not None and x is not None:
                    narrowed(place.view(shape), box).copy_(x)
        dist.all_reduce(row)
        if self._of_numbers:
            return list(row.unbind())
        return [
            place.view(shape)
            for place, shape in zip(row.split(self._sizes), self._shapes, strict=True)
        ]


class Exchange(torch.nn.Module):
    """Conversions of several values between layouts, in one message from each rank to each.

    A rank takes what it lacks of a part from the rank that has it and is nearest on the mesh.

    Args:
        moves: per value its shape, dtype and the layouts.
        coords: of this rank.
    """

    def __init__(
        self, moves: Sequence[tuple[tuple[int, ...], torch.dtype, Layout, Layout]],
        mesh: tuple[int, ...], coords: Coords, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self._device = device
        ranks = coordinates(mesh)
        me = ranks.index(tuple(coords))
        # per other rank the value, where the piece lies here, and its bytes
        self._sent: list[list[tuple[int, Box, int]]] = [[] for _ in ranks]
        self._received: list[list[tuple[int, Box, int]]] = [[] for _ in ranks]
        self._kept: list[list[tuple[Box, Box]]] = []
        self._made: list[tuple[tuple[int, ...], torch.dtype] | None] = []
        for i, (shape, dtype, source, target) in enumerate(moves):
            held = [source.box(shape, mesh, c) for c in ranks]
            wanted = [target.box(shape, mesh, c) for c in ranks]
            mine = wanted[me]
            self._made.append(None if mine is None else (tuple(n for _, n in mine), dtype))
            kept: list[tuple[Box, Box]] = []
            for r, c in enumerate(ranks):
                for giver, piece in _pieces(c, wanted[r], source, held, ranks):
                    size = math.prod(n for _, n in piece) * dtype.itemsize
                    if giver == r:
                        if r == me:
                            here, there = held[me], wanted[me]
                            assert here is not None
                            assert there is not None
                            kept.append((relative(piece, here), relative(piece, there)))
                    elif giver == me:
                        here = held[me]
                        assert here is not None
                        self._sent[r].append((i, relative(piece, here), size))
                    elif r == me:
                        there = wanted[me]
                        assert there is not None
                        self._received[giver].append((i, relative(piece, there), size))
            self._kept.append(kept)
        self._sent_sizes = [sum(n for *_, n in items) for items in self._sent]
        self._received_sizes = [sum(n for *_, n in items) for items in self._received]

    def forward(self, *parts: torch.Tensor | None) -> list[torch.Tensor | None]:
        rows = [
            narrowed(x, box).contiguous().view(-1).view(torch.uint8)
            for items in self._sent
            for i, box, _ in items
            if (x := parts[i]) is not None
        ]
        row = torch.cat(rows) if rows else torch.empty(0, dtype=torch.uint8, device=self._device)
        arrived = torch.empty(sum(self._received_sizes), dtype=torch.uint8, device=self._device)
        dist.all_to_all_single(arrived, row, self._received_sizes, self._sent_sizes)
        made: list[torch.Tensor | None] = [
            None if m is None else torch.empty(m[0], dtype=m[1], device=self._device)
            for m in self._made
        ]
        for x, out, kept in zip(parts, made, self._kept, strict=True):
            for here, there in kept:
                assert x is not None
                assert out is not None
                narrowed(out, there).copy_(narrowed(x, here))
        start = 0
        for items in self._received:
            for i, box, size in items:
                out = made[i]
                assert out is not None
                place = narrowed(out, box)
                piece = arrived[start : start + size]
                start += size
                if piece.storage_offset() % out.dtype.itemsize:
                    piece = piece.clone()
                place.copy_(piece.view(out.dtype).view(place.shape))
        return made


def _pieces(
    taker: Coords, wanted: Box | None, source: Layout, held: Sequence[Box | None],
    ranks: Sequence[Coords],
) -> list[tuple[int, Box]]:  # fmt: skip
    """Who gives what of a part: ranks, and the pieces."""
    nearest: dict[Any, tuple[int, int, Box]] = {}
    for giver, (c, part) in enumerate(zip(ranks, held, strict=True)):
        piece = common(wanted, part)
        if piece is None:
            continue
        distance = sum(a != b for a, b in zip(c, taker, strict=True))
        if part not in nearest or distance < nearest[part][0]:
            nearest[part] = distance, giver, piece
    return [(giver, piece) for _, giver, piece in nearest.values()]
