"""Steps in microbatches on one process: what a training loop sees is what it sees without them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor import config

from autopar import auto_engine
from autopar.errors import EngineError
from autopar.passes.time_split import NotSeparableError
from autopar.testing.live_memory import LiveMemory
from tests.models import CASES
from tests.pipelines import (
    MODELS,
    accumulates,
    gap,
    gradients_gap,
    state_gap,
    train_beside,
    vectors,
)

EXACT = 1e-12


def engine_of(model: nn.Module, count: int, optimizer=None, **options):
    options = {"progress": False, **options}
    return auto_engine(model, optimizer, "1", microbatches=count, **options)


def pair(make, count: int, **options) -> tuple[nn.Module, nn.Module]:
    """An engine, and the same model alone."""
    torch.manual_seed(0)
    alone = make().double()
    engine, _ = engine_of(copy.deepcopy(alone), count, **options)
    return engine, alone


class Two(nn.Module):
    """Two losses of different parameters, and what they are computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x, y):
        h = torch.tanh(self.a(x))
        logits = self.b(h)
        return F.mse_loss(self.c(h), x[:, :2]), F.cross_entropy(logits, y), h, logits


LOSSES = {
    "sum of two": lambda o: o[0] + 0.3 * o[1],
    "the second alone": lambda o: o[1],
    "of returned values": lambda o: o[3].square().mean() + o[2].sum() * 0.1,
    "of both": lambda o: o[3].square().mean() + o[0],
    "half": lambda o: o[0] * 0.5,
    "scaled": lambda o: o[0] * 65536,
    "nothing": lambda o: o[0] * 0,
    "negative": lambda o: -o[0] - o[1],
}


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, count):
    engine, alone = pair(Two, count)
    batch = vectors(0, 10)
    for _ in range(3):  # at first the gradient of a loss is a guess, later it is known
        for model in (engine, alone):
            model.zero_grad()
            LOSSES[name](model(**batch)).backward()
        assert gradients_gap(engine, alone) < EXACT * (65536 if name == "scaled" else 1)
        assert gap(engine(**batch), alone(**batch)) < EXACT


def test_losses_that_change_from_step_to_step():
    engine, alone = pair(Two, 3)
    for step, name in enumerate(["half", "the second alone", "of both", "half", "sum of two"]):
        batch = vectors(step, 9)
        for model in (engine, alone):
            model.zero_grad()
            LOSSES[name](model(**batch)).backward()
        assert gradients_gap(engine, alone) < EXACT, name


def test_a_graph_is_kept_as_in_torch():
    engine, alone = pair(Two, 3)
    for model in (engine, alone):
        first, second, *_ = model(**vectors(0))
        first.backward(retain_graph=True)
        first.backward(retain_graph=True)
        second.backward()
    assert gradients_gap(engine, alone) < EXACT
    first, *_ = engine(**vectors(0))
    first.backward()
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()


def test_gradients_of_gradients_are_refused():
    engine, _ = pair(Two, 2)
    first, *_ = engine(**vectors(0))
    gradient, *_ = torch.autograd.grad(first, [engine.a.weight], create_graph=True)
    with pytest.raises(EngineError, match="create_graph"):
        gradient.to_local().sum().backward()


def test_gradients_accumulate_over_calls_and_hooks_see_them():
    engine, alone = pair(Two, 3)
    seen: dict[str, list[float]] = {"engine": [], "alone": []}
    for name, model in (("engine", engine), ("alone", alone)):
        model.a.weight.register_hook(
            lambda g, n=name: seen[n].append(
                float(getattr(g, "full_tensor", lambda g=g: g)().sum())
            )
        )
        for step in range(2):
            (LOSSES["sum of two"](model(**vectors(step))) / 2).backward()
    assert gradients_gap(engine, alone) < EXACT
    assert len(seen["engine"]) == len(seen["alone"]) == 2
    assert all(abs(a - b) < EXACT for a, b in zip(*seen.values(), strict=True))
    for model in (engine, alone):
        model.zero_grad(set_to_none=False)
        LOSSES["sum of two"](model(**vectors(7))).backward()
    assert gradients_gap(engine, alone) < EXACT


