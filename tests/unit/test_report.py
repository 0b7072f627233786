"""Reports: the words fit the plan, and text and page carry its numbers."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from autopar.cluster.cluster import ClusterInfo
from autopar.compile import autoplan
from autopar.plan import ShardingPlan
from autopar.plan_records import Baseline
from autopar.planner import describe as words
from autopar.planner.baselines import baseline_plans
from autopar.planner.planner import Planned, make_plan
from autopar.report.html import render_html
from autopar.report.text import render
from autopar.units import bytes_text, count_text, time_text
from tests.planning import Classifier, by_name, random_choices


@pytest.fixture(scope="module")
def planned() -> Planned:
    with torch.device("meta"):
        model = Classifier(512, blocks=3)
    inputs = {"x": torch.zeros(256, 512), "y": torch.zeros(256, dtype=torch.long)}
    return autoplan(model, (), inputs, cluster=ClusterInfo.of("2x2", "A100-40G"), memory="1GiB")


@pytest.fixture(scope="module")
def plan(planned) -> ShardingPlan:
    plans = baseline_plans(planned.space)
    baselines = tuple(Baseline(b.name, b.time, b.memory) for b in plans)
    return replace(planned.plan, baselines=baselines)


def descriptions(planned: Planned, prefix: str) -> dict[str, str]:
    baseline = by_name(baseline_plans(planned.space), prefix)
    return {m.name: m.words for m in words.describe(planned.space, baseline.choices)}


# -- words --------------------------------------------------------------------------------------


def test_words_of_data_parallelism(planned):
    assert descriptions(planned, "DDP")["blocks.*.up"] == "data parallel on axes 0 and 1"
    assert descriptions(planned, "FSDP")["blocks.*.down"] == (
        "data parallel on axes 0 and 1, ZeRO-3 (re-gathered for backward)"
    )


def test_words_of_tensor_parallelism(planned):
    plain, sharded = (
        descriptions(planned, "Megatron TP, data"),
        descriptions(planned, "Megatron TP, FSDP"),
    )
    assert "tensor parallel on axis 1, column then row" in plain["blocks.*"]
    assert plain["blocks.*.up"] == "data parallel on axis 0; tensor parallel on axis 1, column"
    assert plain["blocks.*.down"] == "data parallel on axis 0; tensor parallel on axis 1, row"
    assert plain["blocks.*.norm"] == "data parallel on axis 0"
    assert "ZeRO-3 (re-gathered for backward)" in sharded["blocks.*.down"]


def test_words_of_a_language_model():
    from tests.models import LanguageModel

    with torch.device("meta"):
        model = LanguageModel(layers=2)
    ids = torch.zeros(8, 16, dtype=torch.long)
    cluster = ClusterInfo.of("2x2", "A100-40G")
    lm = autoplan(model, (), {"input_ids": ids, "labels": ids}, cluster=cluster)
    modules = descriptions(lm, "DDP")
    assert modules["gpt2.transformer.h.*.attn"] == "data parallel on axes 0 and 1"
    assert modules["gpt2.transformer.wte"] == "data parallel on axes 0 and 1"

    def split(module: str, strategy: str) -> str:
        """The module's description if its operators take this strategy where they have it."""
        choices = []
        for decision in lm.space.decisions:
            names = [c.name for c in decision.candidates]
            inside = decision.kind == "op" and lm.graph.info(decision.node).module == module
            choices.append(names.index(strategy) if inside and strategy in names else 0)
        return {m.name: m.words for m in words.describe(lm.space, choices)}[module]

    assert split("gpt2.transformer.wte", "v e") == (
        "vocabulary split over axis 0; features split over axis 1"
    )
    assert split("gpt2.transformer.wpe", "- v") == "positions split over axis 1"
    assert split("gpt2.transformer.h.0.attn", "- b1") == "heads split over axis 1"
    assert split("gpt2.transformer.ln_f", "b2 b1") == (
        "data parallel on axis 0; sequence split over axis 1"
    )
    assert split("gpt2.transformer.ln_f", "- -") == "replicated"


def test_modules_add_up_for_any_plan(planned):
    for seed in range(5):
        choices = random_choices(planned.space, np.random.default_rng(seed))
        any_plan = make_plan(planned.space, choices, "Classifier")
        decisions = list(zip(planned.space.decisions, choices, strict=True))
        moved = [planned.space.conversion_costs(link, choices) for link in planned.space.edges]
        time_us = sum(s.time_us[c] for s, c in decisions) + sum(us for us, _ in moved)
        nbytes = sum(s.memory_bytes[c] for s, c in decisions) + sum(b for _, b in moved)
        assert sum(m.time_us for m in any_plan.modules) == pytest.approx(time_us)
        assert sum(m.memory_bytes for m in any_plan.modules) == pytest.approx(nbytes)
        parameters = sum(m.parameters for m in any_plan.modules)
        assert parameters == 3 * (2 * 512 + 8 * 512**2 + 5 * 512) + 1000 * 513
        assert ShardingPlan.from_json(any_plan.to_json()) == any_plan
        render(any_plan)


