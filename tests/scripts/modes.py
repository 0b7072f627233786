"""What a program depends on: frozen parameters, modes, attributes, arguments, shapes."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import (
    Model,
    Run,
    apart,
    buffer_gaps,
    data,
    fit,
    gap,
    mlp,
    pair,
    programs,
    sgd,
    squares,
    tokens,
)  # fmt: skip

# What changes at every step becomes an input after its second value: one program with the first
# value, one with the second, one for all.
PROGRAMS = 3


class Lora(nn.Module):
    """A frozen layer with an adapter beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 2 * self.b(self.a(x))


@case("peft, llm-foundry#414, pytorch#91167")
def lora(wrap: Wrap) -> Found:
    """Adapters train beside frozen weights, which get no gradient."""

    def of_adapters(q: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in q.parameters() if p.requires_grad], lr=1e-2)

    head = nn.Linear(64, 8).requires_grad_(False)
    model = nn.Sequential(Lora(nn.Linear(64, 128)), nn.GELU(), Lora(nn.Linear(128, 64)), head)
    runs = pair(wrap, model, of_adapters)
    fit(runs, squares(16, 64, 8), 4)
    alone, engine = (run.model for run in runs)
    squares(16, 64, 8)(engine, 3).backward()
    frozen = [p for p in engine.parameters() if not p.requires_grad]
    return {
        "parameters": gap(engine, alone),
        "frozen weights without gradient": all(p.grad is None for p in frozen),
    }


@case("fairscale#605, pytorch#104148", then=("thawed", "frozen"))
def backbone_midway(wrap: Wrap, then: str) -> Found:
    """A backbone frozen for some steps and then trained, and the other way round."""

    def momentum(q: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(q.parameters(), lr=0.1, momentum=0.9)

    model = mlp(32, 64, 8)
    model[0].requires_grad_(then == "frozen")
    runs = pair(wrap, model, momentum)
    fit(runs, squares(16, 32, 8), 2)
    for run in runs:
        run.model[0].requires_grad_(then == "thawed")
    fit(runs, squares(16, 32, 8), range(2, 4))
    lacking = [[p.grad is None for p in run.model.parameters()] for run in runs]
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        "gradients where one process has them": lacking[0] == lacking[1],
    }


@case("a loss before training, a summary of shapes, a teacher's pass")
def no_grad_first(wrap: Wrap) -> Found:
    """The first call is under `torch.no_grad` in training mode; then the same shapes train."""
    runs = pair(wrap, mlp(16, 32, 4))
    with torch.no_grad():
        before = apart(*(run.model(data(0, 16, 16)) for run in runs))
    fit(runs, squares(16, 16, 4))
    return {"before": before, "parameters": gap(runs[1].model, runs[0].model)}


class Annealed(nn.Module):
    """An autoencoder whose loss weighs a penalty by an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec, self.beta = nn.Linear(32, 16), nn.Linear(16, 32), 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.enc(x)
        return F.mse_loss(self.dec(z), x) + self.beta * z.pow(2).mean()


@case("schedules of beta-VAE, Gumbel, drop-path", of=("model", "engine"))
def attribute_annealed(wrap: Wrap, of: str) -> Found:
    """The loop sets a number on the user's model, or on the engine, before each step."""
    alone = Annealed()
    inner = copy.deepcopy(alone)
    runs = Run(alone, sgd(alone)), Run(*wrap(inner, sgd(inner)))
    for step in range(4):
        alone.beta = step / 2
        (inner if of == "model" else runs[1].model).beta = step / 2
        fit(runs, lambda q, s: q(data(s, 16, 32)), range(step, step + 1))
    return {"parameters": gap(runs[1].model, alone)}


class Tempered(nn.Module):
    """Its result is divided by an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(32, 32), nn.GELU())))

    def forward(self, x: torch.Tensor, tau: float) -> torch.Tensor:
        return self.a(x) / tau


@case("diffusion, annealing")
def number_argument(wrap: Wrap) -> Found:
    """A number that differs at each step is an argument, and a step costs no capture."""
    runs = pair(wrap, Tempered())

    def loss(q: Model, step: int) -> torch.Tensor:
        return F.mse_loss(q(data(step, 16, 32), 1.0 / (step + 1)), data(step + 9, 16, 32))

    fit(runs, loss, 6)
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        f"{PROGRAMS} programs for 6 values": programs(runs[1].model) <= PROGRAMS,
    }


@case("dynamic padding of accelerate and trl")
def variable_lengths(wrap: Wrap) -> Found:
    """Each batch has another sequence length, and a new length costs no planning from scratch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=1, n_embd=32, n_head=4, vocab_size=96, n_positions=128,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    runs = pair(wrap, GPT2LMHeadModel(config).double())
    lengths = (16, 17, 31, 40, 16)

    def loss(q: Model, step: int) -> torch.Tensor:
        ids = tokens(step, 96, 8, lengths[step])
        return q(input_ids=ids, labels=ids).loss

    fit(runs, loss, len(lengths))
    return {
        "parameters": gap(runs[1].model, runs[0].model),
        f"{PROGRAMS} programs for 4 lengths": programs(runs[1].model) <= PROGRAMS,
    }


@case("lazy modules")
def lazy_modules(wrap: Wrap) -> Found:
    """Sizes that are not known before the first batch."""
    model = nn.Sequential(
        nn.LazyConv1d(8, 3), nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.LazyLinear(4)
    )
    runs = pair(wrap, model)
    found: Found = {}
    for step in range(2):
        for run in runs:
            torch.manual_seed(step)  # the first batch draws values
            run.optimizer.zero_grad()
            F.mse_loss(run.model(data(step, 8, 3, 8)), data(9, 8, 4)).backward()
            run.optimizer.step()
        found[f"parameters after step {step}"] = gap(runs[1].model, runs[0].model)
    return found


@case("pytorch#62967, pytorch#22192")
def tiny_batch_norm(wrap: Wrap) -> Found:
    """BatchNorm with two and three samples over the ranks, without momentum, without affine."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, affine=False),
    )  # fmt: skip
    runs = pair(wrap, model)
    samples = (2, 2, 3)

    def loss(q: Model, step: int) -> torch.Tensor:
        n = samples[step]
        return F.mse_loss(q(data(step, n, 3, 6, 6)), data(step + 9, n, 4, 6, 6))

    fit(runs, loss)
    alone, engine = (run.model for run in runs)
    return {"parameters": gap(engine, alone)} | buffer_gaps(engine, alone)
