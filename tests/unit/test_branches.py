"""Python that asks for values: resolved, guarded, or refused; never silently wrong."""

import copy
import inspect
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autopar import ColoTracer
from autopar.errors import CaptureError


class Holder(nn.Module):
    """A module with a weight whose forward is a plain function of (module, inputs)."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function
        self.register_buffer("limit", torch.tensor(5.0))

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def captured(function, *args, **options):
    torch.manual_seed(0)
    model = Holder(function).double()
    return model, ColoTracer(**options).trace(model, args)


def check(model, graph, *args):
    """Value and gradients equal eager's."""
    ours, theirs = graph.bind(model)(*args), model(*args)
    assert torch.equal(ours, theirs)
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(ours.sum(), weights),
                    torch.autograd.grad(theirs.sum(), weights), strict=True):  # fmt: skip
        assert torch.equal(a, b)


X = torch.arange(24, dtype=torch.float64).reshape(6, 4) / 7
LABELS = torch.tensor([0, 3, 1, 0, 2, 5])


# -- inputs decide: guards ----------------------------------------------------------------------


def branch(m, x, labels):
    return m.linear(x) * (2 if labels.max() > 4 else 3)


def number(m, x, labels):
    return m.linear(x) * int(labels.sum()) * labels[1].item() * float(labels.max())


def mask(m, x, labels):
    return m.linear(x)[labels > 0]


def mask_and_column(m, x, labels):
    return m.linear(x)[labels > 0, 1:]


def nonzero(m, x, labels):
    return m.linear(x)[labels.nonzero(as_tuple=True)[0]] * labels.nonzero().shape[0]


def where(m, x, labels):
    return m.linear(x)[torch.where(labels == 0)[0]]


def masked_select(m, x, labels):
    return m.linear(x).masked_select((labels > 1).unsqueeze(1))


def lengths(m, x, labels):
    return torch.cat([m.linear(x[:n]) for n in labels.tolist() if n])


def slices(m, x, labels):
    return m.linear(x[: labels[1], labels[0] :])


def ranges(m, x, labels):
    return m.linear(x) * torch.arange(labels.max() + 1).sum() * torch.zeros(labels[1]).numel()


def unique(m, x, labels):
    return m.linear(x)[torch.unique(labels)]


def equality(m, x, labels):
    return m.linear(x) * (1 if torch.equal(labels, labels.flip(0)) else 2) * (3 in labels)


def in_place(m, x, labels):
    count = torch.zeros(2)
    count[:1] += labels.max()
    return m.linear(x) * (2 if count.sum() > 4 else 3)


def shape_of_activations(m, x, labels):
    h = m.linear(x)
    mask = (labels > 1).unsqueeze(-1).expand_as(h) & torch.ones_like(h).bool()
    return h[mask]


def any_and_raise(m, x, labels):
    if labels is not None and (labels < 0).any():
        raise ValueError("negative label")
    return m.linear(x)


QUESTIONS = [
    branch, number, mask, mask_and_column, nonzero, where, masked_select, lengths, slices, ranges,
    unique, equality, in_place, any_and_raise, shape_of_activations,
]  # fmt: skip


