"""Repeated blocks: captured once where that changes nothing, one by one where it would."""

import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.tracer import tracer as capturing


class Drop(nn.Module):
    """Stochastic depth; `kind` says what it does with its rate."""

    def __init__(self, rate, kind):
        super().__init__()
        self.rate, self.kind = rate, kind

    def forward(self, x):
        if self.kind == "rates, one of them 0" and self.rate == 0.2:
            return x
        if self.kind == "rates that decide" and self.rate > 0.25:
            x = x + 1
        if self.kind == "rates without gradients":
            with torch.no_grad():
                x = x * self.rate
        return x * x.new_empty(x.shape[0], 1).bernoulli_(1 - self.rate).div_(1 - self.rate)


class Block(nn.Module):
    """Counts how often its Python runs; `kind` says what is special about it."""

    ran = 0

    def __init__(self, index, kind):
        super().__init__()
        self.index, self.kind, self.seen = index, kind, None
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.BatchNorm1d(8)
        if "rates" in kind:
            self.drop = Drop(0.1 * (index + 1), kind)
        if kind == "alternating":
            self.slope = 0.1 * (index % 2)

    def forward(self, x, scale=None):
        Block.ran += 1
        h = self.up(x)
        if self.kind == "numbered":
            h = h / (self.index + 1)
        elif self.kind == "alternating":
            h = nn.functional.leaky_relu(h, self.slope)
        elif self.kind == "remembering":
            self.seen = h
        elif self.kind == "dropout":
            h = nn.functional.dropout(h, 0.5)
        elif self.kind == "rates outside":
            h = nn.functional.dropout(h, self.drop.rate)
        elif "rates" in self.kind:
            h = torch.relu(self.drop(self.drop(h) * 2))
        elif self.kind == "norm":
            x = self.norm(x)
        elif self.kind == "in place":
            h.relu_()
        elif self.kind == "frozen":
            with torch.no_grad():
                x = x * h.amax()
        elif self.kind == "asking" and scale.sum() > 0:
            h = h * 2
        x = x + self.down(torch.relu(h))
        return x if scale is None else (x * scale, scale)


class Stack(nn.Module):
    def __init__(self, kind="plain", depth=5, scaled=False, tied=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(i, kind) for i in range(depth))
        self.scaled = scaled
        if tied:
            for block in self.blocks:
                block.up = self.blocks[0].up

    def forward(self, x, scale):
        for block in self.blocks:
            if self.scaled:
                x, scale = block(x, scale)
            else:
                x = block(x)
        return x.square().mean()


# how often the Python of five blocks runs: the first one's input needs no gradient
RUNS = {
    "plain": 2, "dropout": 2, "norm": 2, "in place": 2, "frozen": 2, "alternating": 3,
    "numbered": 5, "remembering": 5, "rates": 2, "rates, one of them 0": 3, "rates that decide": 3,
    "rates without gradients": 2, "rates outside": 5,
}  # fmt: skip
# where a copy is begun and then captured after all, which takes names
GIVEN_UP = ("rates, one of them 0", "rates that decide")


class _NoCopies:
    def __init__(self, *_):
        pass


def both_ways(model, monkeypatch, *batch):
    """The graph with and without copying, and how often blocks ran with it."""
    Block.ran = 0
    graph = ColoTracer().trace(model, batch)
    ran = Block.ran
    monkeypatch.setattr(capturing, "Copies", _NoCopies)
    return graph, ColoTracer().trace(model, batch), ran


def batch_of(seed=0):
    torch.manual_seed(seed)
    return torch.randn(4, 8), torch.rand(4, 1)


@pytest.mark.parametrize(("kind", "tied"), [*((kind, False) for kind in RUNS), ("plain", True)])
def test_graphs_are_those_of_capturing_each_block(kind, tied, monkeypatch):
    model = Stack(kind, tied=tied).double()
    batch = tuple(t.double() for t in batch_of())
    graph, whole, ran = both_ways(model, monkeypatch, *batch)
    assert ran == (5 if tied else RUNS[kind])  # modules of two names are left alone
    assert graph.fingerprint == whole.fingerprint
    if kind not in GIVEN_UP:
        assert [n.name for n in graph.nodes] == [n.name for n in whole.nodes]
    assert [graph.info(n) for n in graph.nodes] == [whole.info(n) for n in whole.nodes]
    run = graph.bind(model)
    torch.manual_seed(1)
    expected = model(*batch)
    torch.manual_seed(1)
    found = run(*batch)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_results_that_are_arguments_are_passed_on(monkeypatch):
    graph, whole, ran = both_ways(Stack(scaled=True), monkeypatch, *batch_of())
    assert ran == 2
    assert graph.fingerprint == whole.fingerprint


def test_blocks_that_ask_for_values_are_captured_one_by_one(monkeypatch):
    graph, whole, ran = both_ways(Stack("asking", scaled=True), monkeypatch, *batch_of())
    assert ran == 5
    assert graph.fingerprint == whole.fingerprint
    assert len(graph.guards) == len(whole.guards)


def test_a_hook_inside_of_one_block_is_captured(monkeypatch):
    model = Stack()
    model.blocks[2].up.register_forward_hook(lambda module, args, result: result * 3)
    graph, whole, ran = both_ways(model, monkeypatch, *batch_of())
    assert ran == 3
    assert graph.fingerprint == whole.fingerprint


def test_another_shape_is_captured_anew(monkeypatch):
    class Shrinking(Stack):
        def forward(self, x, scale):
            for block in self.blocks[:3]:
                x = block(x)
            x = x[:2]
            for block in self.blocks[3:]:
                x = block(x)
            return x.sum()

    graph, whole, ran = both_ways(Shrinking(), monkeypatch, *batch_of())
    assert ran == 3
    assert graph.fingerprint == whole.fingerprint


def test_hooks_that_collect_from_inside_of_blocks_see_all_of_them(monkeypatch):
    """Installed in the forward, as Hugging Face does to return router logits."""

    class Collecting(Stack):
        def forward(self, x, scale):
            seen = []
            hooks = [
                block.up.register_forward_hook(lambda module, args, result: seen.append(result))
                for block in self.blocks
            ]
            loss = super().forward(x, scale)
            for hook in hooks:
                hook.remove()
            return loss + torch.stack(seen).square().mean()

    model, batch = Collecting(), batch_of()
    graph, whole, ran = both_ways(model, monkeypatch, *batch)
    assert ran == 5
    assert graph.fingerprint == whole.fingerprint
    assert torch.allclose(graph.bind(model)(*batch), model(*batch))
