"""Training scripts from public reports: equal to one process, or refused in words."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.dist.pool import Pool
from tests.scripts.case import Outcome, attempt, outcome_of
from tests.scripts.catalog import CASES, cases_on
from tests.scripts.launch import in_fresh_processes

LIMIT_S = 120.0  # the start of the processes included

# What does not hold yet, and why. A case that holds must leave NOT_YET.
_VALUES = "sizes drawn from activations crash in planning"
_READ = "a number that the forward reads is part of the program"
_SHAPES = "each new value costs another program"
_HOOKS = "hooks that change gradients are lost"
_REENTRANT = "a reentrant checkpoint has no gradient"
_VIEW = "a view of the gradient has strides that the program does not expect"
_GUARD = "checking the guard runs the update"
_EFFECTS = "side effects of the forward are lost"
_SPARSE = "sparse gradients are neither right nor refused"
_COPIED = "a copy runs with the plan of the original only"
_STATISTICS = "the operator writes its statistics unseen, and the loss is another result"
_CUSTOM = "results of custom functions do not require gradients in capture"
NOT_YET: dict[str, str] = {
    "attribute_annealed, engine, on 2x2": _READ,
    "attribute_annealed, model, on 2x2": _READ,
    "average_by_deepcopy, after, on 2x2": _COPIED,
    "checkpointed_blocks, use_reentrant=True, on 2x2": _REENTRANT,
    "codebook_in_buffers, on 2x2": "a buffer called code breaks capture",
    "concatenation_with_nothing, on 1": "planning crashes",
    "concatenation_with_nothing, on 2x2": "planning crashes",
    "cond, on 1": "the refusal speaks of a constant, not of torch.cond",
    "cond, on 2x2": "the refusal speaks of a constant, not of torch.cond",
    "ctc_loss, bfloat16 float32, on 1": _VIEW,
    "ctc_loss, float32 float32, on 1": _VIEW,
    "ctc_loss, float64 float32, on 1": _VIEW,
    "ctc_loss, float64 float64, on 1": _VIEW,
    "ctc_loss_split, on 1": _VIEW,
    "fold_one_channel, samples=1, on 2x2": "the rule splits the columns of the only channel",
    "function_without_a_gradient, on 1": "planning crashes",
    "function_without_a_gradient, on 2x2": "planning crashes",
    "guard_on_a_buffer, on 1": _GUARD,
    "guard_on_a_buffer, on 2x2": _GUARD,
    "hook_that_changes, first=1, on 2x2": "a hook set after the first batch is not called",
    "hook_that_keeps, after, on 2x2": _EFFECTS,
    "hook_that_keeps, before, on 2x2": _EFFECTS,
    "hooks_that_change_gradients, module, on 1": _HOOKS,
    "hooks_that_change_gradients, module, on 2x2": _HOOKS,
    "hooks_that_change_gradients, tensor, on 1": _HOOKS,
    "hooks_that_change_gradients, tensor, on 2x2": _HOOKS,
    "hungarian_matching, on 1": "lowering crashes",
    "hungarian_matching, on 2x2": "lowering crashes",
    "inference_mode_inside, on 1": "the region is captured as differentiable",
    "inference_mode_inside, on 2x2": "the region is captured as differentiable",
    "instance_norm_statistics, on 1": _STATISTICS,
    "instance_norm_statistics, on 2x2": _STATISTICS,
    "local_coincidence, samples=6, on 2x2": "the weights of classes count as samples",
    "loss_kept_on_module, on 2x2": _EFFECTS,
    "number_argument, on 2x2": _SHAPES,
    "packed_tagger, on 2x2": "the lengths crash in capture",
    "parameter_written, on 1": "the parameter gets no gradient",
    "parameter_written, on 2x2": "the parameter gets no gradient",
    "reentrant_checkpoint, on 1": _REENTRANT,
    "reentrant_checkpoint, on 2x2": _REENTRANT,
    "reentrant_checkpoint_inside, on 2x2": _REENTRANT,
    "requires_grad_inside, on 1": _CUSTOM,
    "requires_grad_inside, on 2x2": _CUSTOM,
    "size_from_activations, on 1": _VALUES,
    "size_from_activations, on 2x2": _VALUES,
    "size_in_blocks, activations, on 1": _VALUES,
    "size_in_blocks, activations, on 2x2": _VALUES,
    "sparse_gradients, SGD, on 2x2": _SPARSE,
    "sparse_gradients, SparseAdam, on 2x2": _SPARSE,
    "stochastic_weight_averaging, on 2x2": _COPIED,
    "tiny_batch_norm, on 2x2": _GUARD,
    "variable_lengths, on 2x2": _SHAPES,
}


@pytest.fixture(scope="module")
def single() -> Iterator[Pool]:
    """One process."""
    pool = Pool(1)
    yield pool
    pool.close()


def _known(name: str, mesh: str) -> Any:
    """The parameters of a test, expected to fail if the table has them."""
    key = f"{name}, on {mesh}"
    marks = [pytest.mark.xfail(reason=NOT_YET[key], strict=True)] if key in NOT_YET else []
    return pytest.param(name, mesh, marks=marks, id=key)


PAIRS = [_known(name, mesh) for mesh in ("1", "2x2") for name in cases_on(mesh)]


def _outcome(pool: Pool, name: str, mesh: str) -> Outcome:
    """The outcome on a pool's ranks, which are left in step with each other."""
    if CASES[name].own_processes:
        return in_fresh_processes(name, mesh, LIMIT_S)
    try:
        outcome = outcome_of(pool.run(attempt, name, mesh, timeout=LIMIT_S))
    except TimeoutError as error:  # the pool has started anew
        return Outcome("wrong", f"{error}: a hang")
    if outcome.out_of_step and pool.world > 1:
        pool.restart()
    return outcome


@pytest.mark.dist
@pytest.mark.parametrize(("name", "mesh"), PAIRS)
def test_a_script_is_right_or_refused(pool, single, name, mesh):
    outcome = _outcome(single if mesh == "1" else pool, name, mesh)
    assert CASES[name].accepts(outcome), f"{outcome.kind}: {outcome.text}"


@pytest.mark.parametrize("name", list(CASES))
def test_a_script_is_right_without_autopar(name):
    """The case itself is sound: a model agrees with its copy."""
    outcome = outcome_of([attempt(name, None)])
    assert outcome.kind == "right", outcome.text


def test_the_table_names_cases():
    assert set(NOT_YET) <= {pair.id for pair in PAIRS}


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
