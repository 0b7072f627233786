"""Constraints: the plan obeys them and is the fastest that does; errors say what is possible."""

import pytest
import torch
from torch import nn

from autopar import autoplan, quantize
from autopar.errors import ConflictError, ConstraintError, InfeasibleError
from autopar.ir.spec import ShardingSpec
from autopar.planner.constraints import allowed, load_constraints
from autopar.planner.decisions import FixedLayouts
from autopar.planner.names import Names, matcher
from autopar.planner.planner import Planned
from autopar.runtime.auto_engine import auto_engine
from tests.clusters import eager_to_shard
from tests.planning import BATCH, Net


def plan(constraints=None, memory=None, fixed=None, mesh="2x2") -> Planned:
    return autoplan(
        Net(), (), BATCH, cluster=eager_to_shard(mesh), constraints=constraints, memory=memory,
        fixed=fixed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def free() -> Planned:
    return plan()


def layouts(result: Planned, name: str) -> set[str]:
    """Of everything that a name stands for: what the plan file says."""
    names = Names(result.space).find(name)
    decisions = [result.space.decisions[i] for i in names.values()]
    return {(result.plan.layouts[s.name].split() or [""])[0] for s in decisions}


@pytest.mark.parametrize(
    ("name", "layout", "count"),
    [
        ("blocks.*.up.weight", "RS1", 4),
        ("blocks.{0,2-3}.up.weight", "RS01", 3),
        ("blocks.2.up.weight", "RR", 1),
        ("**.bias", "S1", 8),
        ("table.weight", "RS0", 1),
        ("head.weight", "S01R", 1),
        ("inputs.ids", "S0", 1),
        ("inputs.1", "S1", 1),
        ("blocks.*.down", "S0R", 4),
        ("blocks.1", "RS1", 1),
        ("gelu", "S01R", 1),
        ("cross_entropy_loss", "scalar", 1),
    ],
)
def test_plans_keep_to_constraints(free, name, layout, count):
    result = plan({name: layout})
    assert len(set(Names(result.space).find(name).values())) == count
    assert {x.replace("V0", "").replace("V1", "") for x in layouts(result, name)} == {layout}
    assert result.plan.constraints == {name: layout}
    assert result.plan.time.step_us >= free.plan.time.step_us * (1 - result.plan.solver.gap - 1e-9)


def test_a_constraint_costs_the_same_as_a_fixed_layout():
    """Fixed layouts build a smaller space; constraints mask candidates of the full one."""
    for layout in ("RR", "S0R", "S1S0"):
        spec = ShardingSpec.parse(layout)
        one = plan({"blocks.2.down.weight": layout}).plan
        other = plan(fixed=FixedLayouts(parameters={"blocks.2.down.weight": spec})).plan
        assert one.time.step_us == pytest.approx(other.time.step_us, rel=1e-3)


def test_constraints_bind_the_named_copy_alone(free):
    odd = next(s for s in ("RR", "S0R") if layouts(free, "blocks.2.up.weight") != {s})
    result = plan({"blocks.2.up.weight": odd})
    assert layouts(result, "blocks.2.up.weight") == {odd}
    assert layouts(result, "blocks.1.up.weight") == layouts(free, "blocks.1.up.weight")


def test_layouts_may_be_several_and_say_when_to_gather():
    either = plan({"table.weight": "RR | S0R reshard"})
    assert layouts(either, "table.weight") <= {"RR", "S0R"}
    mixed = plan({"blocks.1.up.*": "S0R | S1"})  # a matrix and a vector
    assert layouts(mixed, "blocks.1.up.weight") == {"S0R"}
    assert layouts(mixed, "blocks.1.up.bias") == {"S1"}
    again = plan({"table.weight": "S0R reshard"}).plan
    assert "table.weight" in again.reshard_after_forward
    mixed = plan({"table.weight": "S0R keep", "**.up.weight": "S0R reshard"}).plan
    assert "table.weight" not in mixed.reshard_after_forward
    assert len([n for n in mixed.reshard_after_forward if n.endswith("up.weight")]) == 4


def test_layouts_of_operators_and_what_they_split():
    result = plan({"blocks.*.up": "S0S1 by b1 n", "blocks.*.down": "by k"})
    chosen = {
        result.space.location(i): d.candidates[c].strategy.splits.keys()
        for i, (d, c) in enumerate(zip(result.space.decisions, result.choices, strict=True))
        if d.kind == "op" and "linear" in str(d.node.target)
    }
    assert all(chosen[f"blocks.{i}.up"] == {"b1", "n"} for i in range(4))
    assert all("k" in chosen[f"blocks.{i}.down"] for i in range(4))


def test_results_have_the_layout_of_their_constraint(free):
    result = plan({"outputs.1": "S0R"})
    output = next(s for s in result.space.decisions if s.kind == "output")
    assert [str(spec) for spec in output.candidates[0].inputs] == ["", "S0R"]
    # what nobody gathers costs nothing
    assert result.plan.time.step_us <= free.plan.time.step_us * (1 + 1e-9)


# -- what cannot be -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("blocks.*.up.weigth", "RR", r"did you mean 'blocks\.\*\.up\.weight'"),
        ("block.0.up", "RR", r"did you mean 'blocks\.0\.up'"),
        ("inputs.idx", "R", "did you mean 'inputs.ids'"),
        ("outputs.7", "RR", "gives 2 tensors; did you mean 'outputs."),
        ("nothing at all", "RR", "names are those of parameters"),
        ("scale", "S0", "it is a buffer, and buffers are replicated"),
        ("blocks.{0,x}.up", "RR", "nothing is called"),
        ("blocks.{3-}.up", "RR", r"cannot read \{3-\}; write numbers and ranges"),
        ("table.weight", "Q0R", "expected R, S<axes>"),
        ("table.weight", "S0S0", r"mesh axis used twice .* can have RR, S0R"),
        ("table.weight", "S0", r"has 1 dims, and parameter table.weight has 2\. .*\[32, 16\]"),
        ("table.weight", "S2R", "splits over axis 2, and mesh 2x2 has axes 0 to 1"),
        # ascending order only: what DTensor can say
        ("table.weight", "S10R", "is not among the layouts of parameter"),
        ("table.weight", "P0(sum)RR", "is not among the layouts of parameter"),
        ("inputs.ids", "S0 | S2", "'S2' splits over axis 2"),
        (
            "blocks.*.up",
            "S0S1 by k",
            r"no strategy of blocks\.0\.up is 'S0S1 by k' .* can be split by",
        ),
        ("blocks.*.up", "S2S1 by n", "'S2S1 by n' splits over axis 2"),
        ("blocks.*.up", "Q by n", "'Q by n' is not a layout"),
        ("outputs.1", "RRR", r"not a layout of a result of shape \[8, 32\]"),
        ("outputs.0", "RP0(sum)", "not a layout of a result of shape"),
    ],
)
def test_bad_constraints_say_what_is_legal(name, layout, message):
    with pytest.raises(ConstraintError, match=message):
        plan({name: layout})


