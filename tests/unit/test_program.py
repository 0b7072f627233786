"""A program's two graphs as one differentiable function: what autograd's users may do with it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from autopar import auto_engine
from autopar.comm import world as environment
from autopar.errors import EngineError
from autopar.runtime.program import Program
from tests.lowering import lowered


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


def arguments() -> list[torch.Tensor]:
    torch.manual_seed(0)
    weights = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    return [weights, torch.randn(3, 4, dtype=torch.float64)]


def step_of(function: Callable) -> Program:
    return lowered(torch.fx.symbolic_trace(function), arguments())


def two(w, x):
    """A sum and a matrix, whose gradients need w, x and what is between."""
    y = torch.tanh(x @ w) @ w
    return y.exp().sum(), y.t(), x + 1


# Each takes the function's results and its first argument, and leaves gradients there.
USES = {
    "both results": lambda loss, y, w: (loss + y.pow(2).sum()).backward(),
    "the first": lambda loss, y, w: loss.backward(),
    "the second, by a strange gradient": lambda loss, y, w: y.backward(
        torch.arange(12, dtype=torch.float64).view(4, 3)
    ),
    "twice": lambda loss, y, w: (loss.backward(retain_graph=True), loss.backward()),
    "written to": lambda loss, y, w: y.mul_(2).sum().backward(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gradients_are_those_of_eager_autograd(use):
    step = step_of(two)
    found, expected = arguments(), arguments()
    mine, theirs = step(*found), two(*expected)
    assert [r.requires_grad for r in mine] == [True, True, False]
    use(*mine[:2], found[0])
    use(*theirs[:2], expected[0])
    torch.testing.assert_close(found[0].grad, expected[0].grad, rtol=0, atol=1e-12)


def test_calls_before_a_backward_do_not_mix():
    step, (w, x), (v, _) = step_of(two), arguments(), arguments()
    losses = [step(w, k * x)[0] for k in (1, 2)]
    losses[1].backward()
    losses[0].backward()
    (two(v, x)[0] + two(v, 2 * x)[0]).backward()
    torch.testing.assert_close(w.grad, v.grad, rtol=0, atol=1e-12)


def test_saved_values_die_with_the_backward_and_are_not_to_be_changed():
    step, (w, x) = step_of(two), arguments()
    loss = step(w, x)[0]
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = step(w, x)[0]
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradients_of_gradients():
    (w, x), step = arguments(), step_of(two)
    (grad,) = torch.autograd.grad(step(w, x)[0], w, create_graph=True)
    with pytest.raises(EngineError, match="no gradients themselves"):
        (grad.sum() + w.sum()).backward()


VIEWS = {
    "of an argument": lambda w, x: (w @ w, x.view(4, 3)),
    "of each other": lambda w, x: (y := w @ w, y.t()),
    "of one value": lambda w, x: ((y := w @ w)[:2], y[2:]),
}


@pytest.mark.parametrize("function", VIEWS.values(), ids=VIEWS)
def test_results_that_are_views_own_their_memory(function):
    step = step_of(function)
    found, expected = arguments(), arguments()
    first, second = step(*found)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    loss = (first * 3).sum() + second.sum()
    loss.backward()
    first, second = function(*expected)
    ((first * 3).sum() + second.sum()).backward()
    torch.testing.assert_close(found[0].grad, expected[0].grad, rtol=0, atol=1e-12)


class Biased(nn.Module):
    """Two parameters whose gradients are one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4, bias=False)
        self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return (self.layer(x) + (self.a + self.b)).pow(2).mean()


def test_gradients_share_no_memory():
    plain, x = Biased(), torch.randn(3, 4)
    model = Biased()
    engine, _ = auto_engine(model, None, "1")
    for run in (plain, engine):
        run(x).backward()
        run(x).backward()  # adds in place
    for p, expected in zip(engine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_local(), expected.grad)


def test_hooks_of_parameters_see_their_gradients():
    engine, _ = auto_engine(Biased(), None, "1")
    x, seen = torch.randn(3, 4), {}
    engine(x).backward()
    expected = engine.layer.weight.grad
    engine.zero_grad()
    (returned,) = torch.autograd.grad(engine(x), [engine.layer.weight])
    assert torch.equal(returned.to_local(), expected.to_local())
    engine(x).backward(inputs=[engine.a])
    assert engine.a.grad is not None and engine.layer.weight.grad is None
    engine.zero_grad()
    engine.layer.weight.register_hook(lambda g: seen.update(hook=g))
    engine.a.register_post_accumulate_grad_hook(lambda p: seen.update(accumulated=p.grad))
    engine(x).backward()
    assert isinstance(seen["hook"], DTensor) and seen["accumulated"] is engine.a.grad
    assert torch.equal(seen["hook"].to_local(), expected.to_local())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.first(h), self.second(h), h


def test_results_that_the_loss_does_not_use_give_no_gradients():
    plain = TwoHeads()
    engine, _ = auto_engine(copy.deepcopy(plain), None, "1")
    runs = [
        (model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
        for model in (plain, engine)
    ]
    for step in range(4):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        unused = []
        for model, optimizer in runs:
            optimizer.zero_grad()
            model(x)[step // 2].pow(2).mean().backward()
            unused.append([n for n, p in model.named_parameters() if p.grad is None])
            optimizer.step()
        assert unused[0] == unused[1] and len(unused[0]) == 2
    for p, expected in zip(engine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach().to_local(), expected.detach())


def test_hooks_on_a_result_that_feeds_another_are_refused():
    engine, _ = auto_engine(TwoHeads(), None, "1")
    first, _, h = engine(torch.ones(3, 4))
    first.retain_grad()
    with pytest.raises(EngineError, match="register_full_backward_hook"):
        h.retain_grad()
    with pytest.raises(EngineError, match="register_full_backward_hook"):
        h.register_hook(lambda g: g)


def test_torch_compile_runs_the_engine():
    engine, _ = auto_engine(TwoHeads(), None, "1")
    x = torch.ones(3, 4)
    expected = engine(x)
    compiled = torch.compile(engine)
    for found, result in zip(compiled(x), expected, strict=True):
        assert torch.equal(found, result)
    compiled(x)[0].sum().backward()
    assert engine.body.weight.grad is not None and len(engine.steps) == 1


def test_anomaly_detection_may_be_on_at_the_first_call():
    engine, _ = auto_engine(TwoHeads(), None, "1")
    with torch.autograd.detect_anomaly():
        engine(torch.ones(3, 4))[0].sum().backward()
    assert engine.body.weight.grad is not None
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan"):
        engine(torch.full((3, 4), torch.nan))[0].sum().backward()


def test_complex_numbers_are_no_tensors():
    """An operator on a number of Python, which has no memory to share."""

    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.fft.rfft(self.layer(x)) * (2 + 1j)).abs().mean()

    alone = Spectrum().double()
    engine, _ = auto_engine(copy.deepcopy(alone), None, "1")
    x = torch.randn(3, 4, dtype=torch.float64)
    losses = engine(x), alone(x)
    assert torch.allclose(*losses, rtol=0, atol=1e-12)
    for loss in losses:
        loss.backward()
    gradients = engine.layer.weight.grad.full_tensor(), alone.layer.weight.grad
    assert torch.allclose(*gradients, rtol=0, atol=1e-12)
