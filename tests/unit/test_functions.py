"""Custom autograd functions, checkpoints, functions of the host and operators with bodies."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopar import ColoTracer, auto_engine
from autopar.errors import CaptureError, EngineError
from autopar.ir.aliasing import overwritable
from tests.captures import ROWS, Layers, trains_as_eager
from tests.custom_functions import NoneForTheWeight, Scale


class TwoResults(torch.autograd.Function):
    """The second result carries no gradient, which `setup_context` says."""

    @staticmethod
    def forward(x):
        return x * 2, x * 3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        return grad * 2


class NoneForAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return None


def asks_for_a_gradient(m, x):
    y, z = Scale.apply(x, m.weight), Scale.apply(x, x)
    loss = m.a(x).square().mean()
    return loss + (y.square().mean() if y.requires_grad and not z.requires_grad else 0)


def asks_which_carries(m, x):
    y, z = TwoResults.apply(m.a(x))
    return y.square().mean() * (2 if y.requires_grad else 3) * (5 if z.requires_grad else 7)


def asks_under_no_grad(m, x):
    with torch.no_grad():
        y = Scale.apply(m.a(x), m.weight)
    return m.b(x).square().mean() * (2 if y.requires_grad else 3)


def no_gradient_for_the_weight(m, x):
    return NoneForTheWeight.apply(torch.tanh(m.a(x)), m.a.weight).square().mean()


def no_gradient_for_its_only_use(m, x):
    return NoneForTheWeight.apply(torch.tanh(m.a(x)), m.weight).square().mean()


def no_gradient_at_all(m, x):
    return (NoneForAll.apply(m.a(x)) + m.b(x)).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        asks_for_a_gradient, asks_which_carries, asks_under_no_grad, no_gradient_for_the_weight,
        no_gradient_for_its_only_use, no_gradient_at_all,
    ],
)  # fmt: skip
def test_custom_functions(function, engine):
    trains_as_eager(function, engine=engine)


def middle(m, x):
    return m.b(checkpoint(m.a, m.b(x), use_reentrant=True)).square().mean()


def without_a_graded_input(m, x):
    return (checkpoint(m.a, x, use_reentrant=True) + m.b(x)).square().mean()


def several_results(m, x):
    def region(h, factor):
        return m.a(h) * factor, h

    y, z = checkpoint(region, m.b(x), 2, use_reentrant=True, preserve_rng_state=False)
    return (y * z).square().mean()


def nested(m, x):
    def region(h):
        return checkpoint(m.a, torch.tanh(m.b(h)), use_reentrant=True)

    return checkpoint(region, m.b(x), use_reentrant=True).square().mean()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("function", [middle, without_a_graded_input, several_results, nested])
def test_reentrant_checkpoints(function, engine):
    trains_as_eager(function, engine=engine)


def linear_sum_assignment(cost):
    """Stands for scipy's, which works on arrays."""
    cost = np.asarray(cost)
    return np.arange(cost.shape[0]), cost.argmin(1)


def matched(m, x):
    rows, columns = linear_sum_assignment(m.a(x).detach())
    return (m.b(x)[torch.as_tensor(rows), torch.as_tensor(columns)]).square().mean()


@pytest.mark.parametrize("engine", [False, True])
def test_a_function_of_the_host_is_called_at_each_step(engine):
    trains_as_eager(matched, engine=engine)


def numpy_mask(shape):
    return np.random.rand(*shape) < 0.5


def masked(m, x):
    return (m.a(x) * torch.tensor(numpy_mask(tuple(x.shape)))).sum()


def test_an_engine_draws_by_numpy_anew_at_each_step():
    model = Layers(masked).double()
    run, _ = auto_engine(model, torch.optim.SGD(model.parameters(), 0.1), "1")
    assert len({run(ROWS).item() for _ in range(4)}) == 4


def by_inputs(m, x):
    return torch.cond(x.abs().sum() > 0, torch.tanh, torch.sigmoid, (m.a(x),)).square().mean()


def by_inputs_with_modules(m, x):
    return torch.cond(x.abs().sum() > 0, lambda h: m.a(h), lambda h: m.b(h), (x,)).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("function", [by_inputs, by_inputs_with_modules])
def test_conditions_that_inputs_decide(function, engine):
    trains_as_eager(function, engine=engine)


def by_activations(m, x):
    return torch.cond(m.a(x).sum() > 0, torch.tanh, torch.sigmoid, (m.a(x),)).square().mean()


def mapped(m, x):
    from torch._higher_order_ops.map import map

    return map(lambda r: r * 2, m.a(x)).square().mean()


def arange_of_activations(m, x):
    h = m.a(x)
    return (h.sum() * torch.arange((h > 0).sum())).mean()


def zeros_of_activations(m, x):
    h = m.a(x)
    return h.mean() + torch.zeros((h > 0).sum(1).max()).sum()


