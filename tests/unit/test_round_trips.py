"""What is written as text is read back the same: plans, sharding specs, clusters."""

import hypothesis.strategies as st
from hypothesis import given, settings

from autopar.ir.spec import ShardingSpec
from autopar.plan import ShardingPlan
from autopar.plan_records import SolverRecord, StepSummary

# Any float may stand in a plan; infinity and NaN too.
texts, numbers = st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.floats())
plans = st.builds(
    ShardingPlan,
    cluster=st.dictionaries(st.text(), st.floats() | st.lists(st.integers())),
    choices=texts,
    parameters=texts,
    solver=st.builds(SolverRecord, seconds=numbers, sharing_us=numbers),
    unruled=numbers,
    modules=...,
    layouts=texts,
    baselines=...,
    constraints=texts,
    pareto_front=...,
    meshes=...,
    step=st.none() | st.builds(StepSummary, waited_us=numbers),
)


@given(plans)
@settings(max_examples=60, deadline=None)
def test_plans_round_trip_through_json(plan: ShardingPlan):
    text = plan.to_json()
    again = ShardingPlan.from_json(text)
    assert repr(again) == repr(plan)  # unlike ==, this compares NaN
    assert again.to_json() == text


@st.composite
def specs(draw: st.DrawFn) -> ShardingSpec:
    """Any legal spec: every mesh axis splits a dim, is partial, is varying, or is unused."""
    axes = draw(st.permutations(range(draw(st.integers(0, 9)))))
    ndim = draw(st.integers(0, 4))
    dims: list[tuple[int, ...]] = [()] * ndim
    partial, varying = [], []
    for axis in axes:
        use = draw(st.sampled_from(["none", "partial", "varying", *range(ndim)]))
        if isinstance(use, int):
            dims[use] = (*dims[use], axis)
        elif use != "none":
            (partial if use == "partial" else varying).append(axis)
    return ShardingSpec(tuple(dims), tuple(partial), tuple(varying))


@given(specs())
def test_sharding_specs_round_trip_through_text(spec: ShardingSpec):
    assert ShardingSpec.parse(str(spec)) == spec
