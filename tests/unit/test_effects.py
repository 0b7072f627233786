"""Side effects of a forward: attributes it assigns and hooks it calls are as in eager PyTorch."""

import copy

import pytest
import torch
from torch import nn

from autopar import ColoTracer
from autopar.errors import CaptureError
from autopar.ir.bound_reads import bind

X = torch.arange(12, dtype=torch.float64).reshape(3, 4) / 7


class Holder(nn.Module):
    """A block in a block, whose forward is a function of (module, input)."""

    class Block(nn.Module):
        def __init__(self, function, attributes):
            super().__init__()
            self.linear = nn.Linear(4, 4).double()
            vars(self).update(attributes, function=function)

        def forward(self, x):
            return self.function(self, x)

    def __init__(self, function, **attributes):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(self.Block(function, attributes))

    def forward(self, x):
        return self.inner(x).sum()

    @property
    def block(self):
        return self.inner[0]


def pair(function, **attributes):
    """A model bound to its graph, and the same in eager."""
    model, alone = (Holder(function, **copy.deepcopy(attributes)) for _ in range(2))
    graph = ColoTracer().trace(model, (X,))
    return graph, model, alone


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.requires_grad == b.requires_grad
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def loss(model, x):
    h = model.linear(x)
    model.aux = h.pow(2).mean()
    return torch.tanh(h)


def losses(model, x):
    model.auxes = []
    h = model.linear(x)
    for k in range(3):
        model.auxes.append(h.pow(k + 1).mean())
    return h


def nested(model, x):
    h = model.linear(x)
    model.out = {"h": h, "pair": (h.mean(), 3), "detached": [h.detach()]}
    return h * 2


def plain(model, x):
    model.seen, model.text, model.nothing = tuple(x.shape), "seen", None
    return model.linear(x)


def within_an_object(model, x):
    h = model.linear(x)
    model.state.h = h
    return h


def once(model, x):
    if model.cached is None or model.cached.shape != x.shape:
        model.cached = torch.ones_like(x) * 2
    return model.linear(x) * model.cached


class State:
    h = None


ASSIGNING = {
    "a loss": (loss, {}, "aux"),
    "a loss that was a tensor": (loss, {"aux": torch.zeros(())}, "aux"),
    "a list of losses": (losses, {"auxes": [1]}, "auxes"),
    "a nested value": (nested, {"out": None}, "out"),
    "plain values": (plain, {"nothing": 1}, "seen"),
    "an attribute of an object": (within_an_object, {"state": State()}, "state"),
    "a cache": (once, {"cached": None}, "cached"),
}


@pytest.mark.parametrize("kind", ASSIGNING)
def test_assigned_attributes_are_those_of_eager(kind):
    function, attributes, name = ASSIGNING[kind]
    graph, model, alone = pair(function, **attributes)
    untouched = Holder(function, **copy.deepcopy(attributes))
    assert vars(model.block).keys() == vars(untouched.block).keys()  # the trace assigned nothing
    for step in range(3):
        run = graph.bind(model)
        assert torch.equal(run(X + step), alone(X + step))
        assert vars(model.block).keys() == vars(alone.block).keys()
        values = [getattr(m.block, name) for m in (model, alone)]
        assert same(*(vars(v) if name == "state" else v for v in values))
        if not bind(model, graph.reads)():  # the second call finds what the first one left
            graph = ColoTracer().trace(model, (X,))
            assert bind(model, graph.reads)()


def test_gradients_flow_through_assigned_attributes():
    graph, model, alone = pair(losses)
    run = graph.bind(model)
    for m, call in ((model, run), (alone, alone)):
        (call(X) + 5 * sum(m.block.auxes)).backward()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=0, atol=1e-14)


def test_a_kept_loss_needs_one_program_and_other_shapes_trace():
    graph, model, _ = pair(loss, aux=torch.zeros((), dtype=torch.float64, requires_grad=True))
    for _ in range(3):
        graph.bind(model)(X)
        assert bind(model, graph.reads)()
    ColoTracer().trace(model, (X[:2],))  # the model holds a tensor with a gradient history


def counted(model, x):
    model.calls += 1
    model.left = model.left - 2
    return model.linear(x)


def counted_in_an_object(model, x):
    model.state.calls += 1
    return model.linear(x)


def counted_and_used(model, x):
    model.calls += 1
    return model.linear(x) * model.calls


def counted_and_branched_on(model, x):
    if model.calls > 1:
        x = x * 2
    model.calls += 1
    return model.linear(x)


