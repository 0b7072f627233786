"""A loss in slices, the backward of each right after its forward: logits are never whole.

Whoever calls the model calls `backward()` later, when the logits of all slices would have to be
there, or to be computed again. Gradients are linear in what `backward()` brings: they are computed
for 1, slice by slice, and multiplied by it. This is the fused linear cross-entropy of Liger
(arXiv:2410.10989) for whatever a region with one scalar result computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx


class SplitLoss(torch.nn.Module):
    """Computes a scalar as the sum of what slices give.

    Args:
        parts: graph of each slice, which returns its term.
        taken: by slice, which of the arguments its graph takes, in order.
    """

    def __init__(self, parts: Sequence[fx.GraphModule], taken: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.parts, self.taken = torch.nn.ModuleList(parts), taken

    def forward(self, *flat: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in flat):
            loss: torch.Tensor = _AtOnce.apply(self, *flat)
            return loss
        total = None
        for part, at in zip(self.parts, self.taken, strict=True):
            term = _wide(part(*(flat[k] for k in at))[0])
            total = term if total is None else total + term
        assert total is not None
        return total.to(flat_dtype(self, flat))


def flat_dtype(module: SplitLoss, flat: Sequence[torch.Tensor]) -> torch.dtype:
    """Of the result."""
    output: Any = module.parts[0].graph.output_node().args[0]  # type: ignore[union-attr, operator]
    dtype: torch.dtype = output[0].meta["val"].dtype
    return dtype


def _wide(x: torch.Tensor) -> torch.Tensor:
    """A term of a sum, in float32 if it is of 2 bytes."""
    return x.float() if x.dtype.itemsize == 2 else x


class _AtOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: SplitLoss, *flat: torch.Tensor) -> torch.Tensor:
        needed = ctx.needs_input_grad[1:]
        grads: list[torch.Tensor | None] = [None] * len(flat)
        total: torch.Tensor | None = None
        uses = Counter(k for at in module.taken for k in set(at))
        for part, at in zip(module.parts, module.taken, strict=True):
            with torch.enable_grad():
                taken = [flat[k].detach().requires_grad_(needed[k]) for k in at]
                term = part(*taken)[0]
                wanted = [(k, x) for k, x in zip(at, taken, strict=True) if needed[k]]
                given = torch.autograd.grad(term, [x for _, x in wanted], allow_unused=True)
            term = _wide(term.detach())
            total = term if total is None else total + term
            for (k, _), g in zip(wanted, given, strict=True):
                known = grads[k]
                if g is not None:
                    g = _wide(g) if uses[k] > 1 else g
                    grads[k] = g if known is None else known + g
        ctx.dtypes = [x.dtype for x in flat]
        ctx.present = [g is not None for g in grads]
        ctx.save_for_backward(*(g for g in grads if g is not None))
        assert total is not None
        return total.to(flat_dtype(module, flat))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        pairs = zip(ctx.present, ctx.dtypes, strict=True)
        grads = [(next(saved) * grad).to(dtype) if present else None for present, dtype in pairs]
        return None, *grads
