"""Losses of tokens keep the dims of the batch: a split sequence never gathers its logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ColoTracer, autoplan
from autopar.comm.groups import planning_groups
from autopar.passes.apply_sharding import apply_sharding
from autopar.passes.verify import propagate_shapes
from tests.clusters import eager_to_shard

B, S, V, D = 2, 12, 31, 8


class Model(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.head = nn.Linear(D, V)
        self.loss = loss

    def forward(self, ids, labels):
        return self.loss(self.head(torch.tanh(self.embed(ids))), labels)


def flattened(logits, labels):
    return F.cross_entropy(logits.view(-1, V), labels.view(-1))


def shifted(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].flatten())


def shifted_contiguous(logits, labels):
    return F.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, V), labels[..., 1:].contiguous().view(-1),
        ignore_index=3, label_smoothing=0.1,
    )  # fmt: skip


def padded(logits, labels):
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.float().view(-1, V), labels.view(-1), reduction="sum")


def weighted(logits, labels):
    weight = torch.linspace(0.5, 2, V, dtype=logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight)


def by_token(logits, labels):
    """With a weight of every token."""
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses.view(B, S) * (labels % 3)).sum()


def by_token_shifted(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), reduction="none")
    return (losses * (labels.reshape(-1) % 3)).mean()


LOSSES = [flattened, shifted, shifted_contiguous, padded, weighted, by_token, by_token_shifted]


def batch():
    torch.manual_seed(1)
    return {"ids": torch.randint(V, (B, S)), "labels": torch.randint(V, (B, S))}


def losses_in(graph):
    return [n for n in graph.nodes if "cross_entropy" in str(n.target)]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_captured_loss_is_the_models(loss):
    torch.manual_seed(0)
    model = Model(loss).double()
    inputs = batch()
    graph = ColoTracer().trace(model, (), inputs)
    (node,) = losses_in(graph)
    assert str(node.target) == "autopar.token_cross_entropy.default"
    assert tuple(node.args[0].meta["val"].shape) == (B, S, V)
    expected = model(**inputs)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**graph.parameters, **graph.buffers}
    arguments = [
        values[names[n.target]] if n.target in names else inputs[n.target]
        for n in graph.nodes
        if n.op == "placeholder"
    ]
    (actual,) = graph.gm(*arguments)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(actual, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: F.cross_entropy(x.view(-1, V), y.t().reshape(-1)),
        lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
        lambda x, y: F.cross_entropy(x[:, 1:].reshape(-1, V), y[:, :-1].reshape(-1)),
    ],
    ids=["other labels", "not flattened", "the loss of the token before"],
)
def test_other_losses_stay_as_they_are(loss):
    graph = ColoTracer().trace(Model(loss).double(), (), batch())
    (node,) = losses_in(graph)
    if str(node.target) == "autopar.token_cross_entropy.default":  # cut, but not shifted
        assert tuple(node.args[0].meta["val"].shape) == (B, S - 1, V)


@pytest.mark.parametrize("loss", [flattened, shifted, padded, by_token, by_token_shifted])
def test_a_split_sequence_never_holds_all_logits(loss):
    model, inputs = Model(loss).double(), batch()
    planned = autoplan(
        model, (), inputs, cluster=eager_to_shard("4"), constraints={"inputs.ids": "RS0"}
    )
    groups = planning_groups((4,), (0,), "token-loss")
    program = apply_sharding(planned.graph, planned.plan, coords=(0,), groups=groups)
    mode = next(n.meta["val"] for n in planned.graph.nodes if "val" in n.meta).fake_mode
    with mode:
        fakes = [
            torch.empty(n.meta["local_shape"], dtype=_dtype(planned.graph, n.name))
            for n in program.gm.graph.nodes
            if n.op == "placeholder"
        ]
        propagate_shapes(program.gm, fakes)
    sizes = [
        n.meta["val"].numel()
        for n in program.gm.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].shape[-1:] == (V,)
    ]
    assert sizes and max(sizes) <= B * S // 4 * V


def _dtype(graph, name):
    return next(n.meta["val"].dtype for n in graph.nodes if n.name == name)
