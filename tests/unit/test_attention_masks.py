"""Masks that positions decide become arguments of attention; whatever is not proved stays."""

import functools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from autopar import ColoTracer
from autopar.ir.graph import bound_arguments
from autopar.tracer.masks import Masks
from autopar.tracer.positions import Positions
from tests.captures import Holder, captured

SEEDS = 12

torch.manual_seed(0)
N = 9
X = torch.randn(2, 3, N, 4, dtype=torch.float64)
PADDING = torch.tensor([[1] * N, [1] * 6 + [0] * 3])
IDS = torch.tensor([[0] * 4 + [1] * 5, [0] * 2 + [1] * 3 + [2] * 4])
INF = math.inf
SMALLEST = torch.finfo(torch.float64).min


def attention(make, keys=N, **options):
    """Attention whose mask is a function of more inputs."""

    def function(m, x, *more):
        q, k = m.linear(x), m.linear(x[..., :keys, :]).sin()
        return F.scaled_dot_product_attention(q, k, k.cos(), make(*more), **options)

    return function


def call(graph):
    (node,) = [n for n in graph.nodes if "_attention" in str(n.target)]
    arguments = bound_arguments(node)
    for name in ("query", "key", "value", "dropout_p"):
        arguments.pop(name, None)
    kind = str(node.target).split(".")[1]
    if kind == "banded_attention":
        mask = arguments.get("key_mask")
        return "band", arguments["before"], arguments["after"], mask is not None
    mask = arguments.get("attn_mask")
    shape = None if mask is None else tuple(mask.meta["val"].shape)
    return ("causal" if arguments.get("is_causal") else "all"), shape


def check(model, graph, *args):
    """Value and gradients equal eager's."""
    results = [run(*args) for run in (graph.bind(model), model)]
    torch.testing.assert_close(*results, rtol=0, atol=1e-13)
    gradients = [torch.autograd.grad(r.sin().sum(), list(model.parameters())) for r in results]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def additive(mask, hidden=-INF):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)


def index():
    return torch.arange(N)[:, None], torch.arange(N)[None]


def causal():
    q, k = index()
    return k <= q


def window(before, after=0):
    q, k = index()
    return (k >= q - before) & (k <= q + after)


def transformers_window(before):
    """As transformers writes it: functions and-ed from ones, dims of heads and batch."""
    q = (torch.arange(N) + 0)[None, None, :, None]
    k = (torch.arange(N) + 0)[None, None, None]
    return (q.new_ones((), dtype=torch.bool) & (k > q - before - 1) & (k <= q)).expand(2, -1, N, N)


CAUSAL = "causal", None
WRITTEN = {
    "comparison": (causal, CAUSAL),
    "tril": (lambda: torch.ones(N, N, dtype=torch.bool).tril(), CAUSAL),
    "tril of integers": (lambda: torch.tril(torch.ones(N, N)) == 1, CAUSAL),
    "not triu": (lambda: ~torch.ones(N, N, dtype=torch.bool).triu(1), CAUSAL),
    "full triu": (lambda: torch.full((N, N), -INF, dtype=torch.float64).triu(1), CAUSAL),
    "smallest": (lambda: torch.full((N, N), SMALLEST, dtype=torch.float64).triu(1), CAUSAL),
    "where": (lambda: torch.where(causal(), 0.0, -INF).double(), CAUSAL),
    "filled": (lambda: additive(causal()), CAUSAL),
    "multiplied": (lambda: (~causal()).double() * SMALLEST, CAUSAL),
    "sum": (lambda: additive(causal()) + additive(window(N)), CAUSAL),
    "expanded": (lambda: causal()[None, None].expand(2, 3, N, N), CAUSAL),
    "slice of a larger one": (
        lambda: torch.ones(20, 20, dtype=torch.bool).tril()[None, None, :N, :N], CAUSAL
    ),
    "wide window": (lambda: window(N - 1), CAUSAL),
    "everything": (lambda: window(N - 1, N - 1), ("all", None)),
    "nothing added": (lambda: torch.zeros(N, N, dtype=torch.float64), ("all", None)),
    "window": (lambda: window(2), ("band", 2, 0, False)),
    "window of transformers": (lambda: transformers_window(3), ("band", 3, 0, False)),
    "symmetric window": (lambda: window(2, 3), ("band", 2, 3, False)),
    "distance": (lambda: (index()[0] - index()[1]).abs() < 3, ("band", 2, 2, False)),
    "not far": (lambda: ~((index()[1] - index()[0]).abs() > 2), ("band", 2, 2, False)),
    "tril and triu": (
        lambda: torch.ones(N, N, dtype=torch.bool).tril(1).triu(-2), ("band", 2, 1, False)
    ),
    "added window": (
        lambda: additive(causal()) + additive(window(4, 8)), ("band", 4, 0, False)
    ),
    "slice of a causal one": (
        lambda: torch.ones(20, 20, dtype=torch.bool).tril()[3 : N + 3, :N], ("band", None, 3, False)
    ),
    "transposed": (lambda: causal().T, ("band", 0, None, False)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRITTEN))
