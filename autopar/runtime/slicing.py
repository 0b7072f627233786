"""How a batch enters in slices, and how the results of slices become those of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.fx as fx

from autopar.passes.time_split import State


@dataclass(frozen=True)
class Slicing:
    """How a rank takes its slices of a batch.

    Args:
        sizes: samples per slice, on this rank if every rank passes its own.
        dims: per tensor input, the dim that holds samples; None if it is whole for every slice.
        whole: computes values from the whole batch; takes buffers, constants and inputs.
        whole_states: of these values.
        results: state of each result of the program: as of a value that is split over time, or
            "M" for a mean of what the slices give, "C" for what each slice hands to the next.
        rank, ranks: of samples, where every rank passes its own; else 0 and 1.
    """

    sizes: tuple[int, ...]
    dims: tuple[int | None, ...]
    whole: fx.GraphModule | None
    whole_states: tuple[State, ...]
    results: tuple[State | None, ...]
    gather: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    rank: int = 0
    ranks: int = 1

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    def share(self, number: int) -> float:
        """Of the batch, that a slice has."""
        return self.sizes[number] / self.samples

    def slices(
        self, others: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
    ) -> list[list[torch.Tensor]]:
        """The inputs of each slice, and then its values of the whole batch.

        Args:
            others: buffers and constants.
        """
        whole: Sequence[torch.Tensor] = ()
        if self.whole is not None:
            every = inputs
            if self.gather is not None:
                every = [self.gather(k, x) for k, x in enumerate(inputs)]
            with torch.no_grad():
                whole = self.whole(*others, *every)
        starts = [0, *accumulate(self.sizes)]
        sliced = []
        for start, size in zip(starts, self.sizes, strict=False):
            own = [
                x if dim is None else x.narrow(dim, start, size)
                for x, dim in zip(inputs, self.dims, strict=True)
            ]
            own += [
                self._part(x, int(state[1:]), start, size) if state[0] == "S" else x
                for x, state in zip(whole, self.whole_states, strict=True)
            ]
            sliced.append(own)
        return sliced

    def _part(self, x: torch.Tensor, dim: int, start: int, size: int) -> torch.Tensor:
        """A slice of a value of all samples, of which each may have several rows."""
        rows = x.shape[dim] // (self.samples * self.ranks)
        start += self.rank * self.samples
        return x.narrow(dim, start * rows, size * rows)

    def combine(self, number: int, parts: Sequence[Any]) -> Any:
        """A result of the batch.

        Args:
            number: of the result.
            parts: what the slices gave.
        """
        state = self.results[number]
        if state in (None, "R"):
            return parts[0]
        if state == "C":
            return parts[-1]
        if state[0] == "S":
            return torch.cat(list(parts), int(state[1:]))
        weights = [self.share(k) if state == "M" else 1 for k in range(len(parts))]
        dtype = parts[0].dtype
        wide = torch.float32 if dtype.itemsize == 2 else dtype
        total = parts[0].to(wide) * weights[0] if state == "M" else parts[0].to(wide, copy=True)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part.to(wide), alpha=weight)
        return total.to(dtype)

    def tangents(
        self, number: int, grad: torch.Tensor | None, extents: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """The gradient of each slice's part of a result.

        Args:
            grad: of the result.
            extents: of the parts along the dim that is sliced.
        """
        state, count = self.results[number], len(self.sizes)
        if grad is None or state is None:
            return [None] * count
        if state == "P":
            return [grad] * count
        if state == "M":
            return [grad * self.share(k) for k in range(count)]
        if state == "R":
            return [grad, *[None] * (count - 1)]
        if state == "C":
            return [*[None] * (count - 1), grad]
        return list(grad.split(list(extents), int(state[1:])))


def accumulated(
    total: list[torch.Tensor | None] | None, grads: Sequence[torch.Tensor | None], count: int
) -> list[torch.Tensor | None]:
    """Sums of gradients over slices, in float32 where they are of 2 bytes.

    Args:
        total: of the slices before; None at the first.
        count: of slices before.
    """
    if total is None:
        return [_wide(g) for g in grads]
    for k, g in enumerate(grads):
        known = total[k]
        if g is None:
            continue
        if known is None:
            total[k] = _wide(g)
        elif count == 1:  # the first may share memory with what the program still needs
            total[k] = known + g
        else:
            total[k] = known.add_(g)
    return total


def _wide(g: torch.Tensor | None) -> torch.Tensor | None:
    if g is None:
        return None
    if g.dtype.itemsize == 2:
        return g.float()
    # a shard that was cut from a whole gradient would keep all of it
    return g if g.untyped_storage().nbytes() == g.nbytes else g.clone()


def extents_of(parts: Sequence[Any], state: State | None) -> list[int]:
    """Of a result's parts along the dim that is sliced."""
    if state is None or state[0] != "S":
        return []
    return [part.shape[int(state[1:])] for part in parts]
