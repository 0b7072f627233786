"""Attention in a band around each query equals attention with the band as a mask."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar import autoplan
from autopar.comm.fetch import Fetch
from autopar.comm.spans import chunks
from autopar.errors import ConstraintError
from autopar.operators import banded_attention as operators
from autopar.operators.banded_attention import Band, in_band, tiles
from autopar.profiler.counting import Recorder
from tests.clusters import eager_to_shard


def masked(q, k, v, key_mask, band, scale=0.3):
    """By its definition; 0 where a query sees no key."""
    ahead = torch.arange(k.shape[-2]) - torch.arange(q.shape[-2])[:, None]
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if band.low is not None:
        seen &= ahead >= band.low
    if band.high is not None:
        seen &= ahead <= band.high
    if key_mask is not None:
        seen = seen & key_mask
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    some = seen.any(-1, keepdim=True)
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~seen & some, float("-inf"))
    return (scores.softmax(-1) * some) @ v


def operand(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def compare(q, k, v, key_mask, band):
    actual, expected = (run(q, k, v, key_mask, band, scale=0.3) for run in (in_band, masked))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, (q, k, v), cotangent) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


BOUNDS = list(itertools.product((None, -3, 0, 2), (None, -2, 0, 5)))


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_tiles_give_what_a_mask_gives(low, high, monkeypatch):
    monkeypatch.setattr(operators, "_FEWEST", 2)
    monkeypatch.setattr(operators, "_MOST", 3)
    torch.manual_seed(0)
    for queries, keys, width in ((11, 11, 4), (11, 5, 4), (4, 9, 3)):
        q, k, v = operand(2, 6, queries, 4), operand(2, 3, keys, 4), operand(2, 3, keys, width)
        mask = torch.rand(2, 1, 1, keys) < 0.5
        for key_mask in (None, mask):
            compare(q, k, v, key_mask, Band(low, high))


def test_a_causal_query_whose_keys_are_all_masked_is_zero():
    torch.manual_seed(0)
    q, k, v = (operand(1, 2, 6, 4) for _ in range(3))
    mask = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.bool).view(1, 1, 1, 6)
    compare(q, k, v, mask, Band(None, 0))
    assert not in_band(q, k, v, mask, Band(None, 0), None)[:, :, :3].any()


@pytest.mark.parametrize("dims", [2, 3])
def test_operands_of_fewer_dims(dims):
    torch.manual_seed(0)
    q, k, v = (operand(*(2, 9, 4)[3 - dims :]) for _ in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril(1).triu(-2)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    actual = torch.ops.autopar.banded_attention(q, k, v, 2, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_gradients_of_any_strides():
    torch.manual_seed(0)
    q, k, v = (operand(2, 9, 3, 4).transpose(1, 2) for _ in range(3))
    results = [run(q, k, v, None, Band(-2, 1), 0.3).sum() for run in (in_band, masked)]
    gradients = [torch.autograd.grad(r, (q, k, v)) for r in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_short_dtypes_sum_in_float32():
    torch.manual_seed(0)
    q, k, v = (operand(1, 2, 700, 8) for _ in range(3))
    band = Band(-150, 150)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        operands = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = in_band(*operands, None, band, 0.3)
        results.append([out, *torch.autograd.grad(out.double().sin().sum(), operands)])
    for exact, short in zip(*results, strict=True):
        assert short.dtype == torch.bfloat16
        torch.testing.assert_close(short.double(), exact, rtol=0, atol=0.03)


def test_work_and_memory_are_linear_in_the_length():
    totals = []
    for length in (8192, 16384):
        with FakeTensorMode():
            q = torch.empty(1, 4, length, 16, requires_grad=True)
            recorder = Recorder()
            with recorder:
                torch.ops.autopar.banded_attention(q, q, q, 511, 0).sum().backward()
            work, _ = recorder.take()
        totals.append((work.flops, max(recorder.sizes)))
        assert max(recorder.sizes) == q.numel() * 4
    assert totals[1][0] < 2.1 * totals[0][0]
    assert totals[0][0] < 0.3 * 7 * 2 * 4 * 8192**2 * 16  # of the full scores


def test_tiles_cover_the_queries_and_what_they_see():
    for low, high in BOUNDS:
        band = Band(low, high)
        parts = tiles(2500, 2300, band)
        assert [i for (start, n), _ in parts for i in range(start, start + n)] == [*range(2500)]
        for (start, n), (first, length) in parts:
            assert (first, length) == band.keys((start, n), 2300)


# -- the rows that neighbors hold ------------------------------------------------------------------


def test_ranks_fetch_what_their_windows_reach():
    held = chunks(10, 3)  # 4, 4, 2
    wanted = [(0, 4), (2, 6), (6, 4)]  # two rows before
    counts = [Fetch(held, wanted, me, "").elements(5) for me in range(3)]
    assert counts == [10, 10, 10]
    assert not Fetch(held, [(0, 4), (4, 4), (8, 2)], 0, "").moves


def test_a_rank_that_exchanges_nothing_takes_part():
    held = chunks(9, 3)
    wanted = [(6, 3), (3, 3), (0, 3)]
    assert [Fetch(held, wanted, me, "").elements(7) for me in range(3)] == [21, 1, 21]


# -- strategies by name ----------------------------------------------------------------------------

TOKENS = 16
ATTENTION = "**.scaled_dot_product_attention"


class Attention(torch.nn.Module):
    """Two layers: causal, and in a window of four."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.a, self.b = torch.nn.Linear(8, 24), torch.nn.Linear(8, 24)
        self.dropout = dropout

    def forward(self, x):
        place = torch.arange(TOKENS)
        causal = place <= place[:, None]
        window = causal & (place > place[:, None] - 4)
        for linear, mask in ((self.a, causal), (self.b, window)):
            q, k, v = linear(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(
                q, k, v, mask, self.dropout if self.training else 0.0
            )
            x = x + h.transpose(1, 2).flatten(-2)
        return x.square().mean()


def plan(constraints, model=None):
    x = torch.empty(2, TOKENS, 8)
    model = Attention() if model is None else model
    return autoplan(model, (), {"x": x}, cluster=eager_to_shard("4"), constraints=constraints)


def factors(planned):
    chosen = zip(planned.space.decisions, planned.choices, strict=True)
    return {
        str(d.node.target).split(".")[1]: {*d.candidates[i].strategy.splits}
        for d, i in chosen
        if "_attention" in str(d.node.target)
    }


def test_windows_answer_to_the_name_of_attention():
    found = factors(plan({ATTENTION: "by ring | by halo"}))
    assert found == {"scaled_dot_product_attention": {"ring"}, "banded_attention": {"halo"}}
    assert all(split == {"q"} for split in factors(plan({ATTENTION: "by q"})).values())


def test_a_ring_that_ignores_windows_is_refused():
    message = (
        r"no strategy of \S*banded_attention is 'by ring' on mesh 4. "
        r"autopar.banded_attention.default can be split by .*; "
        "a query sees the keys from 3 before it to 0 after it"
    )
    with pytest.raises(ConstraintError, match=message):
        plan({ATTENTION: "by ring"})


def test_a_ring_with_dropout_is_refused():
    message = "'by ring' on mesh 4.*; it has dropout, which is drawn where a query has all"
    with pytest.raises(ConstraintError, match=message):
        plan({ATTENTION: "by ring"}, Attention(dropout=0.1))
    model = Attention(dropout=0.1).eval()
    assert "banded_attention" in factors(plan({ATTENTION: "by ring | by halo"}, model))
