"""Plans for one sequence of 8 thousand to a million tokens, under the cost model.

Llama 3 8B on 8 H100, as one axis and as 2x4, and 70B on 64 as 8x8; one sample in bfloat16.

*Strategies.* Four blocks without a memory limit, attention by each strategy and as autopar chooses:
the predicted step, and what attention itself computes and communicates. It shows where the choice
changes and why. On two axes a strategy is along at least one of them.

*Fits.* The whole model within the memory of a device, by a joint plan (layouts, and what is
recomputed; docs/memory.md), for which the capture, the search and the schedule count as planning.
Where nothing fits, the row says what the smallest schedule found needs.

*Published.* torchtitan trains Llama 3.1 8B on 8 H100 with context parallelism and FSDP
(`benchmarks/llama3_h100_202412_torchtitan.md`: float8, full recomputation, compiled). Its
split of batch and sequence is planned as a constraint, with a ring, and autopar's plan for the same
batch on the same mesh beside it, both in bfloat16. The measured step is theirs, in float8.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from benchmarks.common import Row, console
from benchmarks.recipes import DEVICE, MODELS, TARGET, UNLIMITED

THOUSAND = 1024
LENGTHS = tuple(8 * THOUSAND * 2**k for k in range(8))
LAYERS = 4
ATTENTION = "**.scaled_dot_product_attention"
# Seconds of the solver and of schedules, per plan.
TIME_LIMIT = 60.0

SETTINGS = (("Llama 3 8B", "8"), ("Llama 3 8B", "2x4"), ("Llama 3 70B", "8x8"))
# Constraints of attention. On two axes a strategy is along at least one of them.
STRATEGIES = {
    "queries": "by q", "ring": "by ring", "exchange": "by exchange",
    "ring and exchange": "by ring exchange",
}  # fmt: skip
HEADS = {"8": "RS0RR", "2x4": "RS0RR | RS1RR | RS01RR", "8x8": "RS0RR | RS1RR"}


@dataclass(frozen=True)
class Published:
    """A measured step with context parallelism.

    Args:
        mesh: of data and context parallelism.
        samples: of the batch.
        inputs: layout of the tokens.
        seconds: per step.
    """

    tokens: int
    mesh: str
    samples: int
    inputs: str
    seconds: float


PUBLISHED = (
    Published(64 * THOUSAND, "4x2", 4, "S0S1", 12.90),
    Published(128 * THOUSAND, "2x4", 2, "S0S1", 30.60),
    Published(256 * THOUSAND, "8", 1, "RS0", 59.80),
)


@lru_cache(maxsize=2)
def _captured(model: str, layers: int, tokens: int, samples: int = 1) -> tuple[Any, Any, float]:
    """The model on the meta device, its graph, and the seconds of the capture."""
    import torch

    from autopar import ColoTracer

    built = MODELS[model].build(layers)
    with torch.device("meta"):
        ids = torch.zeros(samples, tokens, dtype=torch.int64)
    begin = time.perf_counter()
    graph = ColoTracer().trace(built, (), {"input_ids": ids, "labels": ids})
    return built, graph, time.perf_counter() - begin


def _words(tokens: int) -> str:
    return f"{tokens // THOUSAND}k tokens"


def _attention(planned: Any) -> tuple[str, dict[str, float]]:
    """The strategy of the first attention, and what it takes, in microseconds."""
    for decision, choice in zip(planned.space.decisions, planned.choices, strict=True):
        if decision.kind == "op" and "scaled_dot_product" in str(decision.node.target):
            candidate = decision.candidates[choice]
            parts = {name: float(us[choice]) for name, us in decision.parts.items()}
            return candidate.name, parts
    raise AssertionError("a model without attention")


# -- strategies ------------------------------------------------------------------------------------


def strategies(model: str, mesh: str, tokens: int) -> Iterator[Row]:
    """Each strategy's step, and autopar's."""
    from autopar import ClusterInfo, autoplan
    from autopar.errors import ConstraintError, InfeasibleError

    built, graph, _ = _captured(model, LAYERS, tokens)
    cluster = ClusterInfo.of(mesh, DEVICE).with_memory(UNLIMITED)
    case = f"{model}, mesh {mesh}, {_words(tokens)}, {LAYERS} blocks"
    steps: dict[str, float] = {}
    forced = {**STRATEGIES, "heads": HEADS[mesh]}
    if "x" not in mesh:
        del forced["ring and exchange"]
    for name, layout in {"autopar": "", **forced}.items():
        constraints = {ATTENTION: layout} if layout else None
        try:
            planned = autoplan(
                built, graph=graph, cluster=cluster, constraints=constraints, time_limit=TIME_LIMIT
            )
        except (ConstraintError, InfeasibleError) as error:
            console.print(f"{case}, {name}: {str(error)[:200]}", markup=False, soft_wrap=True)
            continue
        steps[name] = planned.plan.time.step_us
        choice, parts = _attention(planned)
        label = f"{name} ({choice})" if name == "autopar" else name
        yield Row(case, label, 1e-3 * steps[name], "ms")
        exposed = planned.plan.time.exposed_us
        yield Row(case, f"{label}, exposed communication", 1e-3 * exposed, "ms")
        inside = parts.get("communication_us", 0.0)
        yield Row(case, f"{label}, within an attention", 1e-3 * inside, "ms")
    best = min((n for n in steps if n != "autopar"), key=lambda n: steps[n])
    yield Row(case, f"autopar / {best}", steps["autopar"] / steps[best], "x", TARGET)


# -- fits ------------------------------------------------------------------------------------------


def fits(model: str, mesh: str, tokens: int) -> Iterator[Row]:
    """The whole model within the memory of a device."""
    from autopar import ClusterInfo
    from autopar.compile import plan_step
    from autopar.errors import InfeasibleError

    of = MODELS[model]
    built, graph, captured_s = _captured(model, of.layers, tokens)
    case = f"{model}, mesh {mesh}, {_words(tokens)}"
    cluster = ClusterInfo.of(mesh, DEVICE)
    budget = cluster.budget_bytes / 2**30
    begin = time.perf_counter()
    try:
        made = plan_step(built, graph=graph, cluster=cluster, time_limit=TIME_LIMIT)
    except InfeasibleError as error:
        yield Row(case, "planning", captured_s + time.perf_counter() - begin, "s")
        smallest = (error.smallest_bytes or float("nan")) / 2**30
        yield Row(case, "nothing fits, smallest found", smallest, "GiB")
        return
    yield Row(case, "planning", captured_s + time.perf_counter() - begin, "s")
    plan = made.planned.plan
    choice, _ = _attention(made.planned)
    added = 0.0 if made.memory is None else min(t.added_us for t in made.tried)
    yield Row(case, f"step ({choice})", 1e-3 * plan.time.step_us, "ms")
    yield Row(case, "of that, recomputation and the like", 1e-3 * added, "ms")
    yield Row(case, "memory", plan.memory.total_bytes / 2**30, "GiB", budget)
    tokens_per_s = tokens / (1e-6 * plan.time.step_us)
    yield Row(case, "tokens per device", tokens_per_s / math.prod(cluster.mesh), "1/s")


# -- published -------------------------------------------------------------------------------------


def published(row: Published) -> Iterator[Row]:
    """torchtitan's split of a batch, and autopar's plan for it."""
    from autopar import ClusterInfo
    from autopar.compile import plan_step
    from autopar.errors import InfeasibleError

    model = "Llama 3 8B"
    built, graph, _ = _captured(model, MODELS[model].layers, row.tokens, row.samples)
    case = f"{model}, mesh {row.mesh}, {row.samples} of {_words(row.tokens)}"
    yield Row(case, "torchtitan in float8, measured", 1e3 * row.seconds, "ms")
    theirs = {"inputs.input_ids": row.inputs, "inputs.labels": row.inputs, ATTENTION: "by ring"}
    steps: dict[str, float] = {}
    choices: Mapping[str, Mapping[str, str]] = {"its split": theirs, "autopar": {}}
    for name, constraints in choices.items():
        try:
            made = plan_step(
                built, graph=graph, cluster=ClusterInfo.of(row.mesh, DEVICE),
                constraints=constraints, time_limit=TIME_LIMIT,
            )  # fmt: skip
        except InfeasibleError as error:
            smallest = (error.smallest_bytes or float("nan")) / 2**30
            yield Row(case, f"{name} does not fit, smallest found", smallest, "GiB")
            continue
        plan = made.planned.plan
        steps[name] = plan.time.step_us
        choice, _ = _attention(made.planned)
        yield Row(case, f"{name} ({choice}), predicted", 1e-3 * steps[name], "ms")
        yield Row(case, f"{name}, memory", plan.memory.total_bytes / 2**30, "GiB")
    if len(steps) == 2:
        yield Row(case, "autopar / its split", steps["autopar"] / steps["its split"], "x", TARGET)


def rows(only: str, *, quick: bool) -> Iterator[Row]:
    """All settings; the shortest sequence of the first one's strategies if quick."""
    for model, mesh in SETTINGS[:1] if quick else SETTINGS:
        for tokens in LENGTHS[:1] if quick else LENGTHS:
            name = f"{model}, mesh {mesh}, {_words(tokens)}"
            if only in name:
                yield from _told(strategies(model, mesh, tokens))
                if not quick:
                    yield from _told(fits(model, mesh, tokens))
    for row in () if quick else PUBLISHED:
        name = f"published, {_words(row.tokens)}"
        if only in name:
            yield from _told(published(row))


def _told(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, each also as a line when it is known."""
    for row in rows:
        console.print(f"  {row.case}: {row.metric} {row.value:.4g} {row.unit}", markup=False)
        yield row
