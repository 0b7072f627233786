"""Parameters and gradients as users touch them between forward and step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import Model, data, fit, gap, mlp, pair, sgd, squares, tokens

_SPARSE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": sgd,
    "SparseAdam": lambda q: torch.optim.SparseAdam(q.parameters(), lr=0.1),
}


@case("DeepSpeed#1416, pytorch#80496", kind=tuple(_SPARSE), may_refuse=True)
def sparse_gradients(wrap: Wrap, kind: str) -> Found:
    """`nn.Embedding(sparse=True)` trains, with no gradient skipped."""
    runs = pair(wrap, nn.Sequential(nn.Embedding(200, 16, sparse=True)), _SPARSE[kind])

    def loss(q: Model, step: int) -> torch.Tensor:
        return F.mse_loss(q(tokens(step, 200, 16)), data(step, 16, 16))

    fit(runs, loss)
    return {"parameters": gap(runs[1].model, runs[0].model)}


@case("pytorch#30439", search=(None, "strong_wolfe"), may_refuse=True)
def lbfgs(wrap: Wrap, search: str | None) -> Found:
    """LBFGS evaluates a closure several times a step, on layers that are split."""

    def optimizer(q: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(q.parameters(), lr=0.5, max_iter=5, line_search_fn=search)

    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    split = {"0.weight": "S0R", "2.weight": "RS0"}
    runs = pair(wrap, model, optimizer, constraints=split)
    x, y = data(0, 32, 8), data(1, 32, 1)
    for _ in range(3):
        for run in runs:

            def closure(run=run) -> torch.Tensor:
                run.optimizer.zero_grad()
                loss = F.mse_loss(run.model(x), y)
                loss.backward()
                return loss

            run.optimizer.step(closure)
    return {"parameters": gap(runs[1].model, runs[0].model)}


_NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@case("pytorch#61470, pytorch#102981", kind=tuple(_NORMS), may_refuse=True)
def reparametrized_weight(wrap: Wrap, kind: str) -> Found:
    """Weights that hooks or parametrizations compute."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(_NORMS[kind](nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 4))

    # built twice: a weight that a hook has computed cannot be copied deeply
    alone, inner = build(), build()
    one, other = sgd(alone), sgd(inner)
    engine, other = wrap(inner, other)
    for step in range(3):
        for model, optimizer in ((alone, one), (engine, other)):
            optimizer.zero_grad()
            squares(8, 16, 4)(model, step).backward()
            optimizer.step()
    return {"parameters": gap(engine, alone)}


_PENALTIES: dict[str, Callable[[Model], torch.Tensor]] = {
    "l2": lambda q: 1e-2 * sum(p.pow(2).sum() for p in q.parameters()),
    "l1": lambda q: 1e-2 * sum(p.abs().sum() for p in q.parameters()),
    "orthogonal": lambda q: (q[0].weight.T @ q[0].weight - torch.eye(16)).pow(2).mean(),
    "beside a tensor": lambda q: F.linear(torch.ones(3, 16), q[0].weight).pow(2).mean(),
    "norm": lambda q: torch.stack([p.norm() for p in q.parameters()]).sum(),
}


@case("SimCLR heads, ArcFace, tied decoders", kind=tuple(_PENALTIES), may_refuse=True)
def penalty_outside(wrap: Wrap, kind: str) -> Found:
    """The loop adds a penalty on parameters to the loss."""
    split = {"0.weight": "S0R", "2.weight": "RS0"}
    runs = pair(wrap, mlp(16, 32, 4), constraints=split)
    fit(runs, lambda q, step: squares(8, 16, 4)(q, step) + _PENALTIES[kind](q), 2)
    return {"parameters": gap(runs[1].model, runs[0].model)}


def _mask() -> torch.Tensor:
    return (torch.arange(64) >= 40).to(torch.get_default_dtype())[:, None]


_EDITS: dict[str, Callable[[torch.Tensor], object]] = {
    "grad[:40] = 0": lambda g: g.__setitem__(slice(0, 40), 0),
    "grad[:40].zero_()": lambda g: g[:40].zero_(),
    "grad[ids] = 0": lambda g: g.__setitem__(torch.arange(40), 0),
    "grad *= mask": lambda g: g.mul_(_mask()),
    "grad.data[:40] = 0": lambda g: g.data.__setitem__(slice(0, 40), 0),
}


@case("new tokens only", edit=tuple(_EDITS), may_refuse=True)
def rows_of_the_gradient(wrap: Wrap, edit: str) -> Found:
    """Rows of the embedding's gradient are set to zero before the step."""
    model = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))
    runs = pair(
        wrap, model, lambda q: torch.optim.SGD(q.parameters(), lr=1.0),
        constraints={"0.weight": "S0R"},
    )  # fmt: skip
    ids = torch.arange(64).reshape(8, 8)
    for run in runs:
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(ids).flatten(0, 1), ids.flatten()).backward()
        _EDITS[edit](run.model[0].weight.grad)
        run.optimizer.step()
    return {"parameters": gap(runs[1].model, runs[0].model)}
