"""Causal attention over a split sequence by hand, for `benchmarks.sequence`.

*Context parallelism* is torch's own ring (`torch.distributed.tensor.experimental`), forward and
backward, with its balance of causal work and either of its ways to move keys. `context_parallel`
itself refuses CPUs (torch 2.13: "Operator aten._scaled_dot_product_flash_attention_for_cpu.default
does not have a sharding strategy registered"). So its functions are called with that kernel, which
also saves DTensor's dispatch. Heads that share keys travel once: torch repeats them first.

*Ulysses* exchanges the sequence for heads by `all_to_all_single` (Jacobs et al. 2023), queries,
keys and values in one message. Where there are fewer heads of keys than ranks, they are repeated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

from benchmarks.sequence_cases import Attend, whole

_ATEN = torch.ops.aten
_FORWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default


def zigzag(tokens: int, rank: int, ranks: int) -> torch.Tensor:
    """Positions of a rank's tokens, as torch's balancer gives them out."""
    parts = torch.arange(tokens).chunk(2 * ranks)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])


def contiguous(tokens: int, rank: int, ranks: int) -> torch.Tensor:
    """Positions of a rank's tokens, one behind the other."""
    return torch.arange(tokens).chunk(ranks)[rank]


def _repeated(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Keys or values as often as there are heads of queries."""
    repeats = like.shape[1] // x.shape[1]
    return x if repeats == 1 else x.repeat_interleave(repeats, 1)


def _summed(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The gradient of what `_repeated` repeats."""
    repeats = gradient.shape[1] // like.shape[1]
    return gradient if repeats == 1 else gradient.unflatten(1, (-1, repeats)).sum(2)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool) -> Any:
    return _FORWARD(q, _repeated(k, q), _repeated(v, q), 0.0, is_causal)


def _attend_backward(
    grad_out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, logsumexp: torch.Tensor, is_causal: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    dq, dk, dv = _BACKWARD(
        grad_out, query, _repeated(key, query), _repeated(value, query), out, logsumexp, 0.0,
        is_causal,
    )  # fmt: skip
    return dq, _summed(dk, key), _summed(dv, value)


class _Ring(torch.autograd.Function):
    """Torch's ring. Whether its work is balanced and how keys move is a setting of its module."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, method: Any
    ) -> torch.Tensor:
        ctx.method = torch_ring._cp_options.rotate_method = method
        group = dist.group.WORLD
        assert group is not None
        out, lse = torch_ring._templated_ring_attention(
            group, 2, _attend, q, k, v, is_causal=True
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        torch_ring._cp_options.rotate_method = ctx.method
        q, k, v, out, lse = ctx.saved_tensors
        group = dist.group.WORLD
        assert group is not None
        return *torch_ring._templated_ring_attention_backward(
            group, 2, _attend_backward, grads[0], "grad_out", q, k, v, out, lse, is_causal=True
        ), None  # fmt: skip


def ring(method: str) -> Attend:
    """Torch's ring; keys move by "alltoall" or "allgather"."""
    method = {
        "alltoall": torch_ring._RotateMethod.ALL_TO_ALL,
        "allgather": torch_ring._RotateMethod.ALL_GATHER,
    }[method]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Ring.apply(q, k, v, method)
        return out

    return attend


class _AllToAll(torch.autograd.Function):
    """Row r goes to rank r."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        grad = grads[0].contiguous()
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad)
        return out


def ulysses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of one sequence, whose parts the ranks have in order."""
    ranks = dist.get_world_size()
    _, heads, part, width = q.shape
    if k.shape[1] < ranks:
        k, v = (x.repeat_interleave(ranks // k.shape[1], 1) for x in (k, v))
    own, shared = heads // ranks, k.shape[1] // ranks
    rows = [x.view(ranks, -1, part, width) for x in (q, k, v)]
    received: torch.Tensor = _AllToAll.apply(torch.cat(rows, 1))
    # [ranks, own heads and their keys and values, part, width], to all of the sequence
    joined = received.transpose(0, 1).reshape(1, own + 2 * shared, ranks * part, width)
    a = whole(*joined.split((own, shared, shared), 1))
    back = a.view(own, ranks, part, width).transpose(0, 1).contiguous()
    out: torch.Tensor = _AllToAll.apply(back)
    return out.view(1, heads, part, width)
