"""What a rank sends for one causal attention over a split sequence, and how much it computes.

The program of each strategy runs on simulated ranks, forward and backward; queries, keys, values,
the result and their gradients are split over the sequence on both sides. Counted is what the ranks
send, and per rank the pairs of a query and a key in the attention kernels that run. A rank holds t
tokens of H heads of queries and K heads of keys of D elements, and n ranks share the sequence. By
the papers it sends, in elements

    gather   4 (n - 1) t K D             keys and values, and back their gradients
    ring     (6 n - 4) t K D             2 (n - 1) forward; backward as many, and n for gradients,
                                         which come home (Liu et al. 2023, "Ring attention")
    Ulysses  4 (n - 1) / n t (H + K) D   queries, keys, values and results, and back their gradients
                                         (Jacobs et al. 2023, "DeepSpeed Ulysses")

where Ulysses repeats keys of which there are fewer heads than ranks. Balanced causal work needs
other tokens on each rank (zigzag). Papers leave that to who loads the data. Here layouts outside of
attention stay contiguous, so gather and ring exchange halves of shards within attention: at most

    gather   4 t H D
    ring     4 t (H + K) D

in addition, less where a rank has what it wants. Rows name both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import Row
from benchmarks.sequence_cases import whole

TOKENS, HEADS, WIDTH = 1024, 8, 16
RANKS = (2, 4, 8)
SPLIT, ATTENTION = "RRS0R", "scaled_dot_product_attention"
EXACT = 1e-6  # percent

_ATEN = torch.ops.aten
_KERNELS = (
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class Attention(nn.Module):
    """Of queries, keys and values that take a gradient, as inputs of a model do not."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, heads in (("q", HEADS), ("k", keys), ("v", keys)):
            values = torch.randn(1, heads, TOKENS, WIDTH, generator=generator)
            self.register_parameter(name, nn.Parameter(values))

    def forward(self) -> torch.Tensor:
        """[1, H, T, D]."""
        return whole(self.q, self.k, self.v)


