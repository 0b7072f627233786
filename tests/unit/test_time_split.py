"""Graphs split over their batch: slices give what the batch gives, or a refusal says why not."""

from collections.abc import Sequence

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from autopar import auto_engine
from autopar.passes.slice_graph import slice_graph, whole_graph
from autopar.passes.time_split import NotSeparableError, Separation, even_sizes, separate
from autopar.runtime.slicing import Slicing
from autopar.tracer import ColoTracer
from tests.models import CASES
from tests.pipelines import MODELS
from tests.zoo.installed import INSTALLED


class Case:
    """A model's graph, and the graph of its slices."""

    def __init__(self, model: nn.Module, *args, **kwargs) -> None:
        self.graph = ColoTracer().trace(model, args, kwargs)
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.inputs = inputs
        names = [n for n in self.graph.inputs if n is not None]
        self.samples = inputs[0].shape[0]
        self.sliced = [x.ndim > 0 and x.shape[0] == self.samples for x in inputs]
        dims = {n: 0 for n, sliced in zip(names, self.sliced, strict=True) if sliced}
        self.separation: Separation = separate(
            self.graph, dims, self.samples, frozenset(self.graph.parameters)
        )
        held = dict(model.named_parameters(remove_duplicate=False))
        self.trained = [held[n] for n in self.graph.parameters.values()]
        placeholders = self.graph.placeholders
        self.parameters = [
            p.to(placeholders[k].meta["val"].dtype)
            for k, p in zip(self.graph.parameters, self.trained, strict=True)
        ]
        held = dict(model.named_buffers(remove_duplicate=False))
        self.others = [held[n].clone() for n in self.graph.buffers.values()]
        self.others += self.graph.constants.values()

    @property
    def states(self) -> list[str | None]:
        outputs = self.separation.graph.output.args[0]
        return [self.separation.state(x) if isinstance(x, fx.Node) else None for x in outputs]

    def of_batch(self) -> list:
        return list(self.graph.gm(*self.parameters, *self.others, *self.inputs))

    def of_slices(self, sizes: Sequence[int]) -> list:
        slicing = Slicing(
            tuple(sizes), tuple(0 if sliced else None for sliced in self.sliced),
            whole_graph(self.separation),
            tuple(state for _, state in self.separation.whole), tuple(self.states),
        )  # fmt: skip
        parts = [
            slice_graph(self.separation, size).gm(*self.parameters, *self.others, *inputs)
            for size, inputs in zip(
                sizes, slicing.slices(self.others, self.inputs), strict=True
            )
        ]  # fmt: skip
        return [slicing.combine(k, each) for k, each in enumerate(zip(*parts, strict=True))]

    def gap(self, sizes: Sequence[int]) -> float:
        """Largest difference of results, and of the gradients of their sums, relative to 1."""
        mine, theirs = self.of_slices(sizes), self.of_batch()
        worst = 0.0
        for a, b in zip(mine, theirs, strict=True):
            if not isinstance(b, torch.Tensor):
                assert a == b
                continue
            assert a.shape == b.shape and a.dtype == b.dtype
            if b.numel():
                scale = max(1.0, b.double().abs().max().item())
                worst = max(worst, (a.double() - b.double()).abs().max().item() / scale)
        differentiable = [k for k, b in enumerate(theirs) if getattr(b, "requires_grad", False)]
        trained = [p for p in self.trained if p.requires_grad]
        for k in differentiable:
            assert mine[k].requires_grad
            pairs = zip(
                *(
                    torch.autograd.grad(
                        x[k].sum(), trained, allow_unused=True, retain_graph=True,
                    )
                    for x in (mine, theirs)
                ),
                strict=True,
            )  # fmt: skip
            for a, b in pairs:
                a = a if a is not None else None if b is None else torch.zeros_like(b)
                b = b if b is not None else None if a is None else torch.zeros_like(a)
                if a is not None and b is not None:
                    scale = max(1.0, b.abs().max().item())
                    worst = max(worst, (a - b).abs().max().item() / scale)
        return worst


def samples_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = samples_of(7, 6), samples_of(7, 3, seed=1)
LABELS = torch.tensor([0, 2, -100, 1, 1, -100, 0])
TEXT = samples_of(6, 5, 6)
TEXT_LABELS = torch.tensor([[0, 1, 2, -100, -100]] * 3 + [[-100] * 5] + [[2, 2, 1, 0, -100]] * 2)


