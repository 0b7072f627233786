"""Training scripts from public reports: equal to one process, or refused in words."""

from collections.abc import Iterator

import pytest

from tests.dist.pool import Pool
from tests.scripts.case import attempt, outcome_of
from tests.scripts.catalog import CASES, cases_on
from tests.scripts.launch import outcome_on

LIMIT_S = 120.0  # the start of the processes included


@pytest.fixture(scope="module")
def single() -> Iterator[Pool]:
    """One process."""
    pool = Pool(1)
    yield pool
    pool.close()


# on 2x2 a part, without the largest, and without what test_sizes.py has of other models;
# `benchmarks.scripts` runs all
LARGE = "t5", "llama"
ELSEWHERE = ("variable_lengths",)
ALONE = cases_on("1")
DISTRIBUTED = [
    *[n for n in cases_on("2x2") if n not in ALONE and not n.endswith(LARGE)][::3],
    *ALONE[::8],
]
DISTRIBUTED = [n for n in DISTRIBUTED if n not in ELSEWHERE]
PAIRS = [(name, "1") for name in ALONE] + [(name, "2x2") for name in DISTRIBUTED]


@pytest.mark.dist
@pytest.mark.sample(0.35)
@pytest.mark.parametrize(
    ("name", "mesh"), PAIRS, ids=[f"{name}, on {mesh}" for name, mesh in PAIRS]
)
def test_a_script_is_right_or_refused(pool, single, name, mesh):
    outcome = outcome_on(single if mesh == "1" else pool, name, mesh, LIMIT_S)
    assert CASES[name].accepts(outcome), f"{outcome.kind}: {outcome.text}"


@pytest.mark.parametrize("name", list(CASES)[::3])
def test_a_script_is_right_without_autopar(name):
    """The case itself is sound: a model agrees with its copy."""
    outcome = outcome_of([attempt(name, None)])
    assert outcome.kind == "right", outcome.text


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ([{"found": {"a": 1e-12, "b": True}}] * 2, "right"),
        ([{"found": {"a": 1e-12}}, {"found": {"a": 1e-3}}], "wrong"),
        ([{"found": {"a": float("nan")}}] * 2, "wrong"),
        ([{"found": {"a": False}}] * 2, "wrong"),
        ([{"found": {}}] * 2, "wrong"),
        ([{"refused": True, "error": "E: no; pass x"}] * 2, "refused"),
        ([{"refused": True, "error": "E: no"}] * 2, "wrong"),
        ([{"refused": True, "error": "E: rank 0 failed: TypeError: no; pass x"}] * 2, "wrong"),
        ([{"refused": False, "error": "E: no; pass x", "where": ""}] * 2, "wrong"),
        ([{"refused": True, "error": "E: no; pass x"}, {"found": {"a": 0.0}}], "wrong"),
        ([{"refused": True, "error": "E: no; pass x"}, {}], "wrong"),
    ],
)
def test_verdicts(answers, kind):
    assert outcome_of(answers).kind == kind