def test_batches_of_different_sizes_and_evaluation():
    engine, alone = pair(Two, 4)
    for samples in (8, 4, 11, 8):
        batch = vectors(samples, samples)
        for model in (engine, alone):
            model.zero_grad()
            LOSSES["sum of two"](model(**batch)).backward()
        assert gradients_gap(engine, alone) < EXACT
        engine.eval(), alone.eval()
        with torch.no_grad():
            assert gap(engine(**batch), alone(**batch)) < EXACT
        engine.train(), alone.train()


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("name", ["gpt2", "vit", "unet", "experts"])
def test_training(name):
    found = train_beside(name, lambda model, opt: engine_of(model, 3, opt), steps=2, evaluate=True)
    assert max(found.values()) < MODELS[name].tolerance, found


@pytest.mark.sample(0.67)
@pytest.mark.parametrize("options", [{"memory": "1MiB"}, {"memory": "60KiB"}, {"compile": True}])
def test_training_with(options):
    with config.patch({"cpp.simdlen": 0}):  # no search for vectors, by trial compilations
        found = train_beside("mlp", lambda model, opt: engine_of(model, 4, opt, **options), steps=2)
    assert max(found.values()) < 1e-9, found


def test_short_gradients_are_summed_in_single_precision():
    """As a loss of the whole batch in bfloat16 is, but for the rounding of each microbatch."""
    torch.manual_seed(0)
    alone = CASES["mlp"].make()
    batch = {n: x.float() if x.is_floating_point() else x for n, x in CASES["mlp"].batch(0).items()}
    alone(**batch).backward()
    for count in (1, 4, 8):
        engine, _ = engine_of(copy.deepcopy(alone), count, precision="bf16")
        engine.zero_grad()
        engine(**batch).backward()
        assert engine.up.weight.grad.dtype == torch.float32
        assert gradients_gap(engine, alone) < 0.02


