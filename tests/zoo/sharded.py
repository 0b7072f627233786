"""A captured family on all ranks of a simulated mesh: the solver's plan and random ones, compared
number by number with the model itself."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from autopar import ColoTracer
from autopar.compile import autoplan
from autopar.ir.graph import ModelGraph
from autopar.passes.apply_sharding import LocalProgram, apply_sharding
from autopar.plan import ShardingPlan
from autopar.planner.planner import make_plan, trainable_inputs
from autopar.planner.space import SearchSpace
from autopar.runtime.distribute import shard_of
from autopar.testing.simulated_ranks import SimulatedMesh
from tests.clusters import eager_to_shard
from tests.lowering import lowered
from tests.planning import random_choices
from tests.zoo import check
from tests.zoo.examine import Outcome, first_line
from tests.zoo.family import Batch, Family

# relative to max(1, |reference|)
TOLERANCE = 1e-9
# the ranks of one simulated step meet at every collective
RANK_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Captured:
    """A family, traced, with what it gives on one device."""

    family: Family
    model: nn.Module
    batch: Batch
    graph: ModelGraph
    expected: check.Step


def capture(family: Family) -> Captured:
    """Without dropout, on the family's first batch.

    Libraries compute norms and losses in float32 whatever the model's type, and then no two orders
    of summation agree to more than seven digits. The proof is of the sharding, so both sides run
    the captured program with those steps in float64 (that the program is the model's is shown by
    `tests.zoo.examine`).
    """
    alone, model = family.build(), family.build()
    batch = family.batch(model, 0)
    graph = _in_double(ColoTracer().trace(model, (), batch))
    alone, model, batch = alone.double(), model.double(), pytree.tree_map(_wider, batch)
    return Captured(family, model, batch, graph, check.step(graph.bind(alone), alone, batch))


def _wider(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
        return value.to(torch.float64)
    return torch.float64 if value is torch.float32 else value


def _in_double(graph: ModelGraph) -> ModelGraph:
    """The same program with float64 for float32 throughout."""
    for node in graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(_wider, node.meta["val"])
        node.args = pytree.tree_map(_wider, node.args)
        node.kwargs = pytree.tree_map(_wider, node.kwargs)
        creates = node.op == "call_function" and not node.all_input_nodes
        if creates and getattr(node.meta["val"], "dtype", None) is torch.float64:
            node.kwargs = {**node.kwargs, "dtype": torch.float64}  # not the default type
    graph.gm.recompile()
    constants = {name: _wider(value) for name, value in graph.constants.items()}
    return replace(graph, constants=constants, casts={})


@dataclass(frozen=True)
class Sharded:
    """A family's plans on one mesh.

    Args:
        plans: the solver's, then random legal ones.
        unruled_share: of the predicted compute time on one device, what operators without a rule
            take.
        split: whether the solver splits any operator.
    """

    plans: tuple[ShardingPlan, ...]
    unruled_share: float
    split: bool


def plans_of(captured: Captured, mesh: str, *, random: int, time_limit: float = 3.0) -> Sharded:
    """The solver's plan on fast links, which splits whatever it can, and random ones."""
    planned = autoplan(
        captured.model,
        (),
        captured.batch,
        cluster=eager_to_shard(mesh),
        graph=captured.graph,
        time_limit=time_limit,
    )
    space = planned.space
    name = type(captured.model).__name__
    plans = [planned.plan]
    # on three axes the orders multiply, and two show what there is to go wrong
    any_order = len(space.mesh) < 3
    every = SearchSpace(captured.graph, space.cluster, space.workload, any_order=any_order)
    for seed in range(random):
        choices = random_choices(every, np.random.default_rng(seed))
        plans.append(make_plan(every, choices, name))
    ops = [decision for decision in space.decisions if decision.kind == "op"]
    # the first strategy of every operator is full replication
    compute_us = {decision.node: float(decision.parts["compute_us"][0]) for decision in ops}
    unruled = sum(compute_us[node] for node in space.unruled)
    split = any(
        decision.candidates[choice].strategy.splits
        for decision, choice in zip(space.decisions, planned.choices, strict=True)
        if decision.kind == "op" and decision.candidates[choice].strategy is not None
    )
    return Sharded(tuple(plans), unruled / max(sum(compute_us.values()), 1e-30), split)


def examine_plans(
    outcome: Outcome, family: Family, mesh: str, random: int, *, lower: bool = False
) -> Outcome:
    """Plan a captured family for the mesh and run the plans; adds what became of them."""
    try:
        captured = capture(family)
        start = time.perf_counter()
        sharded = plans_of(captured, mesh, random=random)
    except Exception as error:
        return replace(outcome, plan_reason=f"not planned: {first_line(error)}")
    outcome = replace(
        outcome,
        plans=len(sharded.plans),
        split=sharded.split,
        unruled=sharded.unruled_share,
        plan_s=time.perf_counter() - start,
    )
    if captured.graph.random:
        return replace(outcome, plans=0, plan_reason="draws random numbers: not compared")
    for number, plan in enumerate(sharded.plans):
        try:
            worst, size = worst_difference(captured, plan, lower=lower)
        except Exception as error:
            worst, size = first_line(error), math.inf
        if size <= TOLERANCE:
            outcome = replace(outcome, plans_equal=outcome.plans_equal + 1)
        elif not outcome.plan_reason:
            outcome = replace(outcome, plan_reason=f"plan {number}: {worst[:160]}: {size:.1e}")
    return outcome


