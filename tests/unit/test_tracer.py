"""Capture: what the graph holds, and that nothing of the user's changes."""

import copy
import dataclasses
import random
import re

import numpy as np
import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from autopar.tracer.functional import make_functional
from tests.models import CASES, LanguageModel


@pytest.mark.parametrize("name", list(CASES))
def test_captured_graph_equals_eager(name):
    case = CASES[name]
    model, alone = case.build(), case.build()
    batch = case.batch(0)
    graph = ColoTracer().trace(model, (), batch)
    loss = graph.bind(model)(**batch)
    loss.backward()
    expected = alone(**batch)
    expected.backward()
    if any("token_cross_entropy" in str(n.target) for n in graph.nodes):
        assert loss.item() == pytest.approx(expected.item(), rel=1e-15)  # summed in another order
    else:
        assert loss.item() == expected.item()
    for (n, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-12), n
    for (n, b), c in zip(model.named_buffers(), alone.buffers(), strict=True):
        assert torch.allclose(b, c, atol=1e-12), n


def test_tied_weights_are_one_input():
    model = LanguageModel(layers=2)
    graph = ColoTracer().trace(model, (), CASES["gpt2"].batch(0))
    names = list(graph.parameters.values())
    assert len(names) == len(set(names)) == len(list(model.parameters()))
    assert graph.aliases == {"gpt2.lm_head.weight": "gpt2.transformer.wte.weight"}


def test_every_operator_says_where_it_came_from():
    graph = ColoTracer().trace(LanguageModel(layers=2), (), CASES["gpt2"].batch(0))
    modules = {graph.info(n).module for n in graph.compute_nodes()}
    assert {"gpt2.transformer.h.0.mlp.c_fc", "gpt2.transformer.h.1.attn"} <= modules
    assert all("modeling_gpt2.py:" in graph.info(n).source or "models.py:" in graph.info(n).source
               or "pytorch_utils.py:" in graph.info(n).source
               or "transformers" in graph.info(n).source
               for n in graph.compute_nodes())  # fmt: skip


def test_batch_statistics_are_outputs():
    graph = ColoTracer().trace(CASES["resnet"].build(), (), CASES["resnet"].batch(0))
    assert {"norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked"} <= set(
        graph.mutations
    )


def test_a_meta_model_gives_the_same_graph():
    batch = CASES["gpt2"].batch(0)
    with torch.device("meta"):
        meta = LanguageModel(layers=2)
    real = ColoTracer().trace(LanguageModel(layers=2), (), batch)
    assert ColoTracer().trace(meta, (), batch).fingerprint == real.fingerprint
    assert ColoTracer().trace(meta.eval(), (), batch).fingerprint is not None
    other = ColoTracer().trace(LanguageModel(layers=1), (), batch)
    assert other.fingerprint != real.fingerprint


def test_nothing_of_the_users_changes():
    model = CASES["resnet"].build()
    model.head.register_forward_hook(lambda *a: None)
    before = {n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    ColoTracer().trace(model, (), CASES["resnet"].batch(0))
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and after[n].equal(t) for n, (i, t) in before.items())
    assert torch.get_rng_state().equal(state)
    assert model.training
    assert len(model.head._forward_hooks) == 1
    assert all(type(t) in (nn.Parameter, torch.Tensor) for t in after.values())