class Noise(nn.Module):
    """Dropout of activations and of a weight, and noise that all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 2, bias=False)

    def forward(self, x, y):
        h = F.dropout(self.a(x), 0.5, self.training) * (1 + torch.rand(32).to(x))
        h = F.linear(h, F.dropout(self.b.weight, 0.3, self.training))
        return h.square().mean(), h


def test_noise_is_drawn_anew_by_each_step_and_again_when_slices_run_again():
    engine, _ = pair(Noise, 5)
    batch, found = vectors(0, 10), []
    state = engine.get_random_state()
    for again in (False, True):
        engine.set_random_state(state)
        engine.zero_grad()
        loss, h = engine(**batch)
        # what comes back besides the loss's gradient makes the slices run again
        (loss + 0 * h.sum() if again else loss).backward()
        found.append([p.grad.full_tensor().clone() for p in engine.parameters()])
    assert gap(*found) < EXACT
    engine.zero_grad()
    engine(**batch)[0].backward()
    assert gap([p.grad.full_tensor() for p in engine.parameters()], found[0]) > 0.01


def test_dropout_differs_between_slices():
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))

        def forward(self, x):
            return F.dropout(x * self.scale, 0.5)

    engine, _ = pair(Dropped, 4)
    result = engine(torch.ones(8, 64, dtype=torch.float64))
    assert len({tuple(row) for row in result.tolist()}) == 8
    assert set(result.unique().tolist()) == {0.0, 2.0}
    result.sum().backward()
    assert gap(engine.scale.grad, result.sum(0)) < EXACT


@pytest.mark.parametrize("name", ["normed", "counted"])
def test_independent_microbatches_are_a_loop_of_accumulation(name):
    sizes = [3, 3, 2]
    found = train_beside(
        name, lambda model, opt: engine_of(model, 3, opt, microbatch="independent"), sizes=sizes
    )
    assert max(found.values()) < 1e-9, found


def test_independent_losses_of_a_batch():
    def contrastive(self, x, y):
        h = F.normalize(self.a(x), dim=-1)
        return F.cross_entropy(h @ h.T, torch.arange(x.shape[0])), h

    class Contrastive(Two):
        forward = contrastive

    engine, alone = pair(Contrastive, 3, microbatch="independent")
    batch = vectors(0, 9)
    loss, h = engine(**batch)
    loss.backward()
    assert h.shape == (9, 6)
    assert gap(loss.detach(), accumulates(alone, batch, [3, 3, 3])) < EXACT
    assert gradients_gap(engine, alone) < EXACT


@pytest.mark.parametrize("samples", [1, 5])
def test_batches_of_fewer_samples(samples):
    """A last batch is split into as many microbatches as it has samples."""
    engine, alone = pair(Two, 8)
    batch = vectors(0, samples)
    for model in (engine, alone):
        model(**batch)[0].backward()
    assert gradients_gap(engine, alone) < EXACT


def test_refusals():
    engine, _ = pair(Two, 8)
    batch = vectors(0, 8)
    batch["x"].requires_grad_()
    with pytest.raises(EngineError, match="requires grad"):
        engine(**batch)
    engine, _ = engine_of(MODELS["normed"].build(), 2)
    with pytest.raises(NotSeparableError, match="batch_norm"):
        engine(**vectors(0))
    # the model is as it was, and may be distributed otherwise
    again, _ = engine_of(engine, 2, microbatch="independent")
    again(**vectors(0)).backward()
    for options in ({"microbatches": 0}, {"microbatches": 2, "lower": False},
                    {"microbatches": 2, "microbatch": "other"}):  # fmt: skip
        with pytest.raises(ValueError, match="microbatch"):
            auto_engine(nn.Linear(2, 2), None, "1", progress=False, **options)


def test_results_of_other_kinds():
    engine, alone = pair(MODELS["crossings"].make, 3)
    batch = MODELS["crossings"].batch(0)
    for _ in range(2):
        mine, theirs = engine(**batch), alone(**batch)
        assert gap(mine, theirs) < EXACT and mine["number"] == 5 and mine["nothing"] is None
    (mine["loss"] + mine["penalty"]).backward()
    (theirs["loss"] + theirs["penalty"]).backward()
    assert gradients_gap(engine, alone) < EXACT


def test_a_frozen_model_evaluates_and_one_that_thaws_trains():
    engine, alone = pair(Two, 2)
    for model in (engine, alone):
        model.a.requires_grad_(False)
    for _ in range(2):
        for model in (engine, alone):
            model.zero_grad()
            LOSSES["sum of two"](model(**vectors(0))).backward()
            model.a.requires_grad_(True)
        assert gradients_gap(engine, alone) < EXACT
    for model in (engine, alone):
        model.requires_grad_(False)
    assert gap(engine(**vectors(1)), alone(**vectors(1))) < EXACT


def test_a_copy_of_an_engine_trains_too():
    engine, alone = pair(Two, 3)
    engine(**vectors(0))
    twin = copy.deepcopy(engine)
    for model in (twin, alone):
        LOSSES["sum of two"](model(**vectors(0))).backward()
    assert gradients_gap(twin, alone) < EXACT
    assert state_gap(twin, alone) == 0
    assert all(p.grad is None for p in engine.parameters())


def test_inputs_that_hold_samples_elsewhere():
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, table):
            return self.layer(x).tanh().mean() + (x @ table).sum(0).square().mean()

    engine, alone = pair(Sequences, 3, batch_dim={"x": 1, "table": None})
    batch = {
        "x": torch.randn(5, 6, 4, dtype=torch.float64),
        "table": torch.randn(4, 6, dtype=torch.float64),
    }
    for model in (engine, alone):
        model(**batch).backward()
    assert gradients_gap(engine, alone) < EXACT
    for dims, words in (({"nothing": 1}, "nothing"), ({"x": 3}, "dim 3 of x")):
        with pytest.raises(EngineError, match=words):
            pair(Sequences, 3, batch_dim=dims)[0](**batch)


def test_the_size_of_most_inputs_is_that_of_the_batch():
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, weights, x, y):
            return F.cross_entropy(self.layer(x), y, weights)

    engine, alone = pair(Weighted, 4)
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    for model in (engine, alone):
        model(weights=weights, **vectors(0)).backward()
    assert gradients_gap(engine, alone) < EXACT


def test_gradients_of_slices_of_two_sizes_are_one_sum():
    """Ten samples in three: 4, 3 and 3. Beside the gradients of a slice there is one sum."""
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 1)).double()
    engine, _ = engine_of(copy.deepcopy(alone), 3)
    x, parameters = vectors(0, 10)["x"], sum(p.nbytes for p in alone.parameters())
    peaks = []
    for _ in range(2):
        for model in (engine, alone):
            model.zero_grad()
        with LiveMemory() as live:
            engine(x).square().mean().backward()
        peaks.append(live.peak)
        alone(x).square().mean().backward()
        assert gradients_gap(engine, alone) < EXACT
    assert peaks[-1] < 2 * parameters + 2 * 4 * 512 * 8 + 10_000


class Sums(nn.Module):
    """Two parameters with one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return (x + self.a + self.b).square().mean()


@pytest.mark.parametrize("count", [2, 3])
def test_one_gradient_of_two_parameters(count):
    engine, alone = pair(Sums, count)
    x = vectors(0, 10)["x"]
    for model in (engine, alone):
        model(x).backward()
    assert gradients_gap(engine, alone) < EXACT
