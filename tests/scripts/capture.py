"""Programs that broke capture: what the Python around the operators does holds, or is refused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.custom_functions import Scale
from tests.scripts.case import Found, Wrap, case
from tests.scripts.helpers import Model, apart, data, gap, gradient_gap, pair


def one_step(wrap: Wrap, model: nn.Module, *inputs: torch.Tensor) -> Found:
    """The loss that a model returns, and its gradients, beside those of one process."""
    runs = pair(wrap, model)
    losses = [run.model(*inputs) for run in runs]
    for loss in losses:
        loss.backward()
    alone, engine = (run.model for run in runs)
    return {"loss": apart(*losses), "gradients": gradient_gap(engine, alone)}


class Scaled(nn.Module):
    """A block whose share of the sum is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x) * self.depth


class Stack(nn.Module):
    """Sets each block's attribute right before calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: Model = nn.ModuleList(Scaled() for _ in range(4))

    def forward(self, x: torch.Tensor, k: int) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            block.depth = i * k
            x = block(x)
        return x.square().mean()


@case("an attribute set on each of alike blocks before it is called")
def attribute_set_in_the_loop(wrap: Wrap) -> Found:
    """Each block reads its own value, on a new model and where an earlier call has left values."""
    runs = pair(wrap, Stack())
    found: Found = {}
    for k in (1, 2):
        for run in runs:
            run.optimizer.zero_grad()
        losses = [run.model(data(k, 4, 8), k) for run in runs]
        for loss in losses:
            loss.backward()
        alone, engine = (run.model for run in runs)
        found |= {f"loss, k={k}": apart(*losses), f"gradients, k={k}": gradient_gap(engine, alone)}
    return found


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.cond(x.sum() > 0, torch.tanh, torch.sigmoid, (self.a(x),))
        return h.square().mean()


@case("torch.cond", may_refuse=True, says="torch.cond")
def cond(wrap: Wrap) -> Found:
    """A branch by `torch.cond` on values."""
    return one_step(wrap, Branches(), data(0, 4, 8))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


class DrawnSize(nn.Module):
    """The number of rows that go through the blocks is drawn from values."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.blocks = nn.ModuleList(Residual() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = self.blocks[0](x) if self.source == "activations" else x
        h = x[0, torch.arange((values > 0).sum(1).max()) % 6]
        for block in self.blocks:
            h = block(h)
        return h.square().mean()


@case("a size drawn from values", source=("activations", "inputs"), may_refuse=True)
def size_in_blocks(wrap: Wrap, source: str) -> Found:
    """A size drawn from values, then a stack of blocks."""
    return one_step(wrap, DrawnSize(source), data(0, 4, 6, 8))


@case("frozen batch norms in fine-tuning")
def frozen_norm_among_blocks(wrap: Wrap) -> Found:
    """One of several alike blocks has its batch norm in evaluation mode."""
    model: Model = nn.Sequential(
        *(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)) for _ in range(4))
    )
    model[2].eval()
    runs = pair(wrap, model)
    results = [run.model(data(0, 4, 8)).square().mean() for run in runs]
    for result in results:
        result.backward()
    alone, engine = (run.model for run in runs)
    return {
        "loss": apart(*results),
        "gradients": gradient_gap(engine, alone),
        "statistics": max(
            apart(a.double(), b.double())
            for a, b in zip(engine.buffers(), alone.buffers(), strict=True)
        ),
    }


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.loss = nn.Linear(8, 2), nn.Linear(8, 2), nn.GaussianNLLLoss()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.loss(self.a(x), y, F.softplus(self.b(x)))


@case("nn.GaussianNLLLoss", may_refuse=True)
def gaussian_loss(wrap: Wrap) -> Found:
    """torch's own check `if torch.any(var < 0): raise`."""
    return one_step(wrap, Gaussian(), data(0, 4, 8), data(1, 4, 2))


def doubled(gradient: torch.Tensor) -> torch.Tensor:
    return gradient * 2


class Hooked(nn.Module):
    """Doubles gradients by a hook of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(8, 8), nn.Linear(8, 4), kind

    def register(self) -> None:
        if self.kind == "module":
            self.b.register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,))
        if self.kind == "parameter":
            self.a.weight.register_hook(doubled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.a(x))
        if self.kind == "tensor" and h.requires_grad:
            h.register_hook(doubled)
        return self.b(h).square().mean()


@case(
    "gradient clipping and scaling by hooks",
    kind=("none", "tensor", "module", "parameter"), may_refuse=True,
)  # fmt: skip
def hooks_that_change_gradients(wrap: Wrap, kind: str) -> Found:
    """Tensor hooks, module backward hooks, and hooks of parameters set before auto_engine."""
    torch.manual_seed(0)
    alone = Hooked(kind)
    torch.manual_seed(0)  # built twice: a copy has no hooks on its parameters
    inner = Hooked(kind)
    for model in (alone, inner):
        model.register()
    engine, _ = wrap(inner, torch.optim.SGD(inner.parameters(), lr=0.1))
    for model in (alone, engine):
        model(data(0, 4, 8)).backward()
    return {"gradients": gradient_gap(engine, alone)}


class ScaledByItself(nn.Module):
    """Multiplies by a value that was computed in inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            scale = self.a(x).square().mean()
        return (self.a(x) * scale.clone()).square().mean()


@case("torch.inference_mode in a forward", may_refuse=True)
def inference_mode_inside(wrap: Wrap) -> Found:
    """What is computed in inference mode has no gradient."""
    return one_step(wrap, ScaledByItself(), data(0, 4, 8))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        result, _ = nn.utils.rnn.pad_packed_sequence(self.l(packed)[0], batch_first=True)
        return result.square().mean()


@case("pack_padded_sequence with lengths as inputs")
def packed_sequence(wrap: Wrap) -> Found:
    """Packed around an LSTM, padded to the longest."""
    return one_step(wrap, Packed(), data(0, 4, 6, 8), torch.tensor([6, 4, 3, 2]))


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.a.weight.clamp_(-0.1, 0.1)
        return self.a(x).square().mean()


@case("weight clipping in the forward", may_refuse=True)
def parameter_written(wrap: Wrap) -> Found:
    """A parameter clamped under no_grad is clamped, and has a gradient."""
    runs = pair(wrap, Clamped())
    for run in runs:
        run.step(lambda q: q(data(0, 4, 8)))
    alone, engine = (run.model for run in runs)
    return {"parameters": gap(engine, alone), "gradients": gradient_gap(engine, alone)}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=True)).square().mean()


@case("checkpoint(..., use_reentrant=True) in a model that returns its loss", may_refuse=True)
def reentrant_checkpoint(wrap: Wrap) -> Found:
    """The captured program has the gradients of eager."""
    return one_step(wrap, Checkpointed(), data(0, 4, 8))


class AsksForGradient(nn.Module):
    """Adds a term if the result of a custom function requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = Scale.apply(x, self.w)
        loss = (x * self.b).square().mean()
        return loss + y.square().mean() if y.requires_grad else loss


@case("requires_grad of the result of a custom function")
def requires_grad_inside(wrap: Wrap) -> Found:
    """`requires_grad` of intermediate values is true to eager during capture."""
    return one_step(wrap, AsksForGradient(), data(0, 4, 4))
