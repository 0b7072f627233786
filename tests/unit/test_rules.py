"""Every row of the rule table is correct: random calls, meshes and strategies, rank by rank."""

import dataclasses
import functools
import json
import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from autopar.sharding.lowerings.declared import DECLARATIONS
from autopar.sharding.rule import OpRule, Row
from autopar.sharding.rules import registry
from autopar.sharding.strategies import strategies
from autopar.testing.rules import check, record
from autopar.testing.rules.case import check_case
from autopar.testing.rules.draw import Draw, Sample
from autopar.testing.rules.missing import coverage_of, from_calls
from autopar.testing.rules.one_op import one_op
from autopar.testing.rules.propose import propose
from autopar.testing.rules.samples import draw_sample, find_op, has_sampler, table_ops

CASES, DECLARED, CHUNKS, SEED = 500, 6, 8, 0
aten = torch.ops.aten


# -- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", range(CHUNKS))
def test_rules_hold(part, capsys, thorough):
    names = table_ops()
    more = 2 if thorough else 1
    counts = check.shares(names, more * CASES)
    # more of lowerings that declare collectives; `autopar rules check` draws ten thousand
    reports = [
        check.prove_op(n, max(counts[n], more * DECLARED if declares(n) else 0), SEED)
        for n in names[part::CHUNKS]
    ]
    with capsys.disabled():
        print(f" {sum(r.cases for r in reports)} cases of {len(reports)} ops", end="")
    failures = [f"{f}" for r in reports for f in r.failures]
    assert not failures, "\n\n".join(failures)
    assert not [r.name for r in reports if not r.cases], "ops of which no case was run"


@functools.cache
def declares(name: str) -> bool:
    """Whether a drawn call of the op has a strategy whose lowering declares collectives."""
    draw = Draw(random.Random(f"{SEED} {name}"))
    for _ in range(4):
        try:
            rule, _ = one_op(draw_sample(find_op(name), draw), draw).rule
        except (RuntimeError, IndexError, NotImplementedError, ValueError):
            continue
        if rule.lowering in DECLARATIONS:
            return True
    return False


def test_lowerings_that_declare_collectives_are_found():
    """`test_rules_hold` runs more cases of them, and compares what they run with what they
    declare."""
    assert sum(map(declares, table_ops())) > 25


def test_every_op_has_a_sampler():
    assert [name for name in table_ops() if not has_sampler(name)] == []


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(source=st.randoms(use_true_random=False), name=st.sampled_from(table_ops()))
def test_rules_hold_for_what_hypothesis_draws(source, name):
    draw = Draw(source)
    try:
        one = one_op(draw_sample(find_op(name), draw), draw)
    except (RuntimeError, IndexError, NotImplementedError, ValueError):
        assume(False)  # torch refuses the call
    mesh = draw.choice(check.MESHES)
    strategy = draw.choice(one.strategies(mesh))
    outcome = check_case(one, mesh, strategy, draw)
    assert not outcome.differences, f"{one.sample} {mesh} {strategy}: {outcome.differences[0]}"


# -- the proof finds what is wrong --------------------------------------------------------------


def failures_of(monkeypatch, name: str, row: Row, **options) -> str:
    """The proof's failures for an op whose row is replaced."""
    monkeypatch.setitem(registry.ROWS, name, (row,))
    monkeypatch.delitem(registry.DERIVED, name, raising=False)
    report = check.prove_op(name, options.get("cases", 60), 0)
    assert report.failed
    return "\n\n".join(map(str, report.failures))


def test_a_split_that_is_no_pending_sum_is_found(monkeypatch):
    text = failures_of(monkeypatch, "aten.amax.default", Row("*d r -> *d"))
    assert "rule refuses" in text or "result 0" in text


def test_a_wrong_linear_set_is_found(monkeypatch):
    text = failures_of(monkeypatch, "aten.mm.default", Row("m k, k n -> m n", linear=((0, 1),)))
    assert "strategy 'sum0" in text
    assert "result 0 on rank (0,): off by" in text


def test_a_gradient_that_is_summed_too_little_is_found(monkeypatch):
    text = failures_of(
        monkeypatch, "aten.mm.default", Row("m:lowered k, k n -> m n", lowering=half_lost)
    )
    assert "gradient of operand 1" in text


