"""The rotor dynamic program against brute force over explicit schedules."""

from functools import cache

import numpy as np
import pytest

from autopar.solver.chain import ChainOption, ChainStage, ChainTable, Checkpoint, Keep, Plan


def random_chain(rng: np.random.Generator, count: int, options: int) -> list[ChainStage]:
    stages = []
    for i in range(count):
        choices = []
        for k in range(options):
            kept = int(rng.integers(0, 6))
            choices.append(
                ChainOption(
                    kept,
                    kept + int(rng.integers(0, 4)),
                    kept + int(rng.integers(3, 9)),
                    float(rng.integers(0, 8)),
                    1 if k == 0 else int(rng.integers(1, min(3, count - i) + 1)),
                )
            )
        stages.append(
            ChainStage(
                int(rng.integers(0, 4)),
                int(rng.integers(0, 3)),
                float(rng.integers(1, 9)),
                float(rng.integers(0, 6)),
                tuple(choices),
            )
        )
    return stages


def all_plans(stages, i: int, j: int):
    """Every persistent schedule of the stages i..j."""

    @cache
    def plans(i: int, j: int) -> list[Plan]:
        schedules: list[Plan] = []
        for k, option in enumerate(stages[i].options):
            end = i + option.span
            if end > j + 1:
                continue
            rest = plans(end, j) if end <= j else [()]
            schedules += [(Keep(i, k), *r) for r in rest]
        for c in range(i + 1, j + 1):
            for later in plans(c, j):
                schedules += [(Checkpoint(i, c, later, again),) for again in plans(i, c - 1)]
        return schedules

    return plans(i, j)


def run(stages, plan: Plan, last: int) -> tuple[float, float]:
    """Cost and peak of a schedule, step by step on a machine that counts what it holds."""
    held: dict[object, float] = {}
    cost = peak = 0.0

    def use(extra: float) -> None:
        nonlocal peak
        peak = max(peak, sum(held.values()) + extra)

    def play(plan: Plan, last: int) -> None:
        nonlocal cost
        step, rest = plan[0], plan[1:]
        if isinstance(step, Keep):
            i, option = step.stage, stages[step.stage].options[step.option]
            end = i + option.span
            cost += sum(s.forward_cost for s in stages[i:end]) + option.cost
            use(option.forward)
            gradient = 0.0 if end <= last else stages[last].gradient
            if end <= last:
                held["kept", i] = option.kept
                held["input", end] = stages[end].input
                play(rest, last)
                del held["kept", i], held["input", end]
            use(option.backward - gradient)
            return
        cost += sum(s.forward_cost for s in stages[step.first : step.then])
        for i in range(step.first, step.then):
            use(stages[i].forward + (stages[i].input if i > step.first else 0.0))
        held["input", step.then] = stages[step.then].input
        play(step.later, last)
        del held["input", step.then]
        # the forwards that lead there also run while the gradient waits; C holds them to its budget
        held["gradient", step.then] = stages[step.then - 1].gradient
        play(step.again, step.then - 1)
        del held["gradient", step.then]

    play(plan, last)
    return cost, peak


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_equal_to_brute_force(count):
    rng = np.random.default_rng(count)
    for _ in range(12 if count < 6 else 4):
        stages = random_chain(rng, count, options=2 if count < 5 else 1 + count % 2)
        points = [run(stages, plan, count - 1) for plan in all_plans(stages, 0, count - 1)]
        memory = 40
        table = ChainTable(stages, memory, slots=memory)
        for budget in range(memory + 1):
            best = min((c for c, p in points if p <= budget), default=np.inf)
            assert table.cost(budget) == best
            if np.isfinite(best):
                cost, peak = run(stages, table.plan(budget), count - 1)
                assert cost == best and peak <= budget


def test_slots_err_on_the_safe_side():
    rng = np.random.default_rng(0)
    stages = random_chain(rng, 6, options=3)
    fine = ChainTable(stages, 40, slots=4000)
    coarse = ChainTable(stages, 40, slots=7)
    for budget in np.linspace(1, 40, 60):
        if np.isfinite(coarse.cost(budget)):
            cost, peak = run(stages, coarse.plan(budget), 5)
            assert peak <= budget
            assert cost >= fine.cost(budget)
    with pytest.raises(ValueError, match="no schedule"):
        fine.plan(0)


def test_a_long_chain_is_solved():
    table = ChainTable(random_chain(np.random.default_rng(1), 128, options=8), 600, slots=500)
    assert np.isfinite(table.cost(600))
    assert table.cost(600) <= table.cost(300)