class Pairs(TorchDispatchMode):
    """Counts pairs of a query and a key, times heads, in kernels of attention.

    Attributes:
        forward, backward: of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from autopar.sharding.lowerings import attention_operators

        blocks = getattr(attention_operators, str(func).split(".")[1], None)
        if blocks is not None:
            with self:  # kernels inside count
                return blocks(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if func in _KERNELS:
            backward = func is _KERNELS[1]
            q, k = args[backward : backward + 2]
            causal = args[7] if backward else len(args) > 4 and args[4]
            queries, keys = q.shape[-2], k.shape[-2]
            assert not causal or queries == keys
            pairs = queries * (queries + 1) // 2 if causal else queries * keys
            pairs *= q.shape[0] * q.shape[1]
            self.forward += (not backward) * pairs
            self.backward += backward * pairs
        return out


@dataclass(frozen=True)
class Counted:
    """Of the ranks, in order.

    Args:
        sent_bytes: to others.
        forward, backward: pairs of a query and a key.
    """

    sent_bytes: list[float]
    forward: list[int]
    backward: list[int]


def counted(layout: str, keys: int, ranks: int) -> Counted:
    """Run one attention, forward and backward, by a strategy that a constraint names."""
    from autopar import ClusterInfo, autoplan
    from autopar.ir.spec import ShardingSpec
    from autopar.passes.apply_sharding import apply_sharding
    from autopar.planner.planner import trainable_inputs
    from autopar.runtime.distribute import shard_of
    from autopar.testing.simulated_ranks import SimulatedMesh

    model = Attention(keys)
    inputs = [*model.parameters()]
    split = ShardingSpec.parse(SPLIT)
    constraints = dict.fromkeys("qkv", f"{SPLIT} keep")
    constraints |= {ATTENTION: layout, "outputs.0": SPLIT}
    cluster = ClusterInfo.of(str(ranks), "H100")
    # without latency, conversions are those that send the fewest bytes
    cluster = replace(cluster, links=tuple(replace(link, alpha=0.0) for link in cluster.links))
    planned = autoplan(model, cluster=cluster, constraints=constraints)
    expected = model()
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    wanted = (expected, *torch.autograd.grad(expected, inputs, cotangent))
    with SimulatedMesh((ranks,)) as mesh:

        def rank(coords: tuple[int, ...]) -> tuple[float, Pairs]:
            program = apply_sharding(
                planned.graph, planned.plan, coords=coords, groups=mesh.groups[coords],
                trainable=trainable_inputs(planned.graph, model), output_specs=(split,),
            )  # fmt: skip
            own, grad = (
                [shard_of(x.detach(), split, (ranks,), coords).contiguous() for x in tensors]
                for tensors in (inputs, [cotangent])
            )
            leaves = [x.requires_grad_() for x in own]
            pairs = Pairs()
            with pairs:
                (out,) = program.gm(*leaves)
                grads = torch.autograd.grad(out, leaves, grad)
            for x, y in zip((out, *grads), wanted, strict=True):
                torch.testing.assert_close(x, shard_of(y, split, (ranks,), coords))
            return _sent_bytes(mesh.groups[coords]), pairs

        results = [*mesh.run(rank).values()]
    return Counted(
        [sent for sent, _ in results], [p.forward for _, p in results],
        [p.backward for _, p in results],
    )  # fmt: skip


def _sent_bytes(groups: tuple[str, ...]) -> float:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return sum(_resolve_process_group(name).sent_bytes for name in groups)


def formula(strategy: str, keys: int, ranks: int) -> float:
    """Bytes that a rank sends by the papers."""
    token = 4 * WIDTH * TOKENS // ranks  # bytes of all of its tokens, of one head
    if strategy == "gather":
        return 4 * (ranks - 1) * token * keys
    if strategy == "ring":
        return (6 * ranks - 4) * token * keys
    return 4 * (ranks - 1) / ranks * token * (HEADS + max(keys, ranks))


def balancing(strategy: str, keys: int, ranks: int) -> float:
    """Bytes that the rank with most of them exchanges to balance causal work."""
    if strategy not in ("gather", "ring"):
        return 0.0
    half = 4 * WIDTH * TOKENS // ranks / 2
    away = max(
        len({2 * r, 2 * r + 1} - {r, 2 * ranks - 1 - r}) for r in range(ranks)
    )  # halves that a rank holds and another one computes with
    return 4 * away * half * (HEADS + keys * (strategy == "ring"))


def rows(*, quick: bool) -> Iterator[Row]:
    """All strategies, with as many heads of keys as of queries and with fewer; on the first number
    of ranks if quick."""
    for ranks in RANKS[:1] if quick else RANKS:
        for keys in (HEADS, 2):
            strategies = {"gather": "by q", "ring": "by ring"}
            if keys % ranks == 0:
                strategies["Ulysses"] = "RS0RR"
            if keys != HEADS:
                strategies["Ulysses within attention"] = "by exchange"
            for name, layout in strategies.items():
                yield from _rows(name, layout, keys, ranks)


def _rows(name: str, layout: str, keys: int, ranks: int) -> Iterator[Row]:
    shared = "" if keys == HEADS else f", {keys} heads of keys"
    case = f"{name}, {ranks} ranks{shared}"
    of = counted(layout, keys, ranks)
    papers, more = formula(name, keys, ranks), balancing(name, keys, ranks)
    sent = max(of.sent_bytes)
    yield Row(case, "sent by the fullest rank", sent / 2**10, "KiB")
    yield Row(case, "formula", papers / 2**10, "KiB")
    if more:
        yield Row(case, "balancing", more / 2**10, "KiB")
    yield Row(case, "sent / formula", sent / papers, "x")
    over = 100 * max(0.0, sent / (papers + more) - 1)
    yield Row(case, "more than formula and balancing", over, "%", EXACT)
    one_device = HEADS * TOKENS * (TOKENS + 1) / 2
    directions = of.forward, of.backward
    most = max(max(pairs) * ranks / sum(pairs) for pairs in directions)
    extra = 100 * (max(map(sum, directions)) / one_device - 1)
    yield Row(case, "causal work, most of a rank / mean", most, "x", 1 + 1 / ranks)
    yield Row(case, "causal work beyond that of one device", extra, "%", EXACT)