def packed(m, x):
    lengths = torch.tensor([2, 1])
    p = nn.utils.rnn.pack_padded_sequence(m.a(x).reshape(2, 2, 8), lengths, batch_first=True)
    return p.data.sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (by_activations, r"depends on activations"),
        (mapped, r"takes functions.*torch\.vmap"),
        (arange_of_activations, r"depends on activations"),
        (zeros_of_activations, r"depends on activations"),
        (packed, r"packed sequences.*Pass the padded batch and the lengths"),
    ],
)
def test_what_has_no_plain_graph_is_refused_by_line(function, message):
    with pytest.raises(CaptureError, match=rf"(?s)\.py:\d+.*{message}"):
        ColoTracer().trace(Layers(function).double(), (ROWS,))


def number_of_activations(m, x):
    h = m.a(x)
    scale = h.abs().max().item()
    return (h / (scale + 1e-3)).square().mean()


def torch_assertion(m, x):
    h = m.a(x)
    torch._assert(h.abs().max() < 1e6, "too large")
    return h.square().mean()


def distributions(m, x):
    normal = torch.distributions.Normal(m.a(x), F.softplus(m.b(x)))
    return -normal.log_prob(x).mean()


def empty_first(m, x):
    kept = torch.tensor([])
    for row in m.a(x):
        kept = torch.cat([kept, row[None]])
    return kept.square().mean()


def empty_of_another_dtype(m, x):
    empty = torch.tensor([], dtype=torch.float64)
    return torch.cat([m.a(x).float(), empty], -2).square().mean()


def no_columns(m, x):
    return torch.cat([x[:, :0], m.a(x), x.new_zeros(4, 0)], 1).square().mean()


def ctc(m, x):
    frames = m.a(x)[:, None] * torch.arange(1, 10, dtype=x.dtype)[:, None]
    scores = F.log_softmax(frames, -1).transpose(0, 1)
    targets = torch.tensor([[1, 2, 3]] * 4)
    return F.ctc_loss(scores, targets, torch.full((4,), 9), torch.full((4,), 3))


def ctc_of_concatenated_targets(m, x):
    frames = m.a(x)[:, None] * torch.arange(1, 10, dtype=x.dtype)[:, None]
    scores = F.log_softmax(frames, -1).transpose(0, 1)
    targets = torch.tensor([1, 2, 3, 1, 2, 4, 5])
    return F.ctc_loss(scores, targets, (9, 9, 9, 9), (3, 2, 1, 1), reduction="sum")


def folded(m, x):
    return F.fold(m.a(x)[None, :4, :4].transpose(1, 2), (3, 3), 2).square().mean()


OTHERS = [
    number_of_activations, torch_assertion, distributions, empty_first, empty_of_another_dtype,
    no_columns, ctc, ctc_of_concatenated_targets, folded,
]  # fmt: skip


@pytest.mark.parametrize("function", OTHERS)
def test_other_operators_are_captured(function):
    trains_as_eager(function, engine=False, steps=1)


# of `distributions`, guards on the inputs' values would make a program for each batch
@pytest.mark.parametrize("function", [f for f in OTHERS if f is not distributions])
def test_other_operators_run_in_the_engine(function):
    trains_as_eager(function, engine=True, steps=1)


def embedding(m):
    m.table = nn.Embedding(20, 8, sparse=True).double()


def bag(m):
    m.table = nn.EmbeddingBag(20, 8, sparse=True).double()


def looked_up(m, x):
    return m.a(m.table(x.argsort(1))).square().mean()


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("setup", [embedding, bag])
def test_sparse_gradients_become_dense_and_a_guard_says_so(setup, engine):
    graph = trains_as_eager(looked_up, setup, engine=engine)
    assert engine or [g.text for g in graph.guards] == ["sparse gradients"]


def test_an_optimizer_of_sparse_gradients_is_refused():
    model = nn.Embedding(20, 8, sparse=True)
    with pytest.raises(EngineError, match=r"SparseAdam takes sparse gradients.*Adagrad"):
        auto_engine(model, torch.optim.SparseAdam(model.parameters()), "1")


def test_an_optimizer_around_another_one_is_refused_and_wraps_an_engines():
    """Lookahead of timm has no hooks, and its state is that of the one that it wraps."""
    lookahead = pytest.importorskip("timm.optim.lookahead").Lookahead
    torch.manual_seed(0)
    alone = nn.Linear(8, 4).double()
    model = copy.deepcopy(alone)
    with pytest.raises(EngineError, match=r"Lookahead does not call .*wrap what comes back"):
        auto_engine(model, lookahead(torch.optim.Adam(model.parameters())), "1")
    model, optimizer = auto_engine(
        model, torch.optim.Adam(model.parameters()), "1", progress=False
    )  # fmt: skip
    around = lookahead(optimizer, k=2)
    beside = lookahead(torch.optim.Adam(alone.parameters()), k=2)
    for step in range(4):
        x = torch.randn(6, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for each, o in ((model, around), (alone, beside)):
            each(x).square().mean().backward()
            o.step()
            o.zero_grad()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    assert max((p.full_tensor() - q).abs().max().item() for p, q in pairs) < 1e-12


def test_a_softmax_is_not_written_over_values_with_gaps():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4).t()
    op = torch.ops.aten._softmax.default
    softmax = graph.call_function(op, (x, -1, False))
    softmax.meta["val"] = torch.empty(3, 4).t()
    assert overwritable(softmax) == []
    x.meta["val"] = softmax.meta["val"] = torch.empty(4, 3)
    assert overwritable(softmax) == [x]