@pytest.mark.parametrize(
    ("indices", "patterns"),
    [
        (["0", "1", "3"], ["h.{0-1,3}"]),
        (["0.0", "0.1", "1.0", "1.1"], ["h.*.*"]),
        (["0.0", "0.1", "1.0"], ["h.0.*", "h.1.0"]),
    ],
)
def test_copies_are_named_exactly(indices, patterns):
    digits = len(indices[0].split("."))
    every = [f"h.{'.'.join(p)}" for p in itertools.product("0123"[: 6 - 2 * digits], repeat=digits)]
    groups = words.grouped_names([f"h.{i}" for i in indices], every)
    assert [pattern for pattern, _ in groups] == patterns
    assert sum(len(copies) for _, copies in groups) == len(indices)


def test_indices_read_as_ranges():
    assert words.indexed({3}) == "3"
    assert words.indexed({0, 2, 3, 4}) == "{0,2-4}"


def test_names_are_grouped_over_copies():
    every = ["h.0.w", "h.1.w", "h.2.w", "h.0.b", "h.1.b", "h.2.b", "x"]
    grouped = words.grouped_names(["h.0.w", "h.1.w", "h.2.w", "h.1.b", "h.2.b", "x"], every)
    assert grouped == [
        ("h.*.w", ["h.0.w", "h.1.w", "h.2.w"]), ("h.{1-2}.b", ["h.1.b", "h.2.b"]), ("x", ["x"]),
    ]  # fmt: skip


# -- text and page ------------------------------------------------------------------------------


def test_plan_with_modules_and_baselines_survives_json(plan):
    assert plan.modules
    assert len(plan.baselines) == 4
    assert ShardingPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("draw", [render, render_html])
def test_the_numbers_are_shown(plan, draw):
    shown = draw(plan)
    assert "2x2: 4 x A100-40G" in shown
    assert plan.fingerprint in shown
    for us in (plan.time.step_us, plan.time.compute_us, plan.time.exposed_us):
        assert time_text(us) in shown
    for nbytes in (plan.memory.total_bytes, plan.memory.optimizer_bytes, plan.budget_bytes):
        assert bytes_text(nbytes) in shown
    for b in plan.baselines:
        assert b.name in shown
        assert f"{b.time.step_us / plan.time.step_us:.2f}x" in shown
    assert plan.solver.method in shown
    assert f"{plan.solver.gap:.3%}" in shown
    assert all(stage in shown for stage in plan.solver.seconds)
    assert "blocks." in shown


def test_text_has_colour_only_where_asked(plan):
    assert "\x1b" not in render(plan)
    assert render(plan) == render(plan)
    assert "\x1b[" in render(plan, color=True)
    assert max(map(len, render(plan, width=100).splitlines())) <= 100


def test_operators_without_a_rule_are_named(planned):
    unruled = {f"sort_{i}: aten.sort.default at /a/b/c.py:{i}": 10.0 * i for i in (1, 2)}
    plan = replace(planned.plan, unruled=unruled)
    line = next(line for line in render(plan).splitlines() if "aten.sort" in line)
    assert "b/c.py:2" in line
    assert time_text(30.0) in line
    assert "aten.sort" not in render(planned.plan)


def test_page_is_self_contained(plan):
    page = render_html(plan)
    scripts = re.compile(r"<script\b.*?</script>", re.S)
    markup = scripts.sub("", page)
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//""", markup)
    assert not re.search(r"@import|url\(", markup)
    for tag in re.findall(r"<script\b[^>]*>", page):
        assert "src" not in tag
    inlined = [script for script in scripts.findall(page) if len(script) > 1e6]
    assert len(inlined) == 1


def test_page_has_every_decision_and_escapes_names(plan):
    page = render_html(replace(plan, model="<b>Odd & even"))
    assert "<b>Odd" not in page
    assert "&lt;b&gt;Odd &amp; even" in page
    for name in plan.choices:
        assert f"<td>{name}</td>" in page


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (time_text(0.0), "0 us"),
        (time_text(12.345), "12.3 us"),
        (time_text(999.7), "1.00 ms"),
        (time_text(3.2e6), "3.20 s"),
        (bytes_text(2**20), "1 MiB"),
        (bytes_text(1.5 * 2**30), "1.50 GiB"),
        (count_text(38_597_376), "38.6 M"),
        (count_text(12), "12"),
    ],
)
def test_units(text, expected):
    assert text == expected
