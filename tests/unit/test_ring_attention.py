"""Attention over a split sequence: what each rank computes, and how partial results merge."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopar import ClusterInfo, autoplan
from autopar.cluster.link import Link
from autopar.comm.spans import chunks, halves, length_of, zigzag
from autopar.operators.attention_blocks import Block, attend, attend_backward, merge
from autopar.passes.local_step import local_step
from autopar.schedule.budget import plan_memory
from autopar.sharding.lowerings.attention_operators import products, segments
from autopar.sharding.lowerings.ring_attention import base_of
from benchmarks.sequence_cases import Case

SIZES = [(2, 2), (3, 2), (8, 2), (16, 4), (17, 4), (13, 3), (64, 8), (9, 8)]


def positions(spans):
    return [i for start, n in spans for i in range(start, start + n)]


@pytest.mark.parametrize(("size", "ranks"), SIZES)
def test_a_zigzag_has_every_position_once(size, ranks):
    spans = zigzag(chunks(size, ranks))
    assert sorted(i for own in spans for i in positions(own)) == list(range(size))
    assert all(own for own in spans)
    assert len(halves(chunks(size, ranks))) == 2 * ranks


def pairs(queries, keys, causal):
    """(query, key) of every product, one by one."""
    own = segments(queries, [keys]) if causal else queries
    rows, columns = positions(own), positions(keys)
    for p in products(own, keys, causal):
        for i, j in itertools.product(range(p.rows[1]), range(p.columns[1])):
            if not p.causal or j <= i:
                yield rows[p.rows[0] + i], columns[p.columns[0] + j]


@pytest.mark.parametrize(("queries", "keys"), [(8, 8), (17, 17), (12, 20), (20, 12), (5, 9)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("balanced", [True, False])
def test_every_pair_that_is_seen_is_computed_once(queries, keys, ranks, balanced):
    split = [chunks(queries, ranks), chunks(keys, ranks)]
    if balanced:
        split = [zigzag(spans) for spans in split]
    computed = [
        pair for q, k in itertools.product(*split) for pair in pairs(q, k, causal=True)
    ]  # fmt: skip
    assert sorted(computed) == [(i, j) for i in range(queries) for j in range(min(i + 1, keys))]


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("size", [64, 256, 250])
def test_no_rank_computes_much_more_than_the_mean(ranks, size):
    """A causal diagonal counts whole, as flash kernels' blocks do."""
    spans = zigzag(chunks(size, ranks))
    work = [
        sum(
            p.rows[1] * p.columns[1] / (2 if p.causal else 1)
            for k in spans
            for p in products(segments(q, spans), k, causal=True)
        )
        for q in spans
    ]
    assert max(work) <= (1 + 1 / ranks) * sum(work) / ranks
    if size % (2 * ranks) == 0:
        assert max(work) == min(work)


def test_steps_of_the_ring_are_one_product_each():
    """And as much work on every rank, so that none waits for another."""
    spans = zigzag(chunks(64, 4))
    for me, other in itertools.product(range(4), range(4)):
        (product,) = products(spans[me], spans[other], causal=True)
        shares = product.rows[1] * product.columns[1] / (2 if product.causal else 1)
        assert shares == 16 * 16 / 2


def masks():
    torch.manual_seed(0)
    allowed = torch.rand(7, 12) < 0.6
    allowed[3] = False  # a query that sees nothing
    yield None
    yield allowed
    added = torch.randn(2, 1, 7, 12, dtype=torch.float64)
    yield added.masked_fill(~allowed, float("-inf"))
    yield added.masked_fill(~allowed, torch.finfo(torch.float64).min)


