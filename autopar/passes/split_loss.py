"""A loss in slices, the backward of each right after its forward: logits are never whole.

Whoever calls the model calls `backward()` later, when the logits of all slices would have to be
there, or to be computed again. Gradients are linear in what `backward()` brings: they are computed
for 1, slice by slice, and multiplied by it. This is the fused linear cross-entropy of Liger
(arXiv:2410.10989), for whatever a region with one scalar result computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from autopar.operators.scaled_gradient import scaled_gradient


@dataclass(frozen=True)
class Taken:
    """What the graph of a slice takes.

    Args:
        number: of an argument.
        dim: that it is cut along; None if every slice takes the whole.
        lengths: of the slices along it.
    """

    number: int
    dim: int | None = None
    lengths: tuple[int, ...] = ()


def scale_copies(gm: fx.GraphModule) -> fx.GraphModule:
    """Scale gradients that were computed ahead as copies, where memory is not ours to reuse."""
    for node in gm.graph.find_nodes(op="call_function", target=scaled_gradient):
        node.target = torch.ops.aten.mul.Tensor
    return gm


class SplitLoss(torch.nn.Module):
    """Computes a scalar as the sum of what slices give.

    Args:
        parts: graph of each slice, which returns its term.
        taken: by argument of these graphs.
    """

    def __init__(self, parts: Sequence[fx.GraphModule], taken: Sequence[Taken]) -> None:
        super().__init__()
        self.parts, self.taken = torch.nn.ModuleList(parts), tuple(taken)
        output: Any = parts[0].graph.output_node().args[0]
        self.dtype: torch.dtype = output[0].meta["val"].dtype

    def forward(self, *flat: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
            loss: torch.Tensor = _AtOnce.apply(self, *flat)
            return loss
        total: torch.Tensor | None = None
        for part, given in zip(self.parts, self.slices(flat), strict=True):
            total = _added(total, part(*given)[0])
        assert total is not None
        return total.to(self.dtype)

    def slices(self, flat: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, ...]]:
        """What each slice takes."""
        columns = (
            [flat[t.number]] * len(self.parts) if t.dim is None
            else flat[t.number].split(list(t.lengths), t.dim)
            for t in self.taken
        )  # fmt: skip
        return list(zip(*columns, strict=True))


def _added(total: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """A sum over slices, in float32 if they are of 2 bytes."""
    if x.dtype.itemsize == 2:
        x = x.float()
    return x if total is None else total + x


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: SplitLoss, *flat: torch.Tensor) -> torch.Tensor:
        needed = ctx.needs_input_grad[1:]
        wanted = [k for k, t in enumerate(module.taken) if needed[t.number]]
        sums: dict[int, torch.Tensor] = {}  # gradients of whole arguments
        parts: dict[int, list[torch.Tensor]] = {k: [] for k in wanted}  # of slices of others
        total: torch.Tensor | None = None
        for part, given in zip(module.parts, module.slices(flat), strict=True):
            with torch.enable_grad():
                leaves = [x.detach() for x in given]
                for k in wanted:
                    leaves[k].requires_grad_()
                term = part(*leaves)[0]
                grads = torch.autograd.grad(term, [leaves[k] for k in wanted], allow_unused=True)
            total = _added(total, term.detach())
            for k, g in zip(wanted, grads, strict=True):
                taken = module.taken[k]
                if taken.dim is not None:
                    parts[k].append(torch.zeros_like(leaves[k]) if g is None else g)
                elif g is not None:
                    sums[taken.number] = _added(sums.get(taken.number), g)
        for k, own in parts.items():
            if own:
                joined = torch.cat(own, module.taken[k].dim)  # type: ignore[arg-type]
                number = module.taken[k].number
                sums[number] = sums[number] + joined if number in sums else joined
        ctx.dtypes = {k: flat[k].dtype for k in sums}
        ctx.count = len(flat)
        ctx.save_for_backward(*sums.values())
        assert total is not None
        return total.to(module.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        pairs = zip(ctx.dtypes.items(), ctx.saved_tensors, strict=True)
        grads = {k: scaled_gradient(g, grad).to(dtype) for (k, dtype), g in pairs}
        return None, *(grads.get(k) for k in range(ctx.count))