@pytest.mark.parametrize("function", QUESTIONS, ids=lambda f: f.__name__)
def test_questions_about_inputs_are_guarded(function):
    model, graph = captured(function, X, LABELS)
    check(model, graph, X, LABELS)
    line = inspect.getsourcelines(function)[1]
    assert graph.guards
    for guard in graph.guards:
        assert guard.kind == "input"
        assert line < int(guard.source.rpartition(":")[2]) <= line + 5
        assert guard.text in inspect.getsource(function)
    assert all(g.holds([X, LABELS], {}) for g in graph.guards)
    if function is not any_and_raise:
        assert not all(g.holds([X, LABELS.flip(0) // 2], {}) for g in graph.guards)
    # another batch that the guards allow is right as well
    check(model, graph, X + 1, LABELS)


def test_a_guard_on_a_buffer_looks_at_its_present_value():
    _, graph = captured(lambda m, x: m.linear(x) * (2 if m.limit > 3 else 1), X)
    (guard,) = graph.guards
    assert guard.sources == (("buffer", "limit"),)
    assert guard.holds([X], {"limit": torch.tensor(4.0)})
    assert not guard.holds([X], {"limit": torch.tensor(1.0)})


def test_inputs_without_values_are_refused():
    model = Holder(branch).double()
    with pytest.raises(CaptureError, match="no values"):
        ColoTracer().trace(model, (X.to("meta"), LABELS.to("meta")))


# -- ranges and random draws --------------------------------------------------------------------


def test_impossible_sides_need_no_guard():
    def never(m, x):
        h = m.linear(x)
        if torch.rand([]) < 0.0 or not torch.rand(()) < 1:
            h = h * 0
        if torch.rand(3).mean() * 2 - 1 > 1.5:
            h = h * 0
        return h

    model, graph = captured(never, X)
    assert graph.guards == ()
    torch.manual_seed(1)
    check(model, graph, X)


def test_layer_drop_is_captured_off_and_said(caplog):
    def dropped(m, x):
        h = m.linear(x)
        for _ in range(3):
            if torch.rand([]) < 0.1:
                continue
            h = m.linear(h)
        return h

    _, graph = captured(dropped, X)
    (guard,) = graph.guards  # three layers, one line
    assert str(guard) in caplog.text
    assert guard.kind == "random" and guard.value is False
    assert "10%" in guard.note or "11%" in guard.note or "9%" in guard.note
    assert sum(str(n.target) == "aten.linear.default" for n in graph.nodes) == 4


DRAWS = {
    "random": lambda: random.random(),
    "uniform": lambda: random.uniform(0, 1),
    "numpy rand": lambda: np.random.rand(),
    "numpy uniform": lambda: np.random.uniform(0, 1),
    "item": lambda: torch.rand(1).item(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_every_kind_of_draw_is_seen_to_be_random(draw):
    _, graph = captured(lambda m, x: m.linear(x) * (0 if draw() < 0.05 else 1), X)
    assert [g.kind for g in graph.guards] == ["random"]


def test_a_coin_toss_is_refused():
    with pytest.raises(CaptureError, match="random draw that goes either way"):
        captured(lambda m, x: m.linear(x) * (2 if torch.rand(()) < 0.5 else 1), X)


def test_draws_leave_the_generator_as_eager_does():
    def dropout_after(m, x):
        h = m.linear(x)
        if torch.rand([]) < 0.0:
            h = h * 0
        return F.dropout(h, 0.5)

    model, graph = captured(dropout_after, X)
    torch.manual_seed(5)
    ours = graph.bind(model)(X)
    torch.manual_seed(5)
    assert torch.equal(ours, model(X))


# -- host randomness ----------------------------------------------------------------------------


def random_mask(shape, share):
    chosen = np.zeros(shape)
    chosen.flat[np.random.choice(chosen.size, int(share * chosen.size), replace=False)] = 1
    return chosen


def test_a_function_that_draws_is_called_anew_at_each_step():
    def masked(m, x):
        return m.linear(x) * torch.tensor(random_mask((6, 4), 0.5), dtype=torch.float64)

    model, graph = captured(masked, X)
    run = graph.bind(model)
    torch.manual_seed(0)
    first, second = run(X), run(X)
    torch.manual_seed(0)
    assert torch.equal(first, run(X))
    assert not torch.equal(first, second)
    assert (first != 0).sum() == (second != 0).sum() == 12


def test_other_host_draws_are_refused_by_line():
    def baked(m, x):
        return m.linear(x) * np.random.randint(5)

    with pytest.raises(CaptureError, match=re.escape("np.random.randint(5)")):
        captured(baked, X)


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_draws_by_another_name_are_found_out(draw):
    with pytest.raises(CaptureError, match="took hold of before"):
        captured(lambda m, x: m.linear(x) * draw(), X)


def test_draws_after_a_seed_of_their_own_stay():
    def fixed(m, x):
        np.random.seed(3)
        return m.linear(x) * float(np.random.randint(1, 50))

    model, graph = captured(fixed, X)
    check(model, graph, X)


# -- activations decide -------------------------------------------------------------------------


def finite(m, x):
    h = m.linear(x)
    if torch.isinf(h).any() or torch.isnan(h).any():
        h = torch.clamp(h, -1, 1)
    if not torch.isfinite(h).all():
        h = h * 0
    return h


def raises(m, x):
    h = m.linear(x)
    if (h > 1e6).any():
        message = "too large"
        raise ValueError(message)
    if not (h < 1e6).all():
        raise ValueError("too large")
    assert (h > -1e6).all(), "too small"
    assert not bool((h < -1e6).any())
    return h


@pytest.mark.parametrize("function", [finite, raises])
def test_checks_are_taken_to_pass(function):
    model, graph = captured(function, X)
    check(model, graph, X)
    assert {g.kind for g in graph.guards} == {"check"}


def positive(m, x):
    h = m.linear(x)
    if h.sum() > 0:  # the line that the message must name
        return h * 2
    return h


def test_a_branch_on_activations_is_refused_with_its_line():
    lines, start = inspect.getsourcelines(positive)
    line = start + next(i for i, text in enumerate(lines) if "must name" in text)
    with pytest.raises(CaptureError, match=rf"test_branches.py:{line}") as error:
        captured(positive, X)
    assert "depends on activations" in str(error.value)
    assert f'assume={{"test_branches.py:{line}"' in str(error.value)
    model, graph = captured(positive, X, assume={f"test_branches.py:{line}": True})
    assert torch.equal(graph.bind(model)(X), model.linear(X) * 2)
    assert graph.guards[0].kind == "assumed"


def test_a_failed_capture_leaves_no_mode_on():
    with pytest.raises(CaptureError):
        captured(positive, X)
    assert not _get_current_dispatch_mode_stack()
    assert not _get_current_function_mode_stack()
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    assert random.random.__self__ is not None


# -- gradients that inlining would lose ---------------------------------------------------------


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.clone(), x > 0

    @staticmethod
    def backward(ctx, grad, _):
        return -ctx.scale * grad, None


apply_reversed = Reversed.apply


def test_custom_functions_keep_their_backward():
    def function(m, x):
        h, positive = apply_reversed(m.linear(x), 3.0)
        h, _ = Reversed.apply(h, 0.5)
        return h * positive

    model, graph = captured(function, X)
    check(model, graph, X)
    assert sum("Reversed" in str(n.target) for n in graph.nodes) == 2


def test_no_grad_regions_stay_without_gradient():
    def function(m, x):
        with torch.no_grad():
            scale = m.linear(x).mean()
        return m.linear(x) * scale

    model, graph = captured(function, X)
    check(model, graph, X)


def test_writes_into_views_have_gradients():
    def function(m, x):
        h = torch.zeros(6, 4, dtype=torch.float64)
        h[:, 1:3] = m.linear(x)[:, :2]
        h[0] = m.linear(x)[0].float()
        return h

    model, graph = captured(function, X)
    check(model, graph, X)


def test_constants_and_buffers_reach_their_places():
    def function(m, x):
        return m.linear(x)[:, [1, 3]] * m.limit + torch.tensor([1.0, 2.0])

    model, graph = captured(function, X)
    check(model, graph, X)
    assert len(graph.constants) == 2


def test_data_stays_in_the_capture():
    def function(m, x):
        h = m.linear(x)
        return h * h.data.max() * h.detach().min()

    model, graph = captured(function, X)
    check(model, graph, X)
    assert not graph.constants


def test_a_dropout_that_is_off_draws_nothing():
    def function(m, x):
        h = F.dropout(m.linear(x), 0.0)
        if h.sum() > 0:
            return h
        return -h

    with pytest.raises(CaptureError, match="depends on activations"):
        captured(function, X)


def test_a_parameter_that_is_clamped_in_the_forward_keeps_its_gradient():
    def function(m, x):
        m.linear.weight.data.clamp_(-0.1, 0.1)
        return m.linear(x)

    model, graph = captured(function, X)
    assert list(graph.updates) == ["linear.weight"]
    alone = copy.deepcopy(model)
    ours, theirs = graph.bind(model)(X), alone(X)
    assert torch.equal(ours, theirs)
    assert torch.equal(model.linear.weight, alone.linear.weight)
    weights = [list(m.parameters()) for m in (model, alone)]
    for a, b in zip(torch.autograd.grad(ours.sum(), weights[0]),
                    torch.autograd.grad(theirs.sum(), weights[1]), strict=True):  # fmt: skip
        assert torch.equal(a, b) and a.abs().max() > 0


def test_a_parameter_that_is_written_after_its_use_is_refused():
    def function(m, x):
        h = m.linear(x)
        m.linear.weight.data.mul_(0.5)
        return m.linear(h)

    with pytest.raises(CaptureError, match="and then writes into it"):
        captured(function, X)


def test_the_callers_inputs_stay_as_they_are():
    def function(m, x, labels):
        labels.clamp_(0, 3)
        return m.linear(x) * labels.unsqueeze(1)

    model, graph = captured(function, X, LABELS.clone())
    labels = LABELS.clone()
    ours = graph.bind(model)(X, labels)
    assert torch.equal(labels, LABELS)
    assert torch.equal(ours, model(X, labels))
    assert graph.guards[0].text == "write into an input"


def test_functions_over_modules_are_refused():
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            return layer(x)

        @staticmethod
        def backward(ctx, grad):
            return grad, None

    with pytest.raises(CaptureError, match="takes modules"):
        captured(lambda m, x: Reversible.apply(x.requires_grad_(), m.linear), X.clone())


def test_writing_where_activations_say_needs_no_count():
    def function(m, x):
        h = m.linear(x)
        h[torch.where(h > 0)] = 2.0
        h[(h < -0.5).nonzero(as_tuple=True)] = -1.0
        return h

    model, graph = captured(function, X)
    check(model, graph, X)
    check(model, graph, X.flip(0))
    assert not graph.guards


def test_reading_where_activations_say_is_refused():
    with pytest.raises(CaptureError, match="depends on activations"):
        captured(lambda m, x: x[torch.where(m.linear(x).sum(1) > 0)], X)
    with pytest.raises(CaptureError, match="depends on activations"):
        captured(lambda m, x: x[m.linear(x).sum(1) > 0], X)


class Caching(nn.Module):
    """Keeps what it computed from the shape of its input."""

    def __init__(self):
        super().__init__()
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.cache.shape[0] != x.shape[1]:
            self.cache = torch.arange(x.shape[1], dtype=x.dtype)
        return x * self.cache


def test_a_buffer_that_is_replaced_by_a_larger_one_is_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Caching())).double()
    graph = ColoTracer().trace(model, (X,))
    assert [(g.source, g.value) for g in graph.guards] == [("1.0.cache", (4,))]
    run = graph.bind(model)
    first = run(X)
    assert torch.equal(first, run(X))
    assert model[1][0].cache.shape == (1,)
    assert torch.equal(first, model(X))
