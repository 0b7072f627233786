"""Why a choice was made: the cost of the best plan with each alternative forced.

Each alternative of a decision is forced (in all copies in repeated blocks that make the same
choice) and the rest is solved again. Where that takes too long, lower bounds are given: the
min-marginals of one elimination, without rows on memory and exposed communication.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from autopar.errors import ConstraintError, InfeasibleError
from autopar.ir.repeats import pattern
from autopar.plan import ShardingPlan
from autopar.planner.constraints import Allowed, masked
from autopar.planner.decisions import Candidate
from autopar.planner.describe import grouped_names
from autopar.planner.diff import diff
from autopar.planner.names import Names
from autopar.planner.planner import Planned, make_plan
from autopar.planner.search import search
from autopar.planner.space import SearchSpace
from autopar.solver.contraction import Contraction


@dataclass(frozen=True)
class Alternative:
    """A choice, and the best plan that makes it.

    Args:
        choice: as plans name it.
        layouts: of its results.
        step_us: of the best plan; infinite where none fits, NaN where none was searched.
        bound_us: no plan with this choice is faster.
        memory_bytes: of that plan.
        changes: to the explained plan, in words, the nearest modules first.
        chosen: whether it is the plan's own choice.
    """

    choice: str
    layouts: str
    step_us: float
    bound_us: float
    memory_bytes: float = math.nan
    changes: tuple[str, ...] = ()
    chosen: bool = False


@dataclass(frozen=True)
class Explanation:
    """All alternatives of one decision with the plan's own choice, the fastest first; those that
    were not solved come last. `description` is a line about the decision."""

    name: str
    description: str
    plan: ShardingPlan
    alternatives: tuple[Alternative, ...]

    @property
    def chosen(self) -> Alternative:
        return next(a for a in self.alternatives if a.chosen)


def explain(
    planned: Planned,
    name: str,
    *,
    limit: int | None = None,
    time_limit: float = 60.0,
    progress: Callable[[str], None] | None = None,
) -> Explanation:
    """The alternatives of a decision, and the cost of forcing them.

    Args:
        name: of a parameter, input, module or operator, or a pattern for copies with the same
            choice (`autopar.planner.names`).
        limit: solve for this many alternatives, those of the lowest bounds; the others only get
            their bound.
        time_limit: seconds for each of them.

    Raises:
        ConstraintError: the name is unknown, or stands for different choices.
    """
    space, say = planned.space, progress or (lambda line: None)
    decision, copies = _decision(planned, name)
    say("bounds ...")
    bounds = _bounds(space, decision, copies, planned.mask)
    own = planned.choices[decision]
    candidates = space.decisions[decision].candidates
    legal = planned.mask.get(decision, np.ones(len(candidates), dtype=bool))
    order = [int(c) for c in np.argsort(bounds, kind="stable") if legal[c] and c != own]
    solved = order[:limit]
    plan = planned.plan
    alternatives = [
        Alternative(
            candidates[own].name, _layouts(candidates[own]), plan.time.step_us,
            plan.solver.bound_us, plan.memory.total_bytes, chosen=True,
        )
    ]  # fmt: skip
    for k, c in enumerate(solved):
        say(f"{candidates[c].name} forced ({k + 1} of {len(solved)}) ...")
        alternatives.append(_forced(planned, decision, copies, c, bounds[c], time_limit))
    for c in order[len(solved) :]:
        candidate, bound = candidates[c], float(bounds[c])
        step = math.nan if math.isfinite(bound) else math.inf
        alternatives.append(Alternative(candidate.name, _layouts(candidate), step, bound, math.inf))
    # the sort is stable: an alternative as fast as the explained plan comes after it
    alternatives.sort(
        key=lambda a: (math.isnan(a.step_us), a.bound_us if math.isnan(a.step_us) else a.step_us)
    )
    return Explanation(name, _what(planned, decision, copies), plan, tuple(alternatives))


def _decision(planned: Planned, name: str) -> tuple[int, list[int]]:
    """The decision, and all copies of it with the same choice."""
    space, choices = planned.space, planned.choices
    classes = masked(space.problem(), planned.mask).classes
    named = {n: _anchor(space, n, i) for n, i in Names(space).find(name).items()}
    if len({(classes[i], choices[i]) for i in named.values()}) > 1:
        raise ConstraintError(
            f"{name!r} stands for {len(named)} decisions with different choices: "
            f"{_groups(planned, named)}; name one of them"
        )
    decision = next(iter(named.values()))
    pairs = list(zip(classes, choices, strict=True))
    return decision, [i for i, pair in enumerate(pairs) if pair == pairs[decision]]


def _groups(planned: Planned, named: dict[str, int]) -> str:
    """`blocks.0.up chooses n b1, blocks.{1-3}.up chooses b1 b1`."""
    names_of: dict[str, list[str]] = {}
    for name, i in named.items():
        candidate = planned.space.decisions[i].candidates[planned.choices[i]]
        names_of.setdefault(candidate.name, []).append(name)
    groups = [
        f"{group} chooses {choice}"
        for choice, names in names_of.items()
        for group, _ in grouped_names(names, list(named))
    ]
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return ", ".join(groups[:4]) + more


def _anchor(space: SearchSpace, name: str, decision: int) -> int:
    """For a module, its operator that takes longest; else the decision itself."""
    operators = [
        i
        for i, s in enumerate(space.decisions)
        if s.kind == "op" and space.graph.info(s.node).module == name
    ]
    return max(operators, key=lambda i: float(space.decisions[i].time_us.max()), default=decision)


def _bounds(space: SearchSpace, decision: int, copies: list[int], mask: Allowed) -> np.ndarray:
    """Per candidate of a decision a lower bound on every plan that chooses it in all copies."""
    ties = masked(space.problem(), mask)
    # the copies are a class of their own
    classes = [(c, v in copies) for v, c in enumerate(ties.classes)]
    index = list(dict.fromkeys(classes)).index(classes[decision])
    problem = ties.tied(classes).problem
    return Contraction(problem.time_us, problem.pairs()).min_marginals()[index]


def _forced(
    planned: Planned, decision: int, copies: list[int], c: int, bound: float, time_limit: float
) -> Alternative:
    space = planned.space
    candidate = space.decisions[decision].candidates[c]
    mask = dict(planned.mask)
    for v in copies:
        mask[v] = np.arange(len(space.decisions[v].candidates)) == c
    budget = planned.plan.budget_bytes
    try:
        result = search(space, budget_bytes=budget, time_limit=time_limit, mask=mask)
    except InfeasibleError as error:
        return Alternative(
            candidate.name, _layouts(candidate), math.inf, math.inf, error.smallest_bytes
        )
    plan = make_plan(space, result.choices, planned.plan.model, result.record({}))
    near = pattern(space.location(decision))
    changes = sorted(
        diff(planned.plan, plan).choices, key=lambda change: -_common_parts(near, change.name)
    )
    return Alternative(
        candidate.name, _layouts(candidate), plan.time.step_us, max(bound, result.bound_us),
        plan.memory.total_bytes, tuple(map(str, changes)),
    )  # fmt: skip


def _common_parts(module: str, name: str) -> int:
    """How many leading parts a module, with `*` for its copy, has in common with a name."""
    general = pattern(re.sub(r"\{[^}]*\}", "*", name))
    pairs = zip(module.split("."), general.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _layouts(candidate: Candidate) -> str:
    return " ".join(str(spec) or "scalar" for spec in candidate.outputs)


def _what(planned: Planned, decision: int, copies: list[int]) -> str:
    space = planned.space
    s = space.decisions[decision]
    tied = f", the same in {len(copies)} copies" if len(copies) > 1 else ""
    if s.kind == "parameter":
        return f"parameter {pattern(space.graph.parameters[str(s.node.target)])}{tied}"
    if s.kind == "input":
        return f"input {s.node.target}"
    info = space.graph.info(s.node)
    module = f" in {pattern(info.module)}" if info.module else ""
    if s.kind == "shared":
        return f"layout that the users of {s.name.partition('#')[0]}{module} share{tied}"
    return f"{s.name}: {s.node.target}{module}{tied}, {info.source}"
