"""Stepping on shards: as DTensors do, and nothing of it shows outside of the step."""

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.tensor import DTensor

from autopar import auto_engine
from autopar.comm import world as environment
from autopar.runtime import chunks
from tests.models import CASES

ELEMENTWISE = ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD"]
ELEMENTWISE += ["Adagrad", "Adadelta"]


@pytest.fixture(autouse=True, scope="module")
def _no_process_group_left() -> Iterator[None]:
    yield
    environment.stop()


def trained(name: str, distributed: bool, steps: int = 3) -> tuple:
    case = CASES["mlp"]
    model = case.build()
    more = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **more)
    run = auto_engine(model, optimizer, "1")[0] if distributed else model
    seen = []
    if distributed:
        run.plan_for(**case.batch(0))
        # behind the one that puts the shards in place
        torch.optim.Optimizer.register_step_pre_hook(
            optimizer, lambda o, *_: seen.append(o.param_groups[0]["params"][0])
        )
    for step in range(steps):
        optimizer.zero_grad()
        run(**case.batch(step)).backward()
        optimizer.step()
    return model, optimizer, seen


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_equals_a_step_without_a_mesh(name):
    plain, theirs, _ = trained(name, False)
    model, mine, seen = trained(name, True)
    assert not any(isinstance(p, DTensor) for p in seen)
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert isinstance(p.grad, DTensor)
        torch.testing.assert_close(p.to_local(), expected, rtol=0, atol=1e-12)
    assert [id(p) for g in mine.param_groups for p in g["params"]] == list(
        map(id, model.parameters())
    )
    found, wanted = mine.state_dict()["state"], theirs.state_dict()["state"]
    for index, entries in wanted.items():
        for key, value in entries.items():
            kept = found[index][key]
            if isinstance(value, torch.Tensor) and value.shape == kept.shape and value.ndim:
                assert isinstance(kept, DTensor), key
                kept = kept.to_local()
            torch.testing.assert_close(kept, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_steps_on_gpus_are_fused_where_that_is_open(name, monkeypatch):
    """Here the CPU stands for the GPU: torch has fused kernels for both."""
    plain, theirs, _ = trained(name, False)
    monkeypatch.setattr(chunks, "FUSED_DEVICES", {"cpu"})
    calls = []
    for kernel in ("_fused_sgd_", "_fused_adam_", "_fused_adamw_"):
        original = getattr(torch, kernel)
        monkeypatch.setattr(
            torch, kernel, lambda *a, run=original, **k: (calls.append(run), run(*a, **k))
        )
    model, mine, _ = trained(name, True)
    assert len(calls) == 3
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.to_local(), expected, rtol=0, atol=1e-12)
    assert [g["fused"] for g in mine.param_groups] == [None] * len(mine.param_groups)
    saved = mine.state_dict()["state"]
    for k, entries in theirs.state_dict()["state"].items():
        assert saved[k].keys() == entries.keys()
        if "step" in entries:
            assert torch.equal(saved[k]["step"], entries["step"])
    # who has chosen an implementation keeps it
    for group in mine.param_groups:
        group["foreach"] = False
    mine.step()
    assert len(calls) == 3


def test_a_step_that_fails_leaves_the_parameters():
    model, optimizer, _ = trained("Adam", True, steps=1)
    entries = optimizer.state[optimizer.param_groups[0]["params"][0]]
    good, entries["exp_avg"] = entries["exp_avg"], None
    with pytest.raises((TypeError, AttributeError)):
        optimizer.step()
    entries["exp_avg"] = good
    assert isinstance(optimizer.state_dict()["state"][0]["exp_avg_sq"], DTensor)
    first = next(iter(model.parameters()))
    assert optimizer.param_groups[0]["params"][0] is first


@pytest.mark.parametrize("early", [True, False])
def test_hooks_of_the_caller_see_parameters(early):
    case, seen = CASES["mlp"], []
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _ = auto_engine(model, optimizer, "1")
    if not early:
        engine.plan_for(**case.batch(0))

    def look(optimizer, *_):
        seen.extend(p for group in optimizer.param_groups for p in group["params"])

    optimizer.register_step_pre_hook(look)
    optimizer.register_step_post_hook(look)
    engine(**case.batch(0)).backward()
    optimizer.step()
    assert list(map(id, seen)) == 2 * list(map(id, model.parameters()))


def test_lbfgs_plans_in_its_closure():
    """Its state is of the parameters, and outlives the step in which they were laid out."""
    case, found = CASES["mlp"], []
    for distributed in (False, True):
        model = case.build()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
        run = auto_engine(model, optimizer, "1")[0] if distributed else model

        def closure(run=run, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = run(**case.batch(0))
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        state = optimizer.state_dict()["state"][0]
        found.append((list(model.parameters()), state["func_evals"], state["n_iter"]))
    (plain, *counts), (sharded, *others) = found
    assert counts == others and counts[0] == 6  # of the closure, in both steps
    for p, q in zip(sharded, plain, strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=0, atol=1e-12)


def test_a_closure_runs_the_model():
    case = CASES["mlp"]
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, _ = auto_engine(model, optimizer, "1", example_inputs=case.batch(0))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = engine(**case.batch(0))
        loss.backward()
        return loss

    before = optimizer.step(closure).item()
    assert optimizer.step(closure).item() < before
