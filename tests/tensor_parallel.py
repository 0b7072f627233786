"""Runs a model under a preset of tensor parallelism on simulated ranks, and counts bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autopar import autoplan
from autopar.ir.spec import ShardingSpec
from autopar.passes.apply_sharding import apply_sharding
from autopar.planner.planner import Planned
from autopar.runtime.distribute import shard_of
from autopar.schedule.build import schedule_of
from autopar.schedule.program import INPUT, Program, Schedule
from autopar.testing.live_memory import LiveMemory
from autopar.testing.simulated_ranks import Coords, SimulatedMesh
from tests.clusters import eager_to_shard
from tests.lowering import lowered, program_of


class Block(nn.Module):
    """Two products and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Branches(nn.Module):
    """Three products of one value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        return self.a(x) * self.b(x) * self.c(x)


class Blocks(nn.Module):
    """Some blocks and a loss."""

    def __init__(self, width: int, blocks: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(block(width) for _ in range(blocks)))

    def forward(self, x, y):
        return F.mse_loss(self.blocks(x), y)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """A transformer layer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """A table, layers, a head and its loss."""

    def __init__(self, width: int, heads: int, layers: int = 2, words: int = 24) -> None:
        super().__init__()
        self.table = nn.Embedding(words, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, ids, y):
        logits = self.head(self.norm(self.layers(self.table(ids))))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Case:
    """A model in float64 with its batch."""

    model: nn.Module
    batch: Mapping[str, torch.Tensor]

    @staticmethod
    def blocks(count: int, rows: int, width: int, block: type[nn.Module] = Block) -> Case:
        torch.manual_seed(0)
        x, y = torch.randn(2, rows, width, dtype=torch.float64)
        return Case(Blocks(width, count, block).double(), {"x": x, "y": y})

    @staticmethod
    def transformer(rows: int, length: int = 6, width: int = 16) -> Case:
        torch.manual_seed(0)
        ids, y = torch.randint(0, 24, (2, rows, length))
        return Case(Transformer(width, min(width, 4)).double(), {"ids": ids, "y": y})

    def plan(
        self, mesh: str, constraints: str | Mapping[str, str], *, overlaps: bool | None = None
    ) -> Planned:
        """On devices for which splitting pays (`eager_to_shard`)."""
        cluster = eager_to_shard(mesh, overlaps=overlaps)
        return autoplan(self.model, (), self.batch, cluster=cluster, constraints=constraints)


@dataclass(frozen=True)
class Measured:
    """What one rank did in a step.

    Args:
        error: the largest difference of the loss or a gradient from those of a single device.
        sent: bytes per mesh axis.
        parameters: bytes of its shards.
        kept: bytes that the forward left alive for the backward, without parameters and inputs.
    """

    error: float
    sent: tuple[float, ...]
    parameters: int
    kept: int


def measure(case: Case, planned: Planned, *, regather: bool = False) -> dict[Coords, Measured]:
    """Run one step on all ranks, by autograd.

    Args:
        regather: compile the step, keep shards instead of gathered copies, and gather again in the
            backward.
    """
    plan, graph = planned.plan, planned.graph
    model = case.model
    loss = model(**case.batch)
    names = list(graph.parameters.values())
    whole = dict(model.named_parameters())
    wanted = dict(zip(names, torch.autograd.grad(loss, [whole[n] for n in names]), strict=True))
    specs, cluster = plan.parameter_specs(), planned.space.cluster

    with SimulatedMesh(plan.mesh, timeout_s=60) as mesh:

        def local(tensor: torch.Tensor, spec: ShardingSpec, coords: Coords) -> torch.Tensor:
            return shard_of(tensor.detach(), spec, plan.mesh, coords).clone()

        def step_of(coords: Coords) -> tuple[list[torch.Tensor], Callable[..., Any]]:
            """Arguments and program of a rank. Tracing is not for threads."""
            program = apply_sharding(graph, plan, coords=coords, groups=mesh.groups[coords])
            shards = [local(whole[n], specs[n], coords).requires_grad_() for n in names]
            inputs = zip(case.batch.values(), program.input_specs, strict=True)
            arguments = shards + [local(x, spec, coords) for x, spec in inputs]
            if not regather:
                return arguments, program.gm
            if not schedules:  # all ranks run the same operators
                traced = program_of(program.gm, arguments, cluster=cluster)
                schedules.append(gathers_again(traced))
            return arguments, lowered(program.gm, arguments, schedules[0], cluster=cluster)

        schedules: list[Schedule] = []
        ranks = {coords: step_of(coords) for coords in mesh.groups}

        def run(coords: Coords) -> Measured:
            arguments, step = ranks[coords]
            shards = arguments[: len(names)]
            with LiveMemory() as memory:
                result = step(*arguments)[len(graph.mutations)]
                kept = sum(nbytes for _, nbytes in memory.changes)
            result.backward()
            errors = [float(abs(result.detach() - loss.detach()))]
            for n, shard in zip(names, shards, strict=True):
                expected = local(wanted[n], specs[n], coords)
                errors.append(float((shard.grad - expected).abs().max()))
            parameters = sum(s.nbytes for s in shards)
            return Measured(max(errors), mesh.sent_along(coords), parameters, kept)

        return mesh.run(run)


def gathers_again(program: Program) -> Schedule:
    """Keep what eager PyTorch keeps, but shards in place of what the forward gathers of them."""
    gathers = [program.ops[i] for i in program.forward if "all_gather" in program.ops[i].kind]
    shards = {s for op in gathers for s in op.reads if program.maker[s] != INPUT}
    return schedule_of(program, program.needed - {s for op in gathers for s in op.makes} | shards)