def test_counters_count_and_make_no_new_program():
    graph, model, alone = pair(counted, calls=0, left=10)
    holds = bind(model, graph.reads)
    for step in range(3):
        assert holds()
        graph.bind(model)(X)
        alone(X)
        assert (model.block.calls, model.block.left) == (alone.block.calls, alone.block.left)
        assert model.block.calls == step + 1


def test_counters_of_objects_count():
    state = State()
    state.calls = 0
    graph, model, alone = pair(counted_in_an_object, state=state)
    for _ in range(3):
        assert bind(model, graph.reads)()
        graph.bind(model)(X)
        alone(X)
    assert model.block.state.calls == alone.block.state.calls == 3


def counted_by_a_number_that_changes(model, x):
    model.calls = model.calls + x.shape[0]
    return model.linear(x)


def assigned_from_a_counter(model, x):
    model.other = model.calls = model.calls + 1
    return model.linear(x)


@pytest.mark.parametrize(
    "function",
    [
        counted_and_used, counted_and_branched_on, counted_by_a_number_that_changes,
        assigned_from_a_counter,
    ],
)  # fmt: skip
def test_a_counter_that_is_used_is_a_read(function):
    graph, model, alone = pair(function, calls=0)
    for _ in range(4):
        assert bind(model, graph.reads)()
        assert torch.equal(graph.bind(model)(X), alone(X))
        assert model.block.calls == alone.block.calls
        assert not bind(model, graph.reads)()
        graph = ColoTracer().trace(model, (X,))


def state(model, x):
    h = model.linear(x)
    if model.h is not None:
        h = h + model.h
    model.h = h.detach()
    return h


def test_state_between_calls_is_refused_with_its_line():
    graph, model, alone = pair(state, h=None)
    assert torch.equal(graph.bind(model)(X), alone(X))
    assert not bind(model, graph.reads)()
    with pytest.raises(CaptureError, match=r"inner\.0\.h.*earlier call.*test_effects\.py:\d+.*model\.h = h\.detach.*register_buffer"):  # noqa: E501  # fmt: skip
        ColoTracer().trace(model, (X,))


def test_an_object_of_the_model_stays_itself():
    def last(model, x):
        model.last, model.current = model.mask, model.state
        return model.linear(x) * model.mask

    graph, model, _ = pair(last, mask=torch.ones(4, dtype=torch.float64), state=State())
    graph.bind(model)(X)
    assert model.block.last is model.block.mask
    assert model.block.current is model.block.state


def test_an_object_that_cannot_be_carried_out_is_refused():
    class Cache:
        def __init__(self, h):
            self.h = h

    def assigns(model, x):
        model.cache = Cache(model.linear(x))
        return model.cache.h

    with pytest.raises(CaptureError, match=r"assigns inner\.0\.cache at .*test_effects.py:\d+.*a Cache.*Keep the"):  # noqa: E501  # fmt: skip
        pair(assigns)


def appends(model, x):
    h = model.linear(x)
    model.kept.append(h.mean())
    return h


def puts(model, x):
    h = model.linear(x)
    model.kept["h"] = h
    return h


def empties(model, x):
    model.kept.clear()
    return appends(model, x)


@pytest.mark.parametrize(
    ("function", "kept", "loop_clears"),
    [(appends, [], True), (puts, {}, True), (puts, {}, False), (empties, [], False)],
)
def test_containers_filled_in_place(function, kept, loop_clears):
    graph, model, alone = pair(function, kept=kept)
    held = model.block.kept
    traces = 1
    for step in range(4):
        if not bind(model, graph.reads)():
            graph, traces = ColoTracer().trace(model, (X,)), traces + 1
        assert torch.equal(graph.bind(model)(X + step), alone(X + step))
        assert same(model.block.kept, alone.block.kept)
        assert model.block.kept is held
        if loop_clears:
            held.clear()
            alone.block.kept.clear()
    assert traces <= 2


def test_a_list_that_grows_from_call_to_call_is_refused():
    graph, model, _ = pair(appends, kept=[])
    graph.bind(model)(X)
    assert not bind(model, graph.reads)()
    with pytest.raises(CaptureError, match=r"inner\.0\.kept, a list that held 1 items.*empty it"):
        ColoTracer().trace(model, (X,))


def test_containers_within_containers_are_refused():
    def inner(model, x):
        model.kept["a"].append(model.linear(x))
        return x

    with pytest.raises(CaptureError, match=r"kept\[\.\.\.\]"):
        pair(inner, kept={"a": []})
