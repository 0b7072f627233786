"""The cost of an alternative is that of the best plan with it; differences are put into words."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autopar import ShardingPlan, autoplan
from autopar.errors import ConstraintError, PlanError
from autopar.planner.diff import Change, diff, intersect
from autopar.planner.estimate import estimate_memory, estimate_time
from autopar.planner.explain import explain
from autopar.planner.planner import Planned, choices_of
from autopar.report.comparison import difference_tables, explanation_table
from tests.clusters import eager_to_shard
from tests.planning import BATCH, Net, random_choices


def one_linear(memory: float | None = None, constraints=None) -> Planned:
    """Few enough decisions to try every plan."""
    return autoplan(
        nn.Linear(12, 6, bias=False), (torch.zeros(4, 12),), cluster=eager_to_shard("2"),
        memory=memory, constraints=constraints,
    )  # fmt: skip


def every_plan(result: Planned) -> dict[tuple[int, ...], float]:
    """Step time of every legal choice."""
    space = result.space
    steps = {}
    for choices in itertools.product(*(range(len(s.candidates)) for s in space.decisions)):
        step = estimate_time(space, choices).step_us
        if math.isfinite(step):
            steps[choices] = step
    return steps


@pytest.mark.parametrize("name", ["weight", "inputs.input", "linear"])
@pytest.mark.parametrize("room", [None, 0.5])
def test_costs_are_those_of_the_best_plan_with_the_alternative(name, room):
    free = one_linear()
    steps = every_plan(free)
    memory = None
    if room is not None:  # half way between the least and the most that a plan needs
        needs = {c: estimate_memory(free.space, c).total_bytes for c in steps}
        memory = min(needs.values()) + room * (max(needs.values()) - min(needs.values()))
        steps = {c: step for c, step in steps.items() if needs[c] <= memory}
    result = one_linear(memory)
    explanation = explain(result, name)
    decision = next(
        i
        for i, s in enumerate(result.space.decisions)
        if s.kind == {"weight": "parameter", "inputs.input": "input", "linear": "op"}[name]
    )
    candidates = result.space.decisions[decision].candidates
    assert len(explanation.alternatives) == len(candidates)
    for a in explanation.alternatives:
        c = next(i for i, k in enumerate(candidates) if k.name == a.choice)
        best = min((t for choices, t in steps.items() if choices[decision] == c), default=math.inf)
        assert a.step_us == pytest.approx(best, rel=1e-3), a.choice
        assert a.bound_us <= best * (1 + 1e-9)
    assert explanation.chosen.step_us == pytest.approx(min(steps.values()), rel=1e-3)
    solved = [a.step_us for a in explanation.alternatives]
    assert solved == sorted(solved)


def test_what_does_not_fit_says_so():
    free = one_linear()
    alternatives = explain(free, "weight").alternatives
    least = min(a.memory_bytes for a in alternatives)
    most = max(a.memory_bytes for a in alternatives)
    result = explain(one_linear(0.5 * (least + most)), "weight")
    refused = [a for a in result.alternatives if math.isinf(a.step_us)]
    assert refused
    rows = explanation_table(result).rows
    for a, row in zip(result.alternatives, rows, strict=True):
        assert (row[2] == "none") == (a in refused)
        assert (row[-1] == "does not fit the memory") == (a in refused)


@pytest.fixture(scope="module")
def net() -> Planned:
    return autoplan(Net(), (), BATCH, cluster=eager_to_shard("2x2"))


def test_a_limit_leaves_bounds_for_the_others(net):
    result = explain(net, "table.weight", limit=2)
    solved = [a for a in result.alternatives if not math.isnan(a.step_us)]
    assert len(solved) == 3  # with the plan's own
    rest = [a for a in result.alternatives if math.isnan(a.step_us)]
    assert rest
    full = {a.choice: a.step_us for a in explain(net, "table.weight").alternatives}
    for a in rest:
        assert a.bound_us <= full[a.choice] * (1 + 1e-9)
    assert explanation_table(result).rows[-1][2].startswith(">= ")


def test_copies_are_forced_together(net):
    decisions = {s.name: i for i, s in enumerate(net.space.decisions)}
    result = explain(net, "blocks.1.up", limit=1)
    chosen = [net.choices[decisions[f"linear{k}"]] for k in ("", "_2", "_4", "_6")]
    same = sum(c == chosen[1] for c in chosen)
    assert ("the same in" in result.description) == (same > 1)
    assert "aten.linear.default in blocks.*.up" in result.description
    assert "tests/planning.py" in result.description


def test_forced_plans_say_what_else_changes(net):
    result = explain(net, "blocks.2.up.weight", limit=3)
    changed = [a for a in result.alternatives if not a.chosen and math.isfinite(a.step_us)]
    assert all(a.changes for a in changed)
    assert all("->" in line for a in changed for line in a.changes)
    nearest = [a.changes[0].partition(":")[0] for a in changed]
    assert all(line.startswith("blocks.") for line in nearest), nearest


def test_names_of_things_that_differ_or_are_not_there_are_refused(net):
    with pytest.raises(ConstraintError, match=r"decisions with different choices: .* chooses"):
        explain(net, "**.weight")
    with pytest.raises(ConstraintError, match=r"did you mean 'table\.weight'"):
        explain(net, "tabel.weight")


def test_constraints_hold_in_every_alternative():
    result = one_linear(constraints={"inputs.input": "S0R"})
    names = [a.choice for a in explain(result, "inputs.input").alternatives]
    assert names == ["S0R"]
    free = {a.choice: a.step_us for a in explain(one_linear(), "linear").alternatives}
    for a in explain(result, "linear").alternatives:
        assert a.step_us >= free[a.choice] * (1 - 1e-9)


def test_a_saved_plan_gives_its_choices_back(net):
    again = ShardingPlan.from_json(net.plan.to_json())
    assert choices_of(net.space, again) == net.choices
    with pytest.raises(PlanError, match="the plan chooses"):
        choices_of(one_linear().space, again)


# -- differences --------------------------------------------------------------------------------


def test_a_plan_does_not_differ_from_itself(net):
    result = diff(net.plan, ShardingPlan.from_json(net.plan.to_json()))
    assert not result
    assert difference_tables(result) == []


def test_differences_are_those_that_were_made(net):
    other = autoplan(
        Net(), (), BATCH, cluster=eager_to_shard("2x2"), memory=5e5,
        constraints={"blocks.{1-2}.up.weight": "RR", "inputs.ids": "S1"},
    ).plan  # fmt: skip
    result = diff(net.plan, other)
    assert bool(result)
    assert [c.name for c in result.setting] == ["budget", "constraints"]
    assert result.setting[1].before == "none"
    stored = {c.name: c for c in result.parameters}
    assert stored["blocks.{1-2}.up.weight"].after == "RR"
    assert stored["blocks.{1-2}.up.weight"].count == 2
    changed = {n for n, s in net.plan.parameters.items() if other.parameters[n] != s}
    again = set(net.plan.reshard_after_forward) ^ set(other.reshard_after_forward)
    assert sum(c.count for c in result.parameters) == len(changed | again)
    step = next(c for c in result.figures if c.name == "step")
    ratio = other.time.step_us / net.plan.time.step_us - 1
    assert step.after.endswith(f"({ratio:+.1%})")
    assert any(c.name == "ids" for c in result.decisions)
    assert not {c.name for c in result.decisions} & {"p_table_weight"}
    titles = [t.title for t in difference_tables(result)]
    assert titles[:2] == ["Made for", "Predicted"]
    assert "Decisions" in [t.title for t in difference_tables(result, every=True)]


def test_plans_of_other_meshes_and_models_compare(net):
    other = autoplan(
        nn.Sequential(nn.Linear(4, 4)), (torch.zeros(4, 4),), cluster=eager_to_shard("4")
    ).plan
    result = diff(net.plan, other)
    assert {"model", "mesh", "links"} <= {c.name for c in result.setting}
    absent = [c for c in result.parameters if c.after == "absent"]
    assert "blocks.*.up.weight" in {c.name for c in absent}
    assert str(Change("a", "b", "c")) == "a: b -> c"


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("h.*.mlp", "h.*.mlp", "h.*.mlp"),
        ("h.*.mlp", "h.3.mlp", "h.3.mlp"),
        ("h.{0,11}.mlp", "h.*.mlp", "h.{0,11}.mlp"),
        ("h.{0-5}.mlp", "h.{3-8}.mlp", "h.{3-5}.mlp"),
        ("h.{0-5}.mlp", "h.5.mlp", "h.5.mlp"),
        ("h.0.mlp", "h.1.mlp", None),
        ("h.0.mlp", "h.0.attn", None),
        ("h.0.mlp", "h.0", None),
        ("h.*", "h.mlp", None),
        ("", "", ""),
    ],
)
def test_patternsintersect(one, other, both):
    assert intersect(one, other) == both
    assert intersect(other, one) == both


def test_random_plans_differ_where_their_choices_do(net):
    from autopar.planner.planner import make_plan

    rng = np.random.default_rng(0)
    a, b = (make_plan(net.space, random_choices(net.space, rng), "Net") for _ in range(2))
    result = diff(a, b)
    stored = {s.name for s in net.space.decisions if s.kind == "parameter"}
    wrong = {k for k in a.choices if a.choices[k] != b.choices[k]} - stored
    patterns = {c.name for c in result.decisions}
    assert len(wrong) >= len(patterns) > 0
    assert {w for w in wrong if "#" not in w} <= {c.name for c in result.decisions}


def test_functional_losses_are_named_too():
    """An operator outside of every module goes by its own name."""

    class Loss(nn.Module):
        def forward(self, x, y):
            return F.mse_loss(x, y)

    x = torch.zeros(4, 4)
    result = autoplan(Loss(), (x, x), cluster=eager_to_shard("2"))
    assert explain(result, "mse_loss").chosen.choice == result.plan.choices["mse_loss"]