def half_lost(x, weight, *, shard):
    return x @ (weight if not shard["m"][0] else weight.detach())


def test_replicas_that_draw_differently_are_found(monkeypatch):
    name = "aten.native_dropout.default"
    text = failures_of(monkeypatch, name, Row("*d -> *d, *d", lowering=unseeded, always=True))
    assert "result" in text


def unseeded(x, p, train=True, *, shard, seed, stream):
    keep = torch.rand(x.shape) >= p
    return x * keep / (1 - p), keep


def test_shards_that_draw_the_same_are_found(monkeypatch):
    name = "aten.native_dropout.default"
    text = failures_of(
        monkeypatch, name, Row("*d -> *d, *d", lowering=same_everywhere, always=True), cases=120
    )
    assert "the same draw" in text


def same_everywhere(x, p, train=True, *, shard, seed, stream):
    if not train or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(int(seed))) >= p
    return x * keep / (1 - p), keep


def test_a_rank_that_fails_does_not_hang_the_others(monkeypatch):
    text = failures_of(
        monkeypatch, "aten.mm.default", Row("m k:lowered, k n -> m n", lowering=deserter)
    )
    assert "RuntimeError: gone" in text


def deserter(x, weight, *, shard):
    from autopar.sharding.lowerings.shard import groups_of, total

    if not shard["k"][0]:
        raise RuntimeError("gone")
    return total(x @ weight, groups_of(shard, "k"))


def test_a_lowering_that_runs_other_collectives_than_it_declares_is_found(monkeypatch):
    text = failures_of(
        monkeypatch, "aten.mm.default", Row("m k:complete, k n -> m n", lowering=undeclared)
    )
    assert (
        "the collectives on rank (0,): the forward declares none and runs 1 all_reduce of" in text
    )


def undeclared(x, weight, *, shard):
    from autopar.sharding.lowerings.shard import groups_of, total

    return total(x @ weight, groups_of(shard, "k"))


def test_failures_are_reproduced_smaller(monkeypatch):
    row = Row("m k, k n -> m n", linear=((0, 1),))
    monkeypatch.setitem(registry.ROWS, "aten.mm.default", (row,))
    report = check.prove_op("aten.mm.default", 60, 3)
    call = report.failures[0].call
    sizes = [int(n) for n in call.replace("[", " ").replace("]", " ").replace(",", " ").split()
             if n.isdigit()]  # fmt: skip
    assert max(sizes) <= 3, call


def test_the_same_seed_runs_the_same_cases():
    a, b = (check.prove_op("aten.linear.default", 20, 5) for _ in range(2))
    assert dataclasses.replace(a, seconds=0.0) == dataclasses.replace(b, seconds=0.0)


# -- discovery ----------------------------------------------------------------------------------


def mm(d: Draw, s: list[int]) -> Sample:
    return Sample(aten.mm.default, (d.normal(s[0], s[1]), d.normal(s[1], s[2])))


def addmm(d: Draw, s: list[int]) -> Sample:
    return Sample(aten.addmm.default, (d.normal(s[2]), *mm(d, s).args))


def add(d: Draw, s: list[int]) -> Sample:
    return Sample(aten.add.Tensor, (d.normal(s[0], s[1]), d.normal(s[0], s[1])))


def softmax(d: Draw, s: list[int]) -> Sample:
    return Sample(aten.softmax.int, (d.normal(s[0], s[1], s[2]), -1))


def total(d: Draw, s: list[int]) -> Sample:
    return Sample(aten.sum.dim_IntList, (d.normal(s[0], s[1], s[2]), [1]))


def embedding(d: Draw, s: list[int]) -> Sample:
    indices = d.integers([s[2], s[1]], 0, s[0])
    return Sample(aten.embedding.default, (d.normal(s[0], s[3]), indices))


def layer_norm(d: Draw, s: list[int]) -> Sample:
    return Sample(
        aten.layer_norm.default, (d.normal(*s[:3]), s[2:3], d.normal(s[2]), d.normal(s[2]))
    )


