"""All eight ranks of a 2x2x2 mesh in one process: float64 equality, three optimizer steps."""

import functools
import threading

import numpy as np
import pytest
import torch
from autopar.runtime.lower import lower

from autopar import autoplan
from autopar.comm.groups import thread_groups
from autopar.passes.apply_sharding import apply_sharding
from autopar.plan import ShardingPlan
from autopar.planner.planner import Planned, make_plan
from autopar.runtime.distribute import shard_of
from tests.clusters import eager_to_shard
from tests.models import CASES, OPTIMIZERS, reference

MESH = (2, 2, 2)
STEPS = 3
RANDOM_PLANS = 10  # seeds from 0, in two tests
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
            self.run = lower(
                self.program.gm, self.arguments(0), reshard_after_forward=reshard_after_forward,
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


def train_all(ranks: list[Rank]) -> None:
    errors: list[BaseException] = []

    def work(rank: Rank) -> None:
        try:
            rank.train()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(r,), daemon=True) for r in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    if errors:
        raise errors[0]
    assert not any(t.is_alive() for t in threads), "ranks wait for each other"


def largest_error(name: str, plan: ShardingPlan, optimizer: str, *, lowered: bool = False) -> float:
    losses, grads, parameters, buffers = reference(name, optimizer, STEPS)
    groups = thread_groups(MESH, timeout=60)
    ranks = [Rank(name, plan, c, g, optimizer, lowered) for c, g in groups.items()]
    train_all(ranks)
    worst = 0.0
    for rank in ranks:
        worst = max(worst, *(abs(a - b) for a, b in zip(rank.losses, losses, strict=True)))
        for n, spec in rank.specs.items():
            for got, want in [
                *((g[n], w[n]) for g, w in zip(rank.grads, grads, strict=True)),
                (rank.shards[n], parameters[n]),
            ]:
                expected = shard_of(want.detach(), spec, MESH, rank.coords)
                assert got.shape == expected.shape
                worst = max(worst, (got.detach() - expected).abs().max().item())
        for n in rank.graph.mutations:
            worst = max(worst, (rank.buffers[n] - buffers[n]).abs().max().item())
    return worst


@pytest.mark.parametrize("name", list(CASES))
def test_solver_plan_equals_single_device(name):
    plan = planned(name).plan
    assert any("S" in layout for layout in plan.choices.values()), "nothing was split"
    assert largest_error(name, plan, "adamw", lowered=True) < TOLERANCE


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("name", list(CASES))
def test_random_plans_equal_single_device(name, part):
    space = planned(name).space
    wrong = {}
    for seed in range(part, RANDOM_PLANS, 2):
        plan = make_plan(space, space.random_choices(np.random.default_rng(seed)), name)
        error = largest_error(name, plan, ["sgd", "adamw"][seed % 2])
        if not error < TOLERANCE:
            wrong[seed] = error
    assert not wrong, f"random plans (seed: error) {wrong}"
