"""Why this choice and not that one: what the best plan costs with an alternative forced.

Each alternative of a decision is forced (in all copies in repeated blocks that now do alike) and
the rest is solved for again. Where that is too much to ask, bounds stand in: the least time of any
assignment that makes the choice, without rows on memory and late weights, is read off one
elimination as its min-marginals, and no plan with the choice is below it.
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
from autopar.planner.constraints import Allowed, restricted
from autopar.planner.describe import grouped_names
from autopar.planner.diff import diff
from autopar.planner.names import Names
from autopar.planner.planner import Planned, make_plan
from autopar.planner.search import search
from autopar.planner.space import SearchSpace
from autopar.solver.contraction import Contraction
from autopar.solver.reductions import Shared


@dataclass(frozen=True)
class Alternative:
    """A choice, and the best plan that makes it.

    Args:
        choice: as plans name it.
        layouts: of its results.
        step_us: of the best plan found; infinite where none fits, NaN where none was looked for.
        bound_us: no plan with this choice is faster.
        memory_bytes: of that plan.
        changes: what it does differently, in words, the nearest modules first.
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
    """All alternatives of one decision, the fastest first, those that were not solved last.

    Args:
        name: of the decision.
        what: a line about it.
        plan: the plan that is explained.
        alternatives: its own choice among them.
    """

    name: str
    what: str
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
    """The alternatives of a decision, and what forcing them costs.

    Args:
        planned: a plan with its space.
        name: of a parameter, input, module or operator, or a pattern for copies that do alike
            (`autopar.planner.names`).
        limit: solve for this many alternatives, those of the lowest bounds; the others only get
            their bound.
        time_limit: seconds for each of them.
        progress: called with a line per alternative.

    Raises:
        ConstraintError: nothing is called so, or things that differ.
    """
    space, say = planned.space, progress or (lambda line: None)
    decision, copies = _decision(planned, name)
    say("bounds ...")
    bounds = _bounds(space, decision, copies, planned.only)
    own = planned.choices[decision]
    here = space.decisions[decision]
    legal = planned.only.get(decision, np.ones(len(here.candidates), dtype=bool))
    order = [int(c) for c in np.argsort(bounds, kind="stable") if legal[c] and c != own]
    wanted = order[:limit]
    found = [_own(planned, decision)]
    for k, c in enumerate(wanted):
        say(f"{here.candidates[c].name} forced ({k + 1} of {len(wanted)}) ...")
        found.append(_forced(planned, decision, copies, c, bounds[c], time_limit))
    for c in order[len(wanted) :]:
        candidate, bound = here.candidates[c], float(bounds[c])
        step = math.nan if math.isfinite(bound) else math.inf
        found.append(Alternative(candidate.name, _layouts(candidate), step, bound, math.inf))
    # a plan that is as fast as the one explained comes behind it
    found.sort(
        key=lambda a: (math.isnan(a.step_us), a.bound_us if math.isnan(a.step_us) else a.step_us)
    )
    return Explanation(name, _what(planned, decision, copies), planned.plan, tuple(found))


def _decision(planned: Planned, name: str) -> tuple[int, list[int]]:
    """The decision, and all that it is made together with: copies with the same choice."""
    space, choices = planned.space, planned.choices
    _, classes = restricted(*space.problem(), planned.only)
    named = {n: _anchor(space, n, i) for n, i in Names(space).find(name).items()}
    found = dict.fromkeys(named.values())
    decided = {(classes[i], choices[i]) for i in found}
    if len(decided) > 1:
        raise ConstraintError(
            f"{name!r} stands for {len(named)} decisions that are not made alike: "
            f"{_groups(planned, named)}; name one of them"
        )
    decision = next(iter(found))
    copies = [
        i
        for i, c in enumerate(classes)
        if c == classes[decision] and choices[i] == choices[decision]
    ]
    return decision, copies