@pytest.mark.parametrize("mask", list(masks()), ids=["none", "boolean", "added", "finite"])
@pytest.mark.parametrize("wide", [4, 6], ids=["flash", "written out"])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_blocks_merge_to_attention(mask, wide, key_heads):
    """Forward and backward, in float64, over three blocks of the keys."""
    torch.manual_seed(1)
    q = torch.randn(2, 4, 7, 4, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, key_heads, 12, 4, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, key_heads, 12, wide, dtype=torch.float64, requires_grad=True)
    # flash kernels give another gradient where finite numbers hide all keys of a query
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.4, enable_gqa=True)
    grad = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (q, k, v), grad)
    block = Block(causal=False, scale=0.4, base=base_of(mask))
    bias = mask
    if mask is not None and mask.dtype == torch.bool:
        bias = torch.zeros(7, 12, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    parts = [(0, 5), (5, 1), (6, 6)]

    def of(part):
        return (
            k.detach().narrow(-2, *part), v.detach().narrow(-2, *part),
            None if bias is None else bias.narrow(-1, *part),
        )  # fmt: skip

    out, lse = attend(q.detach(), *of(parts[0]), block)
    for part in parts[1:]:
        result = attend(q.detach(), *of(part), block)
        out, lse = merge((out, lse), result)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    of_q = torch.zeros_like(q)
    for part in parts:
        dq, dk, dv, _ = attend_backward(grad, q.detach(), *of(part), out, lse, block)
        of_q = of_q + dq
        torch.testing.assert_close(dk, gradients[1].narrow(-2, *part), rtol=0, atol=1e-12)
        torch.testing.assert_close(dv, gradients[2].narrow(-2, *part), rtol=0, atol=1e-12)
    torch.testing.assert_close(of_q, gradients[0], rtol=0, atol=1e-12)
    assert length_of(tuple(parts)) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_merge_in_float32(dtype):
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, 64, 8).to(dtype) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=0.4)
    results = []
    for part in range(8):
        own = (x.narrow(-2, 8 * part, 8) for x in (k, v))
        out, lse = attend(q, *own, None, Block(causal=False, scale=0.4))
        assert lse.dtype == torch.float32
        results.append((out.float(), lse))
    merged = results[0]
    for result in results[1:]:
        merged = merge(merged, result)
    # blocks are rounded as attention is, once each
    error = (merged[0] - exact).abs().max()
    assert error <= torch.finfo(dtype).eps * v.float().abs().max()


# -- cost ------------------------------------------------------------------------------------------


class Causal(torch.nn.Module):
    """Eight heads, two of keys, of 32768 tokens, in bfloat16."""

    def forward(self, x):
        q, k, v = (t.transpose(1, 2) for t in x.unflatten(-1, (12, 64)).split([8, 2, 2], 2))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.float().square().mean()


@pytest.mark.parametrize("way", ["by b1", "by q", "by ring", "by exchange"])
def test_a_rank_is_predicted_to_compute_its_share_of_attention(way):
    """In the dtype of its operands, also where partial results accumulate in float32; pairs of a
    query and a later key are not counted."""
    device, x = ClusterInfo.of("1", "H100").device, torch.empty(1, 32768, 768, dtype=torch.bfloat16)
    ranks = 2 if way == "by b1" else 4
    cluster = ClusterInfo((ranks,), device, (Link(1e-6, 1e-11),))
    planned = autoplan(
        Causal(), (), {"x": x.requires_grad_()}, cluster=cluster,
        constraints={"**.scaled_dot_product_attention": way},
    )  # fmt: skip
    program = local_step(planned.graph, planned.plan, trainable=(0,)).program
    us = sum(op.us for op in program.ops if "attention" in op.kind.partition(" ")[0])
    flops = 8 / ranks * 32768 * 32769 / 2 * 64 * 4
    rate = device.flops_curve("attention", "bfloat16").rate(flops)
    assert us == pytest.approx(1e6 * flops / rate, rel=0.15)


@pytest.mark.parametrize(
    ("keys", "way"),
    [(8, "by q"), (8, "by ring"), (2, "by exchange"), (8, "RS0RR"), (8, "RS0RR, vocabulary")],
)
def test_memory_is_estimated_before_there_is_a_program(keys, way):
    """With what an exchange, and the balancing of causal work, keep beside their results."""
    case = Case(tokens=512, width=64, heads=8, keys=keys, layers=1)
    layout, _, split = way.partition(", ")
    constraints = {"**.scaled_dot_product_attention": layout}
    if split:
        constraints["head.weight"] = "S0R"
    planned = autoplan(
        case.build(), (), case.batch(), cluster=ClusterInfo.of("4", "cpu"), constraints=constraints
    )
    step = local_step(
        planned.graph, planned.plan, trainable=planned.space.workload.trainable, choices={}
    )
    made = plan_memory(step.program, math.inf).peak_bytes
    memory = planned.plan.memory
    estimated = memory.activations_bytes + memory.transient_bytes + memory.gradients_bytes
    assert estimated == pytest.approx(made, rel=0.02)