class Net(nn.Module):
    """A layer, and what a test computes of its results."""

    def __init__(self, compute, width: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(6, width)
        self.token = nn.Parameter(torch.ones(1, 1, 6))
        self.register_buffer("weights", torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64))
        self.compute = compute

    def forward(self, x, *rest):
        return self.compute(self, x, *rest)


def net(compute, width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Net(compute, width).double()


# Losses of what a layer makes of X, with Y or LABELS.
MEANS = {
    "cross_entropy": lambda m, x, y: F.cross_entropy(m.layer(x), y),
    "summed cross_entropy": lambda m, x, y: F.cross_entropy(m.layer(x), y, reduction="sum"),
    "cross_entropy of each": lambda m, x, y: F.cross_entropy(m.layer(x), y, reduction="none"),
    "class weights": lambda m, x, y: F.cross_entropy(m.layer(x), y, m.weights),
    "label smoothing": lambda m, x, y: F.cross_entropy(m.layer(x), y, label_smoothing=0.1),
    "weights, smoothing": lambda m, x, y: F.cross_entropy(
        m.layer(x), y, m.weights, label_smoothing=0.2
    ),
    "ignored class": lambda m, x, y: F.cross_entropy(
        m.layer(x), y.clamp(min=0), ignore_index=1
    ),
    "nll_loss": lambda m, x, y: F.nll_loss(m.layer(x).log_softmax(-1), y, m.weights),
    "counted by hand": lambda m, x, y: (
        F.cross_entropy(m.layer(x), y, reduction="sum") / (y != -100).sum()
    ),
    "masked mean": lambda m, x, y: (m.layer(x).square().mean(-1) * (y > 0)).sum()
    / (y > 0).sum().clamp(min=1),
    "square root of a count": lambda m, x, y: m.layer(x).sum() / (y != -100).double().sum().sqrt(),
}  # fmt: skip

OF_VALUES = {
    "mse": lambda m, x, y: F.mse_loss(m.layer(x), y),
    "l1": lambda m, x, y: F.l1_loss(m.layer(x), y),
    "huber": lambda m, x, y: F.huber_loss(m.layer(x), y),
    "smooth l1": lambda m, x, y: F.smooth_l1_loss(m.layer(x), y, beta=0.5),
    "binary": lambda m, x, y: F.binary_cross_entropy_with_logits(m.layer(x), y.sigmoid()),
    "divergence": lambda m, x, y: F.kl_div(
        m.layer(x).log_softmax(-1), y.softmax(-1), reduction="batchmean"
    ),
    "soft labels": lambda m, x, y: F.cross_entropy(m.layer(x), y.softmax(-1)),
    "soft, smooth, weighted": lambda m, x, y: F.cross_entropy(
        m.layer(x), y.softmax(-1), m.weights, label_smoothing=0.1
    ),
    "soft, of each": lambda m, x, y: F.cross_entropy(m.layer(x), y.softmax(-1), reduction="none"),
    "cosine": lambda m, x, y: (F.normalize(m.layer(x), dim=-1) * F.normalize(y, dim=-1)).mean(),
    "mean of means": lambda m, x, y: (m.layer(x) - y).abs().mean(-1).mean(),
    "loss of a penalty": lambda m, x, y: F.mse_loss(m.layer(x), y) + m.layer.weight.square().sum(),
    "weight times loss": lambda m, x, y: F.mse_loss(m.layer(x), y) * m.layer.bias.sum(),
    "several": lambda m, x, y: (F.mse_loss(m.layer(x), y), m.layer(x).sum(), m.layer(x), y + 1),
    "sum of a list": lambda m, x, y: sum([F.mse_loss(m.layer(x), y), m.layer(x).mean()]),
    "one less a mean": lambda m, x, y: 1 - m.layer(x).tanh().mean(),
    "with a margin": lambda m, x, y: (m.layer(x).mean() + 0.5) - 0.2,
    "by the batch": lambda m, x, y: ((m.layer(x) - y) ** 2).sum() / x.shape[0],
}

FORMS = {
    "class token, expanded": lambda m, x: torch.cat(
        [m.token.expand(x.shape[0], -1, -1), x], 1
    ).cumsum(1),
    "class token, repeated": lambda m, x: torch.cat([m.token.repeat(x.shape[0], 1, 1), x], 1),
    "picked by position": lambda m, x: m.layer(x)[
        torch.arange(x.shape[0]), x[..., 0].argmax(-1)
    ],
    "initial state": lambda m, x: torch.tanh(m.layer(x[:, 0]) + torch.zeros(x.shape[0], 3).to(x)),
    "flattened": lambda m, x: m.layer(x.reshape(-1, 6)).reshape(x.shape[0], -1, 3).mean(1),
    "transposed": lambda m, x: m.layer(x.transpose(0, 1)).softmax(0).sum(0),
    "mask of positions": lambda m, x: m.layer(x).masked_fill(
        torch.ones(5, 1, dtype=torch.bool).tril(), 0.0
    ),
    "mask of each": lambda m, x: m.layer(x) * (x.sum(-1, keepdim=True) > 0),
    "positions of each": lambda m, x: (
        m.layer(x) + torch.arange(5).expand(x.shape[0], -1)[..., None]
    ),
    "sorted tokens": lambda m, x: m.layer(x).sort(1).values,
    "cumulated tokens": lambda m, x: m.layer(x).cumsum(1),
    "chosen of each": lambda m, x: m.layer(x).topk(2, -1).values,
    "attention": lambda m, x: F.scaled_dot_product_attention(*([m.layer(x)[:, None]] * 3)),
}  # fmt: skip


@pytest.mark.parametrize("sizes", [(4, 3), (1, 1, 5), (1,) * 7])
@pytest.mark.parametrize("name", MEANS)
def test_means_over_labels_that_are_not_ignored(name, sizes):
    assert Case(net(MEANS[name]), X, LABELS).gap(sizes) < 1e-12


@pytest.mark.parametrize("name", OF_VALUES)
def test_losses_of_values(name):
    assert Case(net(OF_VALUES[name]), X, Y).gap((3, 2, 2)) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_forms_that_are_told_the_batch_or_move_it(name):
    assert Case(net(FORMS[name]), TEXT).gap((3, 2, 1)) < 1e-12


def test_labels_of_tokens_some_samples_without_any():
    def compute(m, x, y):
        logits = m.layer(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten()), logits

    assert Case(net(compute), TEXT, TEXT_LABELS).gap((1, 3, 2)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_summed_in_single_precision(dtype):
    """A sum of 512 losses rounds to 3 digits in bfloat16; a mean of sums would be off by more."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).to(dtype)
    model.forward = lambda x, y: F.cross_entropy(F.linear(x, model.weight, model.bias), y)
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.randint(0, 3, (512,), generator=torch.Generator().manual_seed(2))
    case = Case(model, x, y)
    (mine,), (theirs,) = case.of_slices((200, 200, 112)), case.of_batch()
    exact = F.cross_entropy(F.linear(x.double(), model.weight.double(), model.bias.double()), y)
    assert mine.dtype == theirs.dtype == dtype
    assert abs(mine.item() - exact.item()) <= abs(theirs.item() - exact.item()) + 4e-3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*CASES, "llama", "t5", "unet", "experts", "thrice", "crossings"])
def test_models(name, training):
    model = (MODELS[name] if name in MODELS else CASES[name]).build()
    batch = (MODELS[name] if name in MODELS else CASES[name]).batch(0)
    model.train(training)
    if name == "resnet" and training:
        with pytest.raises(NotSeparableError, match="batch_norm"):
            Case(model, **batch)
        return
    assert Case(model, **batch).gap(even_sizes(8, 3)) < 1e-6


# Draws that slices share, and draws of each sample.
DRAWS = {
    "one vector for all": lambda m, x: m.layer(x) * torch.randn(3).to(x),
    "of each": lambda m, x: m.layer(x) * torch.rand(x.shape[0], 3).to(x),
    "like": lambda m, x: m.layer(x + torch.randn_like(x)),
    "of each, and their mean": lambda m, x: (
        (n := torch.randn(x.shape[0], 3).to(x)) * m.layer(x) + n.mean()
    ),
    "dropped weight": lambda m, x: F.linear(x, F.dropout(m.layer.weight, 0.5), m.layer.bias),
    "dropped input": lambda m, x: m.layer(F.dropout(x, 0.5)),
    "steps": lambda m, x: m.layer(x) * torch.randint(0, 9, (x.shape[0], 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWS)
def test_noise_is_that_of_the_batch(name):
    """Drawn once for all slices: the same seed gives what the batch gives."""
    case = Case(net(DRAWS[name]), X)
    torch.manual_seed(3)
    mine = case.of_slices((3, 4))
    torch.manual_seed(3)
    theirs = case.of_batch()
    assert (mine[0] - theirs[0]).abs().max() < 1e-12


def test_dropout_of_activations_is_drawn_for_each_slice():
    case = Case(net(lambda m, x: F.dropout(m.layer(x) * 0 + 1, 0.5)), samples_of(400, 6))
    (mine,) = case.of_slices((200, 200))
    assert set(mine.unique().tolist()) == {0.0, 2.0} and abs(mine.mean() - 1) < 0.2
    assert not case.separation.whole


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(x).sum()


def contrastive(m, x):
    h = F.normalize(m.layer(x), dim=-1)
    return F.cross_entropy(h @ h.T, torch.arange(x.shape[0]))


def balanced(m, x):
    """The auxiliary loss of a mixture of experts: the share of tokens times that of weights."""
    weights = m.layer(x).softmax(-1)
    share = F.one_hot(weights.argmax(-1), 3).double().mean(0)
    return (share * weights.mean(0)).sum()


MIXING = {
    "BatchNorm in training": (Normed, "batch_norm"),
    "contrastive": (lambda: Net(contrastive), r"matmul|mm"),
    "load balancing": (lambda: Net(balanced), "mul"),
    "sorted batch": (lambda: Net(lambda m, x: m.layer(x).sort(0).values), "sort"),
    "sorted tokens of all": (
        lambda: Net(lambda m, x: m.layer(x).flatten().sort().values[0]), "sort"
    ),
    "cumulated over the batch": (lambda: Net(lambda m, x: m.layer(x).cumsum(0)), "cumsum"),
    "squared sum": (lambda: Net(lambda m, x: m.layer(x).sum() ** 2), "pow"),
    "largest of all": (lambda: Net(lambda m, x: m.layer(x).max()), "max"),
    "next sample": (lambda: Net(lambda m, x: m.layer(x).roll(1, 0)), "roll"),
    "one sample": (lambda: Net(lambda m, x: m.layer(x)[2]), "select"),
    "spread": (lambda: Net(lambda m, x: m.layer(x).std(0)), "std|var"),
    "without a rule": (
        lambda: Net(lambda m, x: F.cosine_embedding_loss(m.layer(x), m.layer(x), x[:, 0])),
        "cosine_embedding_loss.*no rule",
    ),
    "divided by another sum": (
        lambda: Net(lambda m, x: m.layer(x).sum() / m.layer(x).exp().sum()), "div"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_refusals_name_the_operator_its_line_and_a_remedy(name):
    make, operator = MIXING[name]
    with pytest.raises(NotSeparableError, match=operator) as refusal:
        Case(make().double(), X)
    message = str(refusal.value)
    assert "aten." in message and "microbatch='independent'" in message
    if name != "BatchNorm in training":
        assert "test_time_split.py:" in message


def test_draws_for_parameters_are_refused():
    with pytest.raises(NotSeparableError, match=r"bernoulli.*all samples share"):
        Case(net(lambda m, x: m.layer(x) * torch.bernoulli(m.layer.bias.sigmoid())), X)


def test_sizes_are_even_and_larger_ones_come_first():
    assert even_sizes(7, 3) == (3, 2, 2)
    assert even_sizes(8, 8) == (1,) * 8
    assert even_sizes(8, 2) == (4, 4)


# A seeded sample of the zoo: by library and name, the operator by which some mix samples.
SAMPLE = torch.randperm(len(INSTALLED), generator=torch.Generator().manual_seed(5))[:10].tolist()


@pytest.mark.sample(0.5)
@pytest.mark.parametrize("family", [INSTALLED[k] for k in sorted(SAMPLE)])
def test_families_of_the_zoo(family):
    model = family.build()
    batch = family.batch(model, 0)
    try:
        case = Case(model, **batch)
    except NotSeparableError as refusal:
        mixing = ("batch_norm", "select", "div", "mul", "sort", "slice", "matmul", "index")
        assert any(name in str(refusal) for name in mixing), refusal
        return
    assert case.gap((case.samples - 1, 1) if case.samples > 1 else (1,)) < 1e-5


@pytest.mark.parametrize("batch_first", [True, False])
def test_dims_merged_before_the_samples(batch_first):
    """`nn.MultiheadAttention` flattens [time, samples]: samples are the inner part of the dim."""

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
            self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x):
            return self.layers(x).square().mean()

    torch.manual_seed(0)
    model = Encoder().double()
    x = torch.randn((6, 5, 8) if batch_first else (5, 6, 8), dtype=torch.float64)
    expected = torch.autograd.grad(model(x), list(model.parameters()))
    engine, _ = auto_engine(
        model, None, "1", microbatches=4, batch_dim=0 if batch_first else 1, progress=False
    )
    engine(x).backward()
    for p, g in zip(engine.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), g, rtol=0, atol=1e-12)
