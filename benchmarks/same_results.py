"""Whether a change of the code changed any result: plans, predicted times and memory, and losses.

`--save FILE` records them; `--against FILE` compares with a record of another commit and lists
every value that differs. Floats are recorded to the bit. What depends on a transport is left out:
losses are those of one process, and of ranks that are threads of one process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from autopar import ClusterInfo, auto_engine
from autopar.plan import ShardingPlan
from autopar.planner.baselines import baseline_plans
from autopar.planner.joint import plan_jointly
from autopar.planner.planner import build_problem
from benchmarks import common
from benchmarks.losses import Classifier as ImageLoss
from benchmarks.losses import LossOnly
from benchmarks.plan_time import MODELS
from tests.models import CASES, OPTIMIZERS, Classifier, words
from tests.zoo import hf, sharded, timm_rows

# model of `benchmarks.plan_time`, layers, mesh, budget
PLANS = (
    ("GPT-2", 12, "2x4", None),
    ("GPT-2", 12, "8", None),
    ("GPT-2", 4, "2x2", "520MiB"),
    ("Llama-3-8B", 4, "2x2x2", None),
    ("ResNet-152", None, "2x4", None),
    ("Mixtral-8x7B", 2, "4x2", None),
)
# every so many of the families of tests/zoo
EVERY = 4


def _hex(value: Any) -> Any:
    return pytree.tree_map(lambda x: x.hex() if isinstance(x, float) else x, value)


def _plan_record(plan: ShardingPlan) -> dict[str, Any]:
    """Layouts and predictions, without names that a change may rename."""
    layouts = sorted((k, v) for k, v in plan.layouts.items() if "#" not in k)
    return {
        "graph": plan.fingerprint,
        "parameters": dict(plan.parameters),
        "layouts": hashlib.sha256(json.dumps(layouts).encode()).hexdigest(),
        "time": _hex(asdict(plan.time)),
        "memory": _hex(asdict(plan.memory)),
        "bound": plan.solver.bound_us.hex(),
    }


def _build(name: str, layers: int | None) -> tuple[Any, dict[str, torch.Tensor]]:
    model = MODELS[name]
    dtype = getattr(torch, model.dtype)
    with torch.device("meta"):
        module = model.build(layers).to(dtype).train()
        if model.tokens:
            ids = torch.zeros(model.samples, model.tokens, dtype=torch.long)
            return LossOnly(module), {"input_ids": ids, "labels": ids}
        images = torch.zeros((model.samples, 3, model.pixels, model.pixels), dtype=dtype)
        labels = torch.zeros(model.samples, dtype=torch.long)
        return ImageLoss(module), {"images": images, "labels": labels}


def plan_records() -> Iterator[tuple[str, Any]]:
    for model, layers, mesh, memory in PLANS:
        module, batch = _build(model, layers)
        cluster = ClusterInfo.of(mesh, "A100-80G").with_memory(memory)
        problem = build_problem(module, (), batch, cluster=cluster, time_limit=600.0)
        joint = plan_jointly(problem)
        name = f"{model}, {layers} layers, mesh {mesh}, {memory}"
        yield name, _plan_record(joint.planned.plan)
        baselines = {
            e.name: _hex([asdict(e.time), asdict(e.memory)]) for e in baseline_plans(problem.space)
        }
        yield f"{name}, baselines", baselines


def _digest(tensors: Any) -> str:
    leaves = [x for x in pytree.tree_leaves(tensors) if isinstance(x, torch.Tensor)]
    content = hashlib.sha256()
    for x in leaves:
        content.update(x.detach().contiguous().numpy().tobytes())
    return content.hexdigest()


def simulated_records() -> Iterator[tuple[str, Any]]:
    """The solver's plan of families of tests/zoo, and one step of it on simulated ranks."""
    for family in (*hf.FAMILIES, *timm_rows.FAMILIES)[::EVERY]:
        captured = sharded.capture(family)
        plan = sharded.plans_of(captured, "2x2", random=0, time_limit=600.0).plans[0]
        yield f"{family.name}, mesh 2x2", _plan_record(plan)
        if captured.graph.random:
            continue
        steps = sharded.steps_of(captured, plan)
        losses = [step.loss.item().hex() for step in steps.values()]
        grads = _digest([step.gradients for step in steps.values()])
        yield f"{family.name}, simulated", {"losses": losses, "gradients": grads}


def _train(model: Any, optimizer: Any, batches: list[Any], memory: str | None) -> list[str]:
    engine, optimizer = auto_engine(model, optimizer, ClusterInfo.of("1"), memory=memory)
    losses = []
    for batch in batches:
        loss = engine(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item().hex())
    return [*losses, _digest([p.to_local() for p in engine.parameters()])]


def one_process_records() -> Iterator[tuple[str, Any]]:
    """Three steps of the engine on one process, with and without a budget."""
    for name, case in CASES.items():
        for optimizer, make in OPTIMIZERS.items():
            model = case.build()
            batches = [case.batch(step) for step in range(3)]
            losses = _train(model, make(list(model.parameters())), batches, None)
            yield f"{name}, {optimizer}, one process", losses
    for memory in (None, "1400KiB"):
        torch.manual_seed(0)
        model = Classifier()
        make = OPTIMIZERS["adamw"]
        batches = [words(step, 256) for step in range(3)]
        losses = _train(model, make(list(model.parameters())), batches, memory)
        yield f"classifier, budget {memory}", losses


def records() -> Iterator[tuple[str, Any]]:
    yield from one_process_records()
    yield from simulated_records()
    yield from plan_records()


def _changes(before: Any, now: Any, path: str = "") -> Iterator[str]:
    """The values that differ, a line each."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from _changes(before.get(key), now.get(key), f"{path}/{key}")
    elif before != now:
        yield f"{path}: {_readable(before)} -> {_readable(now)}"


def _readable(value: Any) -> str:
    try:
        return f"{float.fromhex(value):.10g}"
    except (TypeError, ValueError):
        return str(value)[:60]


def main() -> int:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the record here")
    parser.add_argument("--against", type=Path, metavar="FILE", help="a record to compare with")
    options = parser.parse_args()
    before = json.loads(options.against.read_text()) if options.against else {}
    now: dict[str, Any] = {}
    changed = 0
    for name, record in records():
        now[name] = json.loads(json.dumps(record))
        same = name not in before or before[name] == now[name]
        changed += not same
        verdict = "recorded" if name not in before else "same" if same else "CHANGED"
        print(f"{name}: {verdict}", flush=True)
        if not same:
            print("\n".join(f"  {line}" for line in _changes(before[name], now[name])))
    if options.save:
        options.save.write_text(json.dumps(now, indent=1))
    print(f"{len(now)} results, {changed} changed")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