@pytest.mark.parametrize(
    ("make", "notation", "linear"),
    [
        (mm, "a b, b c -> a c", ((0,), (1,))),
        (addmm, "+a, b c, c a -> b a", ((1,), (2,))),
        (add, "a b, a b -> a b", ((0, 1),)),
        (softmax, "a b [x] -> a b [x]", ()),
        (total, "a b c -> a c", ((0,),)),
        (embedding, "[x] a, b c -> b c a", ((0,),)),
        # jointly linear in weight and bias
        (layer_norm, "a b [x], [x], [x] -> a b [x]", ((1, 2),)),
    ],
)
def test_rows_are_found_again(make, notation, linear):
    ones = []
    for seed, sizes in enumerate([[4, 5, 6, 7], [7, 4, 5, 6], [6, 7, 4, 5]]):
        draw = Draw(random.Random(seed))
        ones.append(one_op(make(draw, sizes), draw))
    ((dims, evidence),) = from_calls(ones, Draw(random.Random(0))).items()
    row = propose(evidence, dims, [t.ndim for t in ones[0].outputs])
    assert (row.notation, row.linear) == (notation, linear)


def test_what_a_timid_row_leaves_out_is_told(monkeypatch):
    name = "aten.mm.default"
    assert coverage_of(name, 0).omitted == ()
    row = Row("m [k], [k] n -> m n", linear=((0,), (1,)))
    monkeypatch.setitem(registry.ROWS, name, (row,))
    assert [str(f.strategy) for f in coverage_of(name, 0).missing] == ["S1, S0 -> P"]


# `autopar rules check --discover` looks at all ops
@pytest.mark.parametrize(
    "name",
    [
        "aten.addcmul.default", "aten.amax.default", "aten.cat.default", "aten.embedding.default",
        "aten.index_put.default", "aten.layer_norm.default", "aten.linear.default",
        "aten.max_pool1d.default", "aten.pixel_shuffle.default",
        "aten.repeat_interleave.self_int", "aten.reshape.default", "aten.scatter_add.default",
        "aten.slice.Tensor", "aten.sum.dim_IntList", "aten.unfold.default",
        "aten.view_as_complex.default",
    ],
)  # fmt: skip
def test_rows_leave_nothing_out(name):
    looked = coverage_of(name, SEED, calls=16)
    assert looked.strategies and not looked.missing, [str(f.strategy) for f in looked.missing]


def test_what_is_left_out_on_purpose_has_a_reason(monkeypatch):
    (evidence,) = coverage_of("aten.rms_norm.default", 0).omitted
    assert str(evidence.strategy) == "R, P -> P" and evidence.reason.startswith(
        "weight and bias are param"
    )
    monkeypatch.setitem(
        registry.DERIVED, "aten.rms_norm.default", lambda call: replicated_like(call)
    )
    assert "S0, R -> S0" in [
        str(f.strategy) for f in coverage_of("aten.rms_norm.default", 0).missing
    ]


def replicated_like(call):
    inputs = [None if s is None else (None,) * len(s) for s in call.inputs]
    return OpRule(tuple(inputs), ((None,) * len(call.outputs[0]),), {})


def test_attention_with_split_values_repeats_the_scores():
    shape = (2, 4, 8, 6)
    row = registry.ROWS["aten.scaled_dot_product_attention.default"][-1]
    rule = row.bind([shape, shape, shape, None], [shape])
    share = {s.name: s.share((2,)) for s in strategies(rule, (2,))}
    assert share == {"-": 1.0, "b2": 0.5, "b1": 0.5, "q": 0.5, "ring": 0.5, "e": 0.75, "sum0": 1.0}


# -- the record ---------------------------------------------------------------------------------


def test_record_tells_a_rule_that_changed(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    name = "aten.mm.default"
    report = check.prove_op(name, 6, 0)
    record.save([report], path)
    proofs = record.load(path)
    assert json.loads(path.read_text())[name]["cases"] == 6
    assert record.status(name, proofs).startswith("proved (6 cases, ")
    assert record.status("aten.bmm.default", proofs) == "not proved"
    monkeypatch.setitem(registry.ROWS, name, (Row("m k, k n -> m n"),))
    assert record.status(name, proofs) == "changed since proof"
    record.save([dataclasses.replace(report, failed=1)], path)
    assert record.load(path) == {}


def test_digests_cover_what_lowerings_call():
    text = "\n".join(record.sources(registry.ROWS["aten.embedding.default"][1].lowering))
    assert "def embedding" in text
    derived = "\n".join(record.sources(registry.DERIVED["aten.layer_norm.default"]))
    assert "def layer_norm" in derived and "def total" in derived