def test_masks_of_positions_are_named(name):
    make, expected = WRITTEN[name]
    model, graph = captured(attention(make, scale=0.3), X)
    assert call(graph) == expected
    assert not any("arange" in str(n.target) for n in graph.nodes)
    check(model, graph, X)


KEYS = {
    "causal": (lambda p: causal() & p.bool()[:, None, None], ("band", None, 0, True)),
    "window": (lambda p: window(2) & p.bool()[:, None, None], ("band", 2, 0, True)),
    "hidden by -inf": (
        lambda p: additive(causal()).masked_fill(~p.bool()[:, None, None], -INF),
        ("band", None, 0, True),
    ),
    "two masks": (
        lambda p: (
            causal() & p.bool()[:, None, None]
            & (p + 1).bool()[:, None, None].expand(2, 3, N, N)
        ),
        ("band", None, 0, True),
    ),
    "padding alone": (
        lambda p: p.bool()[:, None, None].expand(2, 1, N, N) & window(N, N), ("all", (2, 1, 1, N))
    ),
    "padding by an index": (
        lambda p: causal() & p.bool()[torch.arange(2)[:, None, None, None], torch.arange(N)],
        ("band", None, 0, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(KEYS))
@pytest.mark.parametrize("first", [0, 1])
def test_masks_of_keys_stay_beside_a_band(name, first):
    """Also where the first queries see no key, whose result is 0."""
    make, expected = KEYS[name]
    padding = PADDING.clone()
    padding[:, :first] = 0
    model, graph = captured(attention(make), X, PADDING)
    assert call(graph) == expected
    check(model, graph, X, padding)


UNPROVED = {
    "rows of an input": (lambda p: causal() & (p >= 0)[:, None, :, None], (2, 1, N, N)),
    "documents": (lambda p: causal() & (p[:, :, None] == p[:, None])[:, None], (2, 1, N, N)),
    "inverse": (lambda p: ~causal(), (N, N)),
    "hidden by a number": (lambda p: additive(causal(), -1e9), (N, N)),
    "a bias": (lambda p: additive(causal()) + index()[0] * 0.1, (N, N)),
    "stripes": (lambda p: (index()[0] - index()[1]) % 2 == 0, (N, N)),
    "chunks": (lambda p: causal() & (index()[0] // 4 == index()[1] // 4), (N, N)),
    "smallest beside padding": (
        lambda p: additive(causal(), SMALLEST).masked_fill(p[:, None, None] == 0, SMALLEST),
        (2, 1, N, N),
    ),
    "smallest twice": (lambda p: additive(causal(), SMALLEST) * 2, (N, N)),
    "no key for the last": (lambda p: window(-1, 3), (N, N)),
    "either": (lambda p: causal() | (p > 0)[:, None, None], (2, 1, N, N)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(UNPROVED))
def test_other_masks_stay(name):
    make, shape = UNPROVED[name]
    model, graph = captured(attention(make), X, IDS)
    assert call(graph) in (("all", shape), CAUSAL if name == "smallest twice" else None)
    check(model, graph, X, IDS)


def test_causal_masks_are_aligned_at_the_first_query_and_key():
    """Fewer keys than queries; the last ones' mask is a band."""
    q, k = torch.arange(N)[:, None], torch.arange(5)
    del q
    for shift, expected in ((0, CAUSAL), (-4, "stays"), (3, ("band", None, 3, False))):
        model, graph = captured(
            attention(lambda s=shift: torch.arange(5) <= torch.arange(N)[:, None] + s, keys=5), X
        )
        assert call(graph) == (("all", (N, 5)) if expected == "stays" else expected)
        check(model, graph, X)
    del k


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("bias", "queries", "expected"),
    [
        (causal_upper_left, 5, ("causal", None)),
        (causal_lower_right, N, ("causal", None)),
        (causal_lower_right, 5, ("band", None, 4, False)),
    ],
)
def test_causal_biases_are_masks(bias, queries, expected, held):
    """Made in the forward, or held by the model. Torch's kernels for them only run forward."""

    def attend(m, x, mask):
        q, k = m.linear(x[..., :queries, :]), m.linear(x).sin()
        return F.scaled_dot_product_attention(q, k, k.cos(), mask)

    def function(m, x):
        return attend(m, x, m.mask if held else bias(queries, N))

    torch.manual_seed(0)
    model = Holder(function).double()
    model.mask = bias(queries, N)
    graph = ColoTracer().trace(model, (X,))
    assert call(graph) == expected
    diagonal = N - queries if bias is causal_lower_right else 0
    seen = torch.ones(queries, N, dtype=torch.bool).tril(diagonal)
    actual, wanted = graph.bind(model)(X), attend(model, X, seen)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-13)
    weights = list(model.parameters())
    pairs = [torch.autograd.grad(result.sin().sum(), weights) for result in (actual, wanted)]
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-12)


def test_dropout_keeps_a_band_as_a_mask():
    _, graph = captured(attention(lambda: window(2), dropout_p=0.5), X)
    assert call(graph) == ("all", (N, N))
    _, graph = captured(attention(causal, dropout_p=0.5), X)
    assert call(graph) == CAUSAL
    (node,) = [n for n in graph.nodes if "_attention" in str(n.target)]
    assert bound_arguments(node)["dropout_p"] == 0.5


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_surroundings_change_nothing(device):
    """An autocast that a region leaves, and a default device."""

    def function(m, x):
        with torch.autocast("cpu", enabled=False):
            q = m.linear(x.double())
            place = torch.arange(N, device="cpu")
            mask = (place <= place[:, None]) & (place > place[:, None] - 3)
            return F.scaled_dot_product_attention(q, q, q, mask)

    with torch.autocast("cpu", torch.bfloat16), torch.device(device):
        torch.manual_seed(0)
        model = Holder(function).to_empty(device="cpu").double()
        graph = ColoTracer().trace(model, (X,))
    assert call(graph) == ("band", 2, 0, False)
    (node,) = [n for n in graph.nodes if "_attention" in str(n.target)]
    assert node.meta["val"].dtype == torch.float64


# -- what is known of a mask is its value ----------------------------------------------------------


class Evaluated(torch.fx.Interpreter):
    """Compares what is known of every node with its value."""

    def __init__(self, gm):
        super().__init__(gm)
        self.masks, self.values, self.levels = Masks(), {}, set()

    def run_node(self, n):
        actual = self.values[n] = super().run_node(n)
        known = self.masks.of(n)
        if known is None or actual.ndim == 0:
            return actual
        grid = torch.meshgrid(*map(torch.arange, actual.shape), indexing="ij")
        if isinstance(known, Positions):
            total = torch.full(actual.shape, known.constant)
            for dim, vector in known.vectors.items():
                total = total + vector[grid[dim]]
            assert torch.equal(total, actual), n.format_node()
            return actual
        shows = torch.full(actual.shape, not known.where.never)
        for w in known.where.within:
            low, high = -99 if w.low is None else w.low, 99 if w.high is None else w.high
            ahead = grid[w.second] - grid[w.first]
            shows &= (low <= ahead) & (ahead <= high)
        for given in known.where.given:
            value = self.values[given.node]
            index = {d: grid[i] for i, d in enumerate(given.dims) if d is not None}
            shows &= value[tuple(index.get(d, torch.tensor(0)) for d in range(value.ndim))]
        assert known.inside.dtype == known.outside.dtype == actual.dtype
        assert torch.equal(torch.where(shows, known.inside, known.outside), actual), n.format_node()
        if len(known.where.within) and not known.where.given:
            self.levels.add(n)
        return actual


def drawn(draw, depth):
    """A random mask of [1, 6, 8]."""
    q, k = torch.arange(6)[:, None], torch.arange(8)
    shift = draw.randint(-4, 4)
    if depth == 0:
        compare = draw.choice([torch.le, torch.lt, torch.gt, torch.ge])
        a, b = draw.choice([(q, k), (k, q), (2 * q - 1, 2 * k), (-k, -q), (k - q, -1 * q + q)])
        return draw.choice([compare(a, b + shift), compare(a + shift, b)])[None]
    a, b = (drawn(draw, depth - 1 if draw.random() < 0.8 else 0) for _ in range(2))
    return draw.choice([
        lambda: a & b, lambda: ~(~a | ~b), lambda: a.tril(shift), lambda: a.triu(shift),
        lambda: torch.where(a, b, False), lambda: a.logical_and(b) & True,
        lambda: a.double() * b.double() != 0, lambda: (a.int() + b.int()) > 1,
        lambda: (2 - a.double()) * -3 < -4, lambda: torch.zeros(6, 8).masked_fill(a, -INF) == 0,
        lambda: (torch.zeros(6, 8).masked_fill(~a, 2) + torch.ones(6, 8).tril(shift)) == 1,
        lambda: torch.minimum(a.int(), b.int())[:, 0:6].bool(),
        lambda: torch.ones(1, 9, 14).triu(shift)[..., 2:8, 3:11] > 0,
        lambda: (b[:, 1:4] | False)[:, :1].squeeze() & a, lambda: a.float() - b.float() > 0,
        lambda: a.transpose(-1, -2).reshape(1, 8, 6).mT, lambda: a.masked_fill(~b, False),
        lambda: torch.cat([a, b], -1)[..., :8], lambda: a | b, lambda: a == b,
        lambda: a.unsqueeze(0).expand(2, 1, 6, 8)[:1].squeeze(0),
        lambda: F.pad(a, (0, 0, 0, 0))[:, :, :].clone(), lambda: a.logical_not() == False,  # noqa: E712
    ])()  # fmt: skip


def masked(seed, one):
    return drawn(random.Random(seed), 3) & one


def test_what_is_known_of_random_masks_is_their_value():
    bands = 0
    for seed in range(SEEDS):
        mask = functools.partial(masked, seed)
        program = make_fx(mask, tracing_mode="fake", pre_dispatch=True)(torch.tensor(True))
        evaluated = Evaluated(program)
        evaluated.run(torch.tensor(True))
        bands += len(evaluated.levels)
    assert bands > 3 * SEEDS