def _groups(planned: Planned, named: dict[str, int]) -> str:
    """`blocks.0.up chooses n b1, blocks.{1-3}.up chooses b1 b1`."""
    said: dict[str, list[str]] = {}
    for name, i in named.items():
        candidate = planned.space.decisions[i].candidates[planned.choices[i]]
        said.setdefault(candidate.name, []).append(name)
    groups = [
        f"{group} chooses {choice}"
        for choice, names in said.items()
        for group, _ in grouped_names(names, list(named))
    ]
    more = f" and {len(groups) - 4} more" if len(groups) > 4 else ""
    return ", ".join(groups[:4]) + more


def _anchor(space: SearchSpace, name: str, decision: int) -> int:
    """Of a module, the operator that takes longest: what it is about."""
    mine = [
        i
        for i, s in enumerate(space.decisions)
        if s.kind == "op" and space.graph.info(s.node).module == name
    ]
    return max(mine, key=lambda i: float(space.decisions[i].time_us.max()), default=decision)


def _bounds(space: SearchSpace, decision: int, copies: list[int], only: Allowed) -> np.ndarray:
    """Per candidate of the decision a lower bound on every plan that makes it in all copies."""
    problem, classes = restricted(*space.problem(), only)
    mine = set(copies)
    # the copies have a class of their own
    apart = [(c, v in mine) for v, c in enumerate(classes)]
    shared = Shared(problem, apart)
    index = list(dict.fromkeys(apart)).index((classes[decision], True))
    relaxed = Contraction(shared.problem.time_us, shared.problem.pairs())
    return relaxed.min_marginals()[index]


def _own(planned: Planned, decision: int) -> Alternative:
    candidate = planned.space.decisions[decision].candidates[planned.choices[decision]]
    plan = planned.plan
    return Alternative(
        candidate.name, _layouts(candidate), plan.time.step_us, plan.solver.bound_us,
        plan.memory.total_bytes, chosen=True,
    )  # fmt: skip


def _forced(
    planned: Planned, decision: int, copies: list[int], c: int, bound: float, time_limit: float
) -> Alternative:
    space = planned.space
    candidate = space.decisions[decision].candidates[c]
    only = dict(planned.only)
    for v in copies:
        only[v] = np.arange(len(space.decisions[v].candidates)) == c
    try:
        found = search(space, time_limit=time_limit, only=only)
    except InfeasibleError as error:
        return Alternative(
            candidate.name, _layouts(candidate), math.inf, math.inf, error.smallest_bytes
        )
    plan = make_plan(space, found.choices, planned.plan.model, found.record({}))
    near = _module(space, decision)
    changes = sorted(
        diff(planned.plan, plan).choices, key=lambda change: -_common(near, _general(change.what))
    )
    return Alternative(
        candidate.name, _layouts(candidate), plan.time.step_us, max(bound, found.bound_us),
        plan.memory.total_bytes, tuple(map(str, changes)),
    )  # fmt: skip


def _module(space: SearchSpace, decision: int) -> str:
    """The module of a decision, with `*` for its copy."""
    node = space.decisions[decision].node
    parameter = space.graph.parameters.get(str(node.target), "")
    inside = "" if node.op == "placeholder" else space.graph.info(node).module
    return pattern(parameter or inside)


def _common(one: str, other: str) -> int:
    """How many parts two names have in common at their head."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _general(name: str) -> str:
    """A pattern for some copies as one for all."""
    return pattern(re.sub(r"\{[^}]*\}", "*", name))


def _layouts(candidate: object) -> str:
    return " ".join(str(spec) or "scalar" for spec in candidate.outputs)  # type: ignore[attr-defined]


def _what(planned: Planned, decision: int, copies: list[int]) -> str:
    space = planned.space
    s = space.decisions[decision]
    alike = f", in {len(copies)} copies alike" if len(copies) > 1 else ""
    if s.kind == "parameter":
        return f"parameter {pattern(space.graph.parameters[str(s.node.target)])}{alike}"
    if s.kind == "input":
        return f"input {s.node.target}"
    info = space.graph.info(s.node)
    module = f" in {pattern(info.module)}" if info.module else ""
    if s.kind == "fan":
        return f"what the users of {s.name.partition('#')[0]}{module} share{alike}"
    return f"{s.name}: {s.node.target}{module}{alike}, {info.source}"
