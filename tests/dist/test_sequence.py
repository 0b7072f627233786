"""Attention over a split sequence: float64 equality with a single device, strategy by strategy."""

import pytest

from tests.sequences import CASES, error

pytestmark = pytest.mark.dist

ATTENTION = "**.scaled_dot_product_attention"
WINDOWS = "mistral", "padded window"
FORCED = [
    *((name, "4", "by halo") for name in WINDOWS),
    *(
        (name, "4", "by ring")
        for name in CASES
        if name not in ("gemma", "seven tokens", "two blocks", *WINDOWS)
    ),
    *((name, "4", "by q") for name in ("gpt2", "padded window", "whisper")),
    *((name, "2x2", "by ring q") for name in ("gpt2", "block diagonal")),
    *((name, "2x2", "by halo q") for name in ("padded window",)),
    *((name, "2x2", "by ring exchange") for name in ("masked", "documents")),
    ("padded", "4", "by exchange"),
    ("two blocks", "4", "RS0RR"),
]


@pytest.mark.sample(0.22)
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(("name", "mesh", "strategy"), FORCED)
def test_a_forced_strategy_equals_a_single_device(pool, name, mesh, strategy, overlaps):
    for worst in pool.run(error, name, mesh, {ATTENTION: strategy}, 3, overlaps):
        assert worst < CASES[name].tolerance


@pytest.mark.parametrize("strategy", ["by q", "by ring"])
def test_a_rank_that_receives_one_piece_waits_for_it(pool, strategy):
    """7 tokens of 4 ranks: the concatenation of what is received has one part."""
    for worst in pool.run(error, "seven tokens", "4", {ATTENTION: strategy}, 3, True):
        assert worst < CASES["seven tokens"].tolerance


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma", "bert", "whisper", "vit"])
def test_a_split_sequence_equals_a_single_device(pair, name):
    """As the planner chooses where the batch cannot be split and tokens are."""
    inputs = next(iter(CASES[name].batch(0)))
    layout = {"input_ids": "RS0", "input_features": "RRS0"}.get(inputs)
    constraints = {} if layout is None else {f"inputs.{inputs}": layout}
    for worst in pair.run(error, name, "2", constraints):
        assert worst < CASES[name].tolerance


PRODUCTS = {
    "both": {"**.gate_proj": "by gather", "**.down_proj": "by scatter"},
    "with rows split by another axis": {
        "**.gate_proj": "by gather b1 | by gather b2", "**.down_proj": "by scatter gather",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(PRODUCTS))
def test_products_in_steps_equal_a_single_device(pool, kind):
    mesh = "4" if kind == "both" else "2x2"
    for worst in pool.run(error, "llama", mesh, PRODUCTS[kind], 3, True):
        assert worst < CASES["llama"].tolerance
