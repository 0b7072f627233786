"""Reads: a captured program says what it read of its modules, and notices when that changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.ir.bound_reads import bind
from autopar.ir.reads import MISSING, first_change

X = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7


class Config:
    def __init__(self):
        self.scale, self.unused = 2.0, 1


class Net(nn.Module):
    """Reads attributes of every kind."""

    of_the_class = 1.5

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.drop = nn.Dropout(0.0)
        self.beta, self.flag, self.name, self.unread = 0.5, True, "tanh", 7
        self.weights, self.sizes = (1.0, 2.0), [1, 2]
        self.table = {"a": 1.0, "inner": [3.0]}
        self.config, self.space = Config(), SimpleNamespace(k=3)
        self.mask = torch.ones(4, dtype=torch.float64)
        self.act = torch.tanh
        self.none = None

    def forward(self, x):
        h = self.drop(self.linear(x)) * self.beta * self.of_the_class * self.mask
        if self.flag and self.none is None and not hasattr(self, "extra"):
            h = getattr(torch, self.name)(h) + self.act(h)
        h = h * self.weights[0] + sum(self.sizes) + self.table["inner"][0]
        return (h * self.config.scale).sum()


@pytest.fixture
def traced():
    torch.manual_seed(0)
    model = Net()
    return model, ColoTracer().trace(model, (X,))


CHANGES = {
    "a number": lambda m: setattr(m, "beta", 0.25),
    "a number of another type": lambda m: setattr(m, "flag", 1),
    "a string": lambda m: setattr(m, "name", "sin"),
    "None": lambda m: setattr(m, "none", 3),
    "a tuple": lambda m: setattr(m, "weights", (3.0, 2.0)),
    "an item of a list": lambda m: m.sizes.__setitem__(0, 5),
    "the length of a list": lambda m: m.sizes.append(5),
    "an item within a dict": lambda m: m.table["inner"].__setitem__(0, 1.0),
    "an attribute of a config": lambda m: setattr(m.config, "scale", 3.0),
    "the config": lambda m: setattr(m, "config", copy.deepcopy(m.config)),
    "a function": lambda m: setattr(m, "act", torch.sin),
    "an attribute that was missing": lambda m: setattr(m, "extra", 1),
    "an attribute that hides that of the class": lambda m: setattr(m, "of_the_class", 2.0),
    "an attribute that is gone": lambda m: delattr(m, "beta"),
    "a tensor written into": lambda m: m.mask.zero_(),
    "another tensor": lambda m: setattr(m, "mask", m.mask.clone()),
    "training of a submodule": lambda m: m.drop.eval(),
    "a module": lambda m: setattr(m, "linear", copy.deepcopy(m.linear)),
    "a module more": lambda m: m.add_module("more", nn.ReLU()),
    "a forward hook": lambda m: m.linear.register_forward_hook(lambda *a: None),
    "a forward pre-hook": lambda m: m.drop.register_forward_pre_hook(lambda *a: None),
    "a backward hook": lambda m: m.linear.register_full_backward_hook(lambda *a: None),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_what_was_read_is_noticed(traced, kind):
    model, graph = traced
    holds = bind(model, graph.reads)
    assert holds()
    assert holds()
    CHANGES[kind](model)
    assert not holds()
    assert not bind(model, graph.reads)()
    assert first_change(model, graph.reads) is not None


def test_reads_by_the_namespace_are_noticed():
    class ByVars(nn.Module):
        def __init__(self):
            super().__init__()
            self.k = 2.0

        def forward(self, x):
            return (x * vars(self)["k"]).sum()

    model = ByVars()
    holds = bind(model, ColoTracer().trace(model, (X,)).reads)
    assert holds()
    model.k = 3.0
    assert not holds()


def test_attributes_of_a_namespace_are_noticed():
    class Spaced(nn.Module):
        def __init__(self):
            super().__init__()
            self.space = SimpleNamespace(k=2.0, inner=SimpleNamespace(on=True))

        def forward(self, x):
            return (x * self.space.k if self.space.inner.on else x).sum()

    model = Spaced()
    holds = bind(model, ColoTracer().trace(model, (X,)).reads)
    assert holds()
    model.space.k = 3.0
    assert not holds()
    model.space.k = 2.0
    assert holds()
    model.space.inner.on = False
    assert not holds()


def test_tensors_that_are_hidden_from_the_model_are_noticed():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.hidden = nn.Linear(4, 4).double(), [nn.Linear(4, 4).double()]

        def forward(self, x):
            with torch.no_grad():
                target = self.hidden[0](x)
            return (self.linear(x) - target).pow(2).sum()

    model = Teacher()
    graph = ColoTracer().trace(model, (X,))
    holds = bind(model, graph.reads)
    assert holds()
    with torch.no_grad():
        model.hidden[0].weight.mul_(2)
    assert not holds()
    assert "a tensor that the model holds" in str(first_change(model, graph.reads))
    assert torch.equal(ColoTracer().trace(model, (X,)).bind(model)(X), model(X))


def test_what_was_not_read_may_change(traced):
    model, graph = traced
    holds = bind(model, graph.reads)
    assert holds()
    model.unread, model.config.unused = 8, 2
    model.beta, model.weights = float("0.5"), (float("1"), 2.0)  # equal, but other objects
    assert holds()
    assert first_change(model, graph.reads) is None


def test_a_value_that_returns_holds_again(traced):
    model, graph = traced
    holds = bind(model, graph.reads)
    model.beta = 0.75
    assert not holds()
    model.beta = 0.5
    assert holds()


def test_parameters_in_attributes_are_not_constants():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
            self.weights = [self.weight]

        def forward(self, x):
            return (x * self.weights[0]).sum()

    model = Listed()
    graph = ColoTracer().trace(model, (X,))
    holds = bind(model, graph.reads)
    with torch.no_grad():
        model.weight.mul_(2)
    assert not graph.constants
    assert holds()
    assert torch.equal(graph.bind(model)(X), model(X))


def test_the_first_change_is_named(traced):
    model, graph = traced
    model.linear.register_forward_hook(print)
    assert "_forward_hooks of linear" in str(first_change(model, graph.reads))
    model.linear._forward_hooks.clear()
    model.drop.p = 0.5
    assert str(first_change(model, graph.reads)) == "drop.p was 0.0 and is 0.5"
    model.drop.p = 0.0
    model.config.scale = 1.0
    assert str(first_change(model, graph.reads)) == "the model.config.scale was 2.0 and is 1.0"


def test_reads_say_what_was_missing_and_skip_the_unread(traced):
    reads = {str(r): r.value for r in traced[1].reads.attributes}
    assert reads["the model.extra"] is MISSING
    assert reads["the model.of_the_class"] == 1.5
    assert reads["drop.training"] is True
    assert "the model.unread" not in reads
    assert "the model.config.unused" not in reads


def test_an_attribute_set_before_it_is_read_is_no_read():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, x):
            return x + self.linear(x) * self.depth

    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x, k):
            for i, block in enumerate(self.blocks):
                block.depth = i * k
                x = block(x)
            return x.sum()

    model = Blocks()
    for k in (1, 2, 1):
        graph = ColoTracer().trace(model, (X, k))
        assert torch.equal(graph.bind(model)(X, k), copy.deepcopy(model)(X, k))
        assert not [r for r in graph.reads.attributes if r.name == "depth"]
        assert [b.depth for b in model.blocks] == [0, k, 2 * k]


def test_the_trace_leaves_classes_as_they_were():
    before = (nn.Module.__getattribute__, nn.Module.__setattr__, Config.__getattribute__)
    ColoTracer().trace(Net(), (X,))
    with pytest.raises(Exception, match="cannot capture"):
        ColoTracer().trace(Net(), (X[:, :2],))
    assert (nn.Module.__getattribute__, nn.Module.__setattr__, Config.__getattribute__) == before
    assert "__getattribute__" not in vars(nn.Module)
    assert "__setattr__" not in vars(Config)


def test_types_are_those_of_eager():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()

        def forward(self, x):
            exact = type(self) is Asks and type(self.linear) is nn.Linear
            return (self.linear(x) * (2 if exact else 3)).sum()

    model = Asks()
    assert torch.equal(ColoTracer().trace(model, (X,)).bind(model)(X), model(X))
