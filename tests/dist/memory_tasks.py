"""What the ranks run to try memory: budgets, what is recomputed, on the host, in microbatches."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from autopar import ShardingPlan, auto_engine
from autopar.cluster.link import Link
from autopar.comm.offloaded_parameters import evicted_shard
from autopar.errors import InfeasibleError
from autopar.testing.live_memory import LiveMemory, training_state_bytes
from tests.clusters import eager_to_shard
from tests.dist.engine_tasks import batch, difference
from tests.models import CASES, Classifier, LanguageModel, words


def memory(mesh: str, budget: str | None) -> dict[str, float]:
    """Predicted and measured bytes of a GPT-2 step."""
    torch.manual_seed(0)
    model: nn.Module = LanguageModel(layers=2, vocabulary=1001)
    optimizer: Any = torch.optim.AdamW(model.parameters())
    cluster = eager_to_shard(mesh)
    model, optimizer = auto_engine(model, optimizer, cluster, memory=budget)
    ids = torch.randint(0, 101, (16, 16), generator=torch.Generator().manual_seed(0))
    for measured in (False, True):  # the first step compiles
        held = training_state_bytes(model, optimizer)
        live = LiveMemory()
        with live if measured else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(input_ids=ids, labels=ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    m = model.plan.memory
    return {
        "predicted": m.total_bytes,
        "measured": sum(held.values()) + live.peak,
        "parameters": held["parameters"] / m.parameters_bytes,
        "optimizer": held["optimizer"] / m.optimizer_bytes,
    }


def _base(name: str) -> str:
    """The name of a node without the numbers of its copies."""
    return re.sub(r"(_\d+)+$", "", name)


def recomputed(
    name: str, dropout: float, share: float, mesh: str, overlaps: bool = False
) -> dict[str, Any]:
    """Train two steps with everything kept, and with a share of that memory: how far gradients and
    buffers are apart, the peaks, and what runs again.

    Args:
        overlaps: with less memory, collectives run beside compute.
    """
    case = CASES[name]

    def train(memory: float, plan: ShardingPlan | None) -> tuple[Any, ...]:
        torch.manual_seed(0)
        model: nn.Module = LanguageModel(dropout=dropout) if name == "gpt2" else case.make()
        model = model.double().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        cluster = eager_to_shard(mesh, overlaps=overlaps and plan is not None)
        engine, optimizer = auto_engine(model, optimizer, cluster, memory=memory, plan=plan)
        state = []
        for step in range(2):
            optimizer.zero_grad()
            batch = case.batch(step)
            live = LiveMemory()
            with live if step else nullcontext():  # the first step compiles
                engine(**batch).backward()
            state += [p.grad.to_local().clone() for p in model.parameters()]
            optimizer.step()
        held = sum(training_state_bytes(model, optimizer).values())
        state += [b.clone() for b in model.buffers()]
        return state, engine, held, live.peak

    expected, ample, held, _ = train(2**30, None)
    most = torch.tensor(held + share * ample.memory_plan.peak_bytes)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    state, engine, _, measured = train(most.item(), ample.plan)
    planned = engine.memory_plan
    (step,) = engine.steps
    lowered, events = step.compiled.lowered, planned.timeline.events
    graphs = lowered.forward, lowered.backward
    scheduled = events[: planned.timeline.forward], events[planned.timeline.forward :]
    for graph, part in zip(graphs, scheduled, strict=True):
        calls = Counter(_base(n.name) for n in graph.graph.nodes if "makes" in n.meta)
        computed = [m for m in part if m.resource == "compute" and not _is_finish(m.name)]
        wanted = Counter(_base(m.name) for m in computed)
        assert {k: calls[k] for k in wanted} == wanted  # the plan is in force: nothing is merged
    return {
        "error": max((a - b).abs().max().item() for a, b in zip(state, expected, strict=True)),
        "peak": planned.peak_bytes,
        "measured": measured,
        "ahead": [_ahead(graph) for graph in graphs],
        "ample": ample.memory_plan.peak_bytes,
        "again": [m.name for m in events if m.recomputed],
        "gathered": sum(m.recomputed and m.resource == "communication" for m in events),
    }


def parameters_on_host(mesh: str, overlaps: bool) -> dict[str, Any]:
    """Train three steps beside a single device, in the smallest memory: the largest difference, the
    peaks, and what was on the host.

    Args:
        overlaps: collectives run beside compute; else shards are uneven.
    """
    cluster = eager_to_shard(mesh, overlaps=overlaps)
    cluster = replace(cluster, host_link=Link(1e-9, 1e-15))

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = (Classifier(68, 404) if overlaps else Classifier()).double()
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    try:
        auto_engine(
            *built(), cluster, memory="1kB", microbatches=1, example_inputs=words(0)
        )  # fmt: skip
    except InfeasibleError as error:
        memory = error.smallest_bytes
    model, optimizer = auto_engine(*built(), cluster, memory=memory, microbatches=1)
    alone, beside = built()
    error = 0.0
    for step in range(3):
        data = words(step)
        live = LiveMemory()
        with live if step else nullcontext():  # the first step compiles
            loss = model(**data)
            away = [n for n, p in model.named_parameters() if evicted_shard(p) is not None]
            loss.backward()
        alone(**data).backward()
        grads = zip(model.parameters(), alone.parameters(), strict=True)
        error = max(error, *((p.grad.full_tensor() - q.grad).abs().max().item() for p, q in grads))
        for each in (optimizer, beside):
            each.step()
            each.zero_grad()
    held = sum(training_state_bytes(model, optimizer).values())
    return {
        "error": max(error, difference(model, alone)),
        "measured": live.peak,
        "peak": model.memory_plan.peak_bytes,
        "over": max(0.0, held + live.peak - memory),
        "on host": model.memory_plan.parameters_on_host,
        "away": away,
    }


def microbatches_within(mesh: str) -> dict[str, Any]:
    """Train in four microbatches within the smallest memory that a refusal names, and within more,
    beside a single device: the largest difference, and by memory what is used beyond it."""
    cluster = eager_to_shard(mesh)

    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layers = (m for _ in range(4) for m in (nn.Linear(24, 24), nn.GELU()))
        model = nn.Sequential(nn.Linear(12, 24), *layers, nn.Linear(24, 8)).double()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)

    def within(memory: float | str) -> Any:
        return auto_engine(
            *built(), cluster, memory=memory, microbatches=4, example_inputs=batch(0, 32)[0]
        )  # fmt: skip

    named: list[float] = []
    while len(named) < 3:
        try:
            within(named[-1] if named else "1kB")
            break
        except InfeasibleError as refused:
            named.append(refused.smallest_bytes)
    error, over = 0.0, {}
    for more in (1.0, 1.04, 1.3, 1.8):
        budget = more * named[-1]
        model, optimizer = within(budget)
        alone, beside = built()
        for step in range(3):
            x, y = batch(step, 32)
            live = LiveMemory()
            with live if step else nullcontext():  # the first step compiles
                F.cross_entropy(model(x), y).backward()
            F.cross_entropy(alone(x), y).backward()
            for each in (optimizer, beside):
                each.step()
                each.zero_grad()
        error = max(error, difference(model, alone))
        held = sum(training_state_bytes(model, optimizer).values())
        over[more] = (held + live.peak + x.nbytes // 4) / budget
    return {"named": len(named), "error": error, "over": over, "mb": model.plan.microbatches}


def _is_finish(name: str) -> bool:
    """Of a collective: its unpacking is written out in the graphs that run."""
    return name.startswith(("finish_", "wait_in_place"))


def _ahead(gm: torch.fx.GraphModule) -> list[str]:
    """Collectives between whose start and `wait_tensor` something is computed."""
    nodes = list(gm.graph.nodes)
    position = {node: k for k, node in enumerate(nodes)}
    ahead = []
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops._c10d_functional.wait_tensor.default
    ):
        start = node.args[0]
        while not str(start.target).startswith("_c10d_functional."):
            start = start.args[0]
        between = nodes[position[start] + 1 : position[node]]
        if any(str(n.target).startswith("aten") and n.meta.get("makes") for n in between):
            ahead.append(str(start.target))
    return ahead