class Counter(nn.Module):
    """Everything a capture could touch: buffers, hooks, a tied weight, a module in eval mode."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.down = nn.Linear(4, 4)
        self.down.weight = self.up.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.frozen = nn.Dropout(0.5).eval()
        self.log = []

    def forward(self, x, scale=None, *, options=None):
        self.calls += 1
        self.log.append(x.shape)
        h = self.down(torch.nn.functional.dropout(self.norm(self.up(x)), 0.1))
        return {"h": h if scale is None else h * scale, "frozen": self.frozen(h), "n": 3}


def test_the_users_module_and_generators_are_left_alone():
    model = Counter()
    model.up.register_forward_hook(lambda *a: None)
    model.register_full_backward_hook(lambda *a: None)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    graph = ColoTracer().trace(model, (torch.ones(3, 4),))
    assert {"calls", "norm.running_mean"} <= set(graph.mutations)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    assert modes == [m.training for m in model.modules()]
    assert state[0] == random.getstate()
    assert np.array_equal(state[1], np.random.get_state()[1])
    assert torch.equal(state[2], torch.get_rng_state())
    assert model.log == [] and "forward" not in vars(model)
    assert all(p.grad is None for p in model.parameters())


def test_inputs_and_results_of_many_kinds():
    @dataclasses.dataclass
    class Output:
        loss: torch.Tensor
        parts: tuple
        note: str = "plain"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, pair, mask=None, *, table, flag=True):
            a, b = pair
            h = self.linear(a) + (b if mask is None else b * mask)
            h = h * table["scale"] if flag else h
            return Output(h.sum(), (h, [h * 2, None]))

    model = Model().double()
    x = torch.randn(3, 4, dtype=torch.float64)
    kwargs = {"table": {"scale": torch.tensor(2.0)}, "flag": True}
    graph = ColoTracer().trace(model, ((x, x + 1), None), kwargs)
    actual, expected = (
        graph.bind(model)((x, x + 1), None, **kwargs),
        model((x, x + 1), None, **kwargs),
    )
    assert type(actual) is Output and actual.note == "plain" and actual.parts[1][1] is None
    assert torch.equal(actual.loss, expected.loss)
    assert torch.equal(actual.parts[1][0], expected.parts[1][0])


def test_recurrent_networks_and_ctc():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
            self.head = nn.Linear(12, 5)

        def forward(self, x, targets, lengths):
            logits = self.head(self.lstm(x)[0]).log_softmax(-1).transpose(0, 1)
            full = torch.full((x.shape[0],), x.shape[1])
            return torch.nn.functional.ctc_loss(logits, targets, full, lengths)

    model = Speech().double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    batch = (x, torch.tensor([[1, 2, 3], [4, 1, 0]]), torch.tensor([3, 2]))
    graph = ColoTracer().trace(model, batch)
    actual, expected = graph.bind(model)(*batch), model(*batch)
    assert abs(actual.item() - expected.item()) < 1e-12
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(actual, weights), torch.autograd.grad(expected, weights),
                    strict=True):  # fmt: skip
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert any("ctc_loss" in str(n.target) for n in graph.nodes)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.ones((3, 4)),), "is a ndarray.*torch.as_tensor"),
        ((torch.ones(3, 5),), r"float32\[3, 5\].*correct the inputs"),
        ((torch.ones(3, 4), torch.ones(7)), r"1: float32\[7\]"),
        ((), "missing a required argument: 'x'"),
    ],
)
def test_wrong_inputs_say_what_to_change(inputs, message):
    with pytest.raises(CaptureError, match=re.compile(message, re.DOTALL)):
        ColoTracer().trace(Counter(), inputs)


def test_dynamic_shapes_stay_symbolic():
    batch = CASES["gpt2"].batch(0)
    graph = ColoTracer(dynamic=True).trace(LanguageModel(), (), batch)
    assert set(graph.symbols.values()) == {"batch", "sequence"}
    logits = next(n for n in graph.nodes if "lm_head" in graph.info(n).module)
    assert any(isinstance(s, torch.SymInt) for s in logits.meta["val"].shape)
    short = {k: v[:5, :7] for k, v in batch.items()}
    model = LanguageModel()
    assert torch.equal(graph.bind(model)(**short), model(**short))
    with pytest.raises(CaptureError, match="at least 2"):
        ColoTracer(dynamic=True).trace(LanguageModel(), (), {k: v[:1] for k, v in batch.items()})


@pytest.mark.parametrize("make", [lambda: LanguageModel(layers=2), CASES["vit"].build])
def test_the_quick_way_computes_what_the_long_one_does(monkeypatch, make):
    name = "gpt2" if "LanguageModel" in str(type(make())) else "vit"
    torch.manual_seed(0)
    model = make().double()
    batch = CASES[name].batch(0)
    quick = ColoTracer().trace(model, (), batch)
    monkeypatch.setattr("autopar.tracer.tracer.make_functional", lambda program: False)
    long = ColoTracer().trace(model, (), batch)
    assert torch.equal(quick.bind(model)(**batch), long.bind(model)(**batch))
    kinds = [{str(n.target) for n in g.compute_nodes()} - {"aten.clone.default"}
             for g in (quick, long)]  # fmt: skip
    assert kinds[0] == kinds[1]


class Writing(nn.Module):
    """Writes into buffers; the second half of `ways` the quick way leaves to the long one."""

    ways = ("norms", "in place", "read before", "view", "two kinds", "statistics seen")
    quick = ways[:3]

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.norm, self.frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.plain = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("mean", torch.randn(4, 3))
        self.register_buffer("exact", torch.randn(4, 3).double())

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        if self.way == "norms":
            x = self.norm(self.frozen(self.plain(self.norm(x))))
        elif self.way == "in place":
            self.mean.mul_(0.9).add_(x.detach())
            x = x * self.mean
            self.mean = self.mean * 2
        elif self.way == "read before":
            before = self.norm.running_mean * 2
            x = self.norm(x) + before + self.norm.running_var
        elif self.way == "view":
            self.mean[0].copy_(x[0].detach())
        elif self.way == "two kinds":
            self.mean.mul_(self.exact)
        elif self.way == "statistics seen":
            seen = self.norm.running_mean.view(3)
            x = self.norm(x) + seen
        return (x * self.mean).sum(), self.norm.running_mean


@pytest.mark.parametrize("way", Writing.ways)
def test_buffers_are_written_the_quick_way_as_the_long_one(monkeypatch, way):
    torch.manual_seed(0)
    model, x = Writing(way), torch.randn(4, 3)
    taken = []
    monkeypatch.setattr(
        "autopar.tracer.tracer.make_functional",
        lambda p: taken.append(make_functional(p)) or taken[0],
    )
    quick = ColoTracer().trace(model, (x,))
    assert taken == [way in Writing.quick]
    monkeypatch.setattr("autopar.tracer.tracer.make_functional", lambda program: False)
    long = ColoTracer().trace(model, (x,))
    assert quick.fingerprint == long.fingerprint
    assert quick.mutations == long.mutations
    actual, eager = copy.deepcopy(model), copy.deepcopy(model)
    assert all(map(torch.equal, quick.bind(actual)(x), eager(x)))
    assert all(map(torch.equal, actual.buffers(), eager.buffers()))
