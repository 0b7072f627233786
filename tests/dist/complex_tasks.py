"""What the ranks run to try complex values between ranks.

Every collective is linear with real coefficients: of a complex value it gives what it gives of the
real and of the imaginary part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar import auto_engine
from autopar.comm.groups import Group, find_group
from autopar.comm.steps import STEPS
from autopar.comm.world import process_groups, start
from autopar.ir.spec import chunk
from tests.clusters import eager_to_shard
from tests.dist.script_tasks import whole

_OPS = torch.ops.autopar
# A collective of a rank's tensor: it is given [5, 6] and the group.
Collective = Callable[[Tensor, Group], Any]


def _own(x: Tensor, dim: int, g: Group) -> Tensor:
    return x.narrow(dim, *chunk(x.shape[dim], g.size, g.index))


def _waited(buffer: Tensor) -> Tensor:
    _OPS.wait_in_place(buffer)
    return buffer


def _exchange(operator: Any) -> Collective:
    """Send k + 1 elements to rank k."""

    def call(x: Tensor, g: Group) -> Tensor:
        sent = [k + 1 for k in range(g.size)]
        row = x.reshape(-1)[: sum(sent)]
        return operator(row, sent, [g.index + 1] * g.size, g.name)

    return call


def _scatter_apart(x: Tensor, g: Group) -> Tensor:
    return _OPS.finish_reduce_scatter(
        _OPS.start_reduce_scatter(x, 0, g.name), 0, x.shape[0], g.name
    )


def _gather_many(x: Tensor, g: Group) -> Tensor:
    shards, sizes = [_own(x, 1, g), x], [6, 5 * g.size]
    return torch.cat([y.reshape(-1) for y in _OPS.all_gather_many(shards, [1, 0], sizes, g.name)])


COLLECTIVES: dict[str, Collective] = {
    "all_reduce": lambda x, g: _OPS.all_reduce(x, "sum", g.name),
    "start_all_reduce": lambda x, g: _waited(_OPS.start_all_reduce(x, "sum", g.name)),
    "all_reduce_many": lambda x, g: _OPS.all_reduce_many([x, x[0]], "sum", g.name),
    "all_gather of equal rows": lambda x, g: _OPS.all_gather(x, 0, 5 * g.size, g.name),
    "all_gather of parts": lambda x, g: _OPS.all_gather(_own(x, 1, g), 1, 6, g.name),
    "start_gather_rows": lambda x, g: _waited(_OPS.start_gather_rows(x, 0, 5 * g.size, g.name)),
    "start_all_gather": lambda x, g: _OPS.finish_all_gather(
        _OPS.start_all_gather(_own(x, 0, g), 0, 5, g.name), 0, 5
    ),
    "all_gather_many": _gather_many,
    "reduce_scatter": lambda x, g: _OPS.reduce_scatter(x, 0, g.name),
    "start_reduce_scatter": _scatter_apart,
    "reduce_scatter_many": lambda x, g: _OPS.reduce_scatter_many([x, x], [0, 1], g.name),
    "all_to_all": lambda x, g: _OPS.all_to_all(_own(x, 1, g), 1, 6, 0, g.name),
    "exchange": _exchange(_OPS.exchange),
    "start_exchange": _exchange(lambda *a: _waited(_OPS.start_exchange(*a))),
}  # fmt: skip

# The steps of conversions, with the value that each takes of [5, 6].
CONVERSIONS: dict[str, Collective] = {
    "all_gather": lambda x, g: STEPS["all_gather"](_own(x, 0, g), 0, 5, g.name),
    "all_gather_vary": lambda x, g: STEPS["all_gather_vary"](_own(x, 0, g), 0, 5, g.name),
    "slice": lambda x, g: STEPS["slice"](x, 0, g.name),
    "vary": lambda x, g: STEPS["vary"](x, g.name),
    "all_reduce": lambda x, g: STEPS["all_reduce"](x, g.name),
    "reduce_scatter": lambda x, g: STEPS["reduce_scatter"](x, 0, g.name),
    "all_to_all": lambda x, g: STEPS["all_to_all"](_own(x, 0, g), 0, 5, 1, g.name),
    "inject": lambda x, g: STEPS["inject"](x, g.name),
}


def _group() -> Group:
    cluster = eager_to_shard(str(dist.get_world_size()))
    (name,) = process_groups(start(cluster, torch.device("cpu")))
    return find_group(name)


def _values(dtype: torch.dtype, seed: int) -> Tensor:
    """Small whole numbers, so that sums are exact; they differ by rank."""
    generator = torch.Generator().manual_seed(seed + dist.get_rank())
    parts = torch.randint(-9, 9, (5, 6, 2), generator=generator)
    return torch.view_as_complex(parts.to(dtype.to_real()))


def collectives(dtype: torch.dtype) -> dict[str, bool]:
    """By collective, whether it treats a complex value as its parts."""
    group, x = _group(), _values(dtype, 0)
    found = {}
    for name, call in COLLECTIVES.items():
        parts = [call(part.contiguous(), group) for part in (x.real, x.imag)]
        found[name] = torch.equal(call(x.clone(), group), torch.complex(*parts))
    return found


def conversions(dtype: torch.dtype) -> dict[str, bool]:
    """By step, the same of its value and of its gradient."""
    group, x, weights = _group(), _values(dtype, 0), _values(dtype, 100)

    def results(name: str, part: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = part(x).clone().requires_grad_()
        value = CONVERSIONS[name](leaf, group)
        size = value.shape
        weight = part(weights)[tuple(slice(n) for n in size)].expand(size)
        (gradient,) = torch.autograd.grad(value, leaf, weight.contiguous())
        return value.detach(), gradient

    found = {}
    for name in CONVERSIONS:
        pairs = zip(results(name, torch.real), results(name, torch.imag), strict=True)
        expected = [torch.complex(*pair) for pair in pairs]
        found[name] = all(map(torch.equal, results(name, lambda t: t), expected))
    return found


class Rotary(nn.Module):
    """Rotary positions as Meta's Llama writes them, and a conjugate."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]), 10.0 ** -torch.arange(8)).to(x.dtype)
        turned = torch.polar(torch.ones_like(angles), angles)
        z = torch.view_as_complex(x.unflatten(-1, (8, 2)))
        for layer in self.layers:
            rows = torch.view_as_real(z * turned).flatten(-2)
            z = torch.view_as_complex(layer(rows).tanh().unflatten(-1, (8, 2))).conj()
        return (torch.view_as_real(z.resolve_conj()).flatten(-2) ** 3).sum()


def rotary(mesh: str, options: dict[str, Any]) -> tuple[float, set[str]]:
    """How far a step is from a single process's; and the layouts of complex values."""
    torch.manual_seed(0)
    alone, model = Rotary().double(), Rotary().double()
    model.load_state_dict(alone.state_dict())
    x = torch.randn(4, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    engine, _ = auto_engine(model, None, eager_to_shard(mesh), progress=False, **options)
    losses = engine(x), alone(x)
    worst = (losses[0] - losses[1]).abs().item()
    for loss in losses:
        loss.backward()
    for p, q in zip(engine.parameters(), alone.parameters(), strict=True):
        worst = max(worst, (whole(p.grad) - q.grad).abs().max().item())
    layouts = {v for k, v in engine.plan.layouts.items() if "complex" in k or "polar" in k}
    return worst, layouts