def test_constraints_on_one_decision_that_exclude_each_other_are_both_named():
    with pytest.raises(ConflictError, match=r"leave no layout for blocks\.1\.up\.weight") as error:
        plan({"inputs.ids": "S0", "blocks.*.up.weight": "S0R", "blocks.1.up.weight": "RR"})
    assert error.value.conflicting == ("blocks.*.up.weight: S0R", "blocks.1.up.weight: RR")
    with pytest.raises(ConflictError, match=r"leave no layout for table\.weight"):
        plan({"head.weight": "S0R", "table.weight": "RR"})  # tied


def smallest(constraints=None) -> float:
    with pytest.raises(InfeasibleError) as error:
        plan(constraints, memory="100B")
    return error.value.smallest_bytes


def test_memory_conflicts_name_a_smallest_set():
    """Replicated `up` weights, or `down` weights, leave too little room; together with harmless
    ones the message names the one, or the pair, that does not fit."""
    harmless = {"inputs.y": "S0 | R", "blocks.3.up.bias": "R | S0"}
    one = {"blocks.*.up.weight": "RR"}
    both = one | {"blocks.*.down.weight": "RR"}
    least, with_one, with_both = smallest(), smallest(one), smallest(both)
    assert least < with_one < with_both
    with pytest.raises(ConflictError, match="no plan satisfies this constraint within") as error:
        plan(harmless | one, memory=0.5 * (least + with_one))
    assert error.value.conflicting == ("blocks.*.up.weight: RR",)
    assert error.value.smallest_bytes > error.value.budget_bytes
    with pytest.raises(ConflictError, match="these constraints together") as error:
        plan(harmless | both, memory=0.5 * (with_one + with_both))
    assert set(error.value.conflicting) == {f"{k}: {v}" for k, v in both.items()}
    assert "relax one, or set the memory to at least" in str(error.value)


