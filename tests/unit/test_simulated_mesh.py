"""All eight ranks of a 2x2x2 mesh in one process: float64 equality, three optimizer steps."""

import functools

import numpy as np
import pytest
import torch

from autopar import autoplan
from autopar.passes.apply_sharding import apply_sharding
from autopar.plan import ShardingPlan
from autopar.planner.planner import Planned, make_plan
from autopar.runtime.distribute import shard_of
from autopar.testing.simulated_ranks import SimulatedMesh
from tests.clusters import eager_to_shard
from tests.lowering import lowered as lowered_program
from tests.models import CASES, OPTIMIZERS, reference
from tests.planning import random_choices

MESH = (2, 2, 2)
STEPS = 3
RANDOM_PLANS, PARTS = 4, 2
TOLERANCE = 1e-9


@functools.cache
def planned(name: str) -> Planned:
    case = CASES[name]
    return autoplan(case.build(), (), case.batch(0), cluster=eager_to_shard("2x2x2"), time_limit=20)


class Rank:
    """One rank of the simulated mesh, trained with plain tensors for shards."""

    def __init__(self, name: str, plan: ShardingPlan, coords, groups, optimizer: str, lowered):
        self.case, self.coords = CASES[name], coords
        graph = self.graph = planned(name).graph
        self.program = apply_sharding(graph, plan, coords=coords, groups=groups)
        model = self.case.build()
        self.specs = plan.parameter_specs()
        whole = dict(model.named_parameters())
        self.shards = {
            n: torch.nn.Parameter(shard_of(whole[n].detach(), self.specs[n], MESH, coords).clone())
            for n in graph.parameters.values()
        }
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.optimizer = OPTIMIZERS[optimizer](list(self.shards.values()))
        self.losses: list[float] = []
        self.grads: list[dict[str, torch.Tensor]] = []
        reshard_after_forward = [
            i for i, n in enumerate(graph.parameters.values()) if n in plan.reshard_after_forward
        ]
        self.run = self.program.gm
        if lowered:
            self.run = lowered_program(
                self.program.gm, self.arguments(0),
                reshard_after_forward=frozenset(reshard_after_forward),
                cluster=eager_to_shard("2x2x2", overlaps=True),
            )  # fmt: skip

    def arguments(self, step: int) -> list[torch.Tensor]:
        batch = list(self.case.batch(step).values())
        flat = [self.shards[n] for n in self.graph.parameters.values()]
        flat += [self.buffers[n].clone() for n in self.graph.buffers.values()]
        return flat + [
            shard_of(x, spec, MESH, self.coords).contiguous()
            for x, spec in zip(batch, self.program.input_specs, strict=True)
        ]

    def train(self) -> None:
        for step in range(STEPS):
            results = self.run(*self.arguments(step))
            count = len(self.graph.mutations)
            loss = results[count]
            self.optimizer.zero_grad()
            loss.backward()
            self.losses.append(loss.item())
            self.grads.append({n: p.grad.clone() for n, p in self.shards.items()})
            self.optimizer.step()
            self.buffers |= {
                n: b.detach() for n, b in zip(self.graph.mutations, results[:count], strict=True)
            }


def largest_error(name: str, plan: ShardingPlan, optimizer: str, *, lowered: bool = False) -> float:
    losses, grads, parameters, buffers = reference(name, optimizer, STEPS)
    with SimulatedMesh(MESH, timeout_s=60) as mesh:
        ranks = {c: Rank(name, plan, c, g, optimizer, lowered) for c, g in mesh.groups.items()}
        mesh.run(lambda coords: ranks[coords].train())
    worst = 0.0
    for rank in ranks.values():
        worst = max(worst, *(abs(a - b) for a, b in zip(rank.losses, losses, strict=True)))
        for n, spec in rank.specs.items():
            for shard, tensor in [
                *((g[n], w[n]) for g, w in zip(rank.grads, grads, strict=True)),
                (rank.shards[n], parameters[n]),
            ]:
                expected = shard_of(tensor.detach(), spec, MESH, rank.coords)
                assert shard.shape == expected.shape
                worst = max(worst, (shard.detach() - expected).abs().max().item())
        for n in rank.graph.mutations:
            worst = max(worst, (rank.buffers[n] - buffers[n]).abs().max().item())
    return worst


@pytest.mark.parametrize("name", ["mlp", "gpt2"])  # others on real processes, in tests/dist
def test_solver_plan_equals_single_device(name):
    plan = planned(name).plan
    assert any("S" in layout for layout in plan.choices.values()), "nothing was split"
    assert largest_error(name, plan, "adamw", lowered=True) < TOLERANCE


@pytest.mark.sample(0.25)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", list(CASES))
def test_random_plans_equal_single_device(name, part):
    space = planned(name).space
    wrong = {}
    for seed in range(part, RANDOM_PLANS, PARTS):
        plan = make_plan(space, random_choices(space, np.random.default_rng(seed)), name)
        error = largest_error(name, plan, ["sgd", "adamw"][seed % 2])
        if not error < TOLERANCE:
            wrong[seed] = error
    assert not wrong, f"random plans (seed: error) {wrong}"