def worst_difference(
    captured: Captured, plan: ShardingPlan, *, lower: bool = False
) -> tuple[str, float]:
    """Where any rank's loss, results, buffers or gradient shards differ most from one device's.

    Args:
        lower: run the forward and backward graph after the passes, as the engine does.
    """
    differences = [
        difference
        for coords, step in steps_of(captured, plan, lower=lower).items()
        for difference in check.differences(step, _expected(captured, plan, coords))
    ]
    return max(differences, key=lambda pair: pair[1])


def steps_of(
    captured: Captured, plan: ShardingPlan, *, lower: bool = False
) -> dict[tuple[int, ...], check.Step]:
    """One step of a plan on every simulated rank, by coordinates."""
    with SimulatedMesh(plan.mesh, timeout_s=RANK_TIMEOUT_S) as mesh:
        ranks = {c: Rank(captured, plan, c, groups) for c, groups in mesh.groups.items()}
        for rank in ranks.values() if lower else ():
            rank.lower()
        return mesh.run(lambda coords: ranks[coords].step())


def _expected(captured: Captured, plan: ShardingPlan, coords: tuple[int, ...]) -> check.Step:
    """One device's step, in the shards of a rank."""
    reference, specs = captured.expected, plan.parameter_specs()
    gradients = {}
    for name in captured.graph.parameters.values():
        gradient = reference.gradients.get(name)
        gradients[name] = (
            None if gradient is None else shard_of(gradient, specs[name], plan.mesh, coords)
        )
    return check.Step(
        reference.structure, reference.results, reference.loss, gradients, reference.buffers
    )


class Rank:
    """One rank: shards of the weights, the program of its place on the mesh."""

    def __init__(
        self,
        captured: Captured,
        plan: ShardingPlan,
        coords: tuple[int, ...],
        groups: tuple[str, ...],
    ) -> None:
        self.captured, self.coords, self.mesh = captured, coords, plan.mesh
        graph = captured.graph
        self.specs, self.reshard = plan.parameter_specs(), plan.reshard_after_forward
        trainable = trainable_inputs(graph, captured.model)
        self.program: LocalProgram = apply_sharding(
            graph, plan, coords=coords, groups=groups, trainable=trainable
        )
        self._run: Any = self.program.gm
        parameters = dict(captured.model.named_parameters(remove_duplicate=False))
        self.shards = {}
        for name in graph.parameters.values():
            shard = self._part(parameters[name].detach(), name).clone()
            update = graph.updates.get(name)
            shard = shard if update is None else update(shard)
            self.shards[name] = shard.requires_grad_(parameters[name].requires_grad)
        self.buffers = {
            n: b.clone() for n, b in captured.model.named_buffers(remove_duplicate=False)
        }

    def _part(self, value: torch.Tensor, name: str) -> torch.Tensor:
        return shard_of(value, self.specs[name], self.mesh, self.coords)

    def lower(self) -> None:
        """Run what the engine runs: the forward and backward graph, after the passes."""
        names = list(self.captured.graph.parameters.values())
        again = frozenset(map(names.index, self.reshard))
        # the simulated ranks have no process groups, which functional collectives need
        options = {"disable": frozenset({"functional_collectives"}), "reshard_after_forward": again}
        self._run = lowered(self.program.gm, self._flat(), **options)

    def _flat(self) -> list[Any]:
        """What the program is called with."""
        graph, leaves = self.captured.graph, pytree.tree_leaves(((), self.captured.batch))
        flat: list[Any] = [self.shards[n] for n in graph.parameters.values()]
        flat += [self.buffers[n].clone() for n in graph.buffers.values()]
        flat += graph.constants.values()
        tensors = [x for x, name in zip(leaves, graph.inputs, strict=True) if name is not None]
        flat += [
            shard_of(x, spec, self.mesh, self.coords).contiguous()
            for x, spec in zip(tensors, self.program.input_specs, strict=True)
        ]
        if self.program.takes_seed:
            flat.append(torch.tensor(0))
        return flat

    def step(self) -> check.Step:
        graph = self.captured.graph
        results = list(self._run(*self._flat()))
        count = len(graph.mutations)
        for name, value in zip(graph.mutations, results[:count], strict=True):
            self.buffers[name] = value.detach()
        user = results[count : count + graph.out_spec.num_leaves]
        returned = pytree.tree_unflatten(user, graph.out_spec)
        loss = check.loss_of(returned)
        loss.backward()
        return check.Step(
            structure=check.structure(returned),
            results={n: t.detach() for n, t in check.tensors(returned)},
            loss=loss.detach(),
            gradients={n: s.grad for n, s in self.shards.items()},
            buffers=self.buffers,
        )