def test_too_little_memory_is_not_blamed_on_constraints():
    with pytest.raises(InfeasibleError, match="no plan fits") as error:
        plan({"inputs.y": "R"}, memory="100B")
    assert not isinstance(error.value, ConflictError)


def test_the_engine_takes_constraints_but_not_on_results():
    model = nn.Linear(4, 4)
    with pytest.raises(ConstraintError, match="auto_engine returns global results"):
        auto_engine(model, None, "1", constraints={"outputs.0": "RR"})
    with pytest.raises(ConstraintError, match="nothing is called 'wieght'; did you mean 'weight'"):
        auto_engine(
            model, None, "1", constraints={"wieght": "RR"}, example_inputs=(torch.zeros(2, 4),)
        )


# -- files and names ----------------------------------------------------------------------------


def test_constraint_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("blocks.*.up.weight: RS1\n'**.bias': R | S0\n")
    assert load_constraints(path) == {"blocks.*.up.weight": "RS1", "**.bias": "R | S0"}
    for text, message in (
        ("**.bias: R", "is not YAML .line 1: .* need quotes"),
        ("- RS1", "expected a mapping"),
        ("w: 3", "w: 3 is not a layout"),
        ("w:", "w: None is not a layout"),
    ):
        path.write_text(text)
        with pytest.raises(ConstraintError, match=message):
            load_constraints(path)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("h.*.w", {"h.0.w", "h.1.w", "h.12.w"}),
        ("h.{0,12}.w", {"h.0.w", "h.12.w"}),
        ("h.{1-12}.w", {"h.1.w", "h.12.w"}),
        ("**.w", {"w", "h.0.w", "h.1.w", "h.12.w", "h.1.x.w"}),
        ("h.1", {"h.1"}),
        ("*", {"w"}),
    ],
)
def test_patterns(pattern, names):
    known = {"h.0.w", "h.1.w", "h.12.w", "h.1.x.w", "h.1", "w"}
    assert {n for n in known if matcher(pattern).fullmatch(n)} == names


def test_allowed_masks_are_what_constraints_say(free):
    only = allowed(free.space, {"inputs.ids": "S0 | S1"})
    ((decision, mask),) = only.items()
    candidates = free.space.decisions[decision].candidates
    assert {c.name for c, ok in zip(candidates, mask, strict=True) if ok} == {"S0", "S1"}


def test_the_layout_of_a_weight_is_that_of_its_int4():
    """Which has its inputs in groups, a dim more."""
    model = quantize(nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64)), "int4")
    planned = autoplan(
        model, (torch.randn(4, 64),), cluster=eager_to_shard("2"), constraints={"0.weight": "RS0"}
    )
    assert str(planned.plan.parameter_specs()["0.weight"]) == "RS0R"
