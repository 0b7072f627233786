"""Python that asks for values: resolved, guarded, or refused; never silently wrong."""

import inspect
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from autopar import ColoTracer
from autopar.errors import CaptureError
from tests.captures import LABELS, Holder, X, captured, check

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
    with pytest.raises(CaptureError, match="imported before the capture"):
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
