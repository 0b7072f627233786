"""The joint choice of a pipeline: equal to brute force where that can be done, close to it where
cuts are searched, and clear about what cannot be had."""

import itertools
import math
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from autopar.cluster.link import Link
from autopar.errors import InfeasibleError, PlanError
from autopar.schedule.pipeline import choose
from autopar.schedule.pipeline.actions import PipelineSchedule
from autopar.schedule.pipeline.blocks import Block, Chain, send_us
from autopar.schedule.pipeline.choose import choose_pipeline
from autopar.schedule.pipeline.memory import live_counts
from autopar.schedule.pipeline.partition import partition
from autopar.schedule.pipeline.problem import PipelineChoice, PipelineProblem
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule
from autopar.schedule.pipeline.search import best_found, best_of_all
from autopar.schedule.pipeline.timeline import StageCost, peak_bytes, step_time_us

TRAINING = tuple(row.name for row in SCHEDULES.values() if row.trains)


# --- brute force --------------------------------------------------------------------------------


def every_choice(problem: PipelineProblem) -> Iterator[tuple[float, float]]:
    """Steps and peaks of all there is."""
    batch, p = problem.batch, problem.ranks
    for m in range(1, batch + 1):
        if batch % m and m & (m - 1):
            continue
        blocks = problem.blocks(math.ceil(batch / m))
        for name, per_rank in itertools.product(problem.schedules, range(1, len(blocks) // p + 1)):
            row = SCHEDULES[name]
            if per_rank < row.stages_per_rank or (per_rank > row.stages_per_rank and not row.more):
                continue
            schedule = make_schedule(name, p, m, per_rank)
            for cuts in itertools.combinations(range(1, len(blocks)), schedule.stages - 1):
                borders = (0, *cuts, len(blocks))
                lengths = [b - a for a, b in itertools.pairwise(borders)]
                for counts in itertools.product(*(range(n + 1) for n in lengths)):
                    costs = stage_costs(blocks, borders, counts, schedule, problem.link)
                    yield step_time_us(schedule, costs), max(peak_bytes(schedule, costs))


def stage_costs(
    blocks: Sequence[Block],
    borders: Sequence[int],
    counts: Sequence[int],
    schedule: PipelineSchedule,
    link: Link,
) -> list[StageCost]:
    """As in the docstrings of `Block`, `StageTable` and `Chain.copies`."""
    splits = SCHEDULES[schedule.name].splits_backward
    rank_of = schedule.rank_of_stage
    stage_of = [s for s, (a, b) in enumerate(itertools.pairwise(borders)) for _ in range(a, b)]
    costs = []
    copied: set[tuple[str, int]] = set()
    for stage, (a, b) in enumerate(itertools.pairwise(borders)):
        recomputed, kept = blocks[a : a + counts[stage]], blocks[a + counts[stage] : b]
        own = blocks[a:b]
        rank, copies_bytes, copies_us = rank_of[stage], 0.0, 0.0
        for name, nbytes in dict(share for block in own for share in block.shares).items():
            first = next(at for at, block in enumerate(blocks) if name in dict(block.shares))
            if rank_of[stage_of[first]] != rank and (name, rank) not in copied:
                copied.add((name, rank))
                copies_bytes += 2 * nbytes
                copies_us += send_us(link, nbytes)
        working = [
            block.held_bytes
            - block.checkpoint_bytes
            + splits * sum(max(0, r.weight_bytes - r.checkpoint_bytes) for r in recomputed[k + 1 :])
            for k, block in enumerate(recomputed)
        ]
        costs.append(
            StageCost(
                forward_us=sum(block.forward_us for block in own),
                input_us=sum(block.input_us for block in own)
                + sum(block.recompute_us for block in recomputed),
                weight_us=sum(block.weight_us for block in own),
                send_forward_us=send_us(link, own[-1].forward_bytes) if b < len(blocks) else 0,
                send_backward_us=send_us(link, blocks[a - 1].backward_bytes) if a else 0,
                state_bytes=sum(block.state_bytes for block in own) + copies_bytes,
                held_bytes=sum(block.checkpoint_bytes for block in recomputed)
                + sum(block.held_bytes for block in kept),
                recomputed_bytes=max(working, default=0),
                weight_bytes=splits * sum(block.weight_bytes for block in own),
                before_us=sum(block.before_us for block in own) + copies_us,
                after_us=sum(block.after_us for block in own) + copies_us,
            )
        )
    return costs


def random_problem(rng: random.Random, blocks: int, ranks: int, batch: int) -> PipelineProblem:
    equal, tied = rng.random() < 0.3, rng.random() < 0.4
    overhead_us = rng.choice((0.0, 0.0, 2.0))

    def random_block() -> dict[str, float]:
        us = 10.0 if equal else rng.choice((1.0, 2.0, 5.0, 10.0, 20.0, rng.uniform(0.1, 30)))
        held = 8 if equal else rng.randrange(40)
        return {
            "forward_us": us,
            "input_us": us if equal else us * rng.choice((0.5, 1.0, 1.5)),
            "weight_us": us if equal else us * rng.choice((0.0, 0.5, 1.0)),
            "held_bytes": held,
            "weight_bytes": rng.randint(0, held),
            "checkpoint_bytes": rng.randint(0, held // 2),
            "recompute_us": us * rng.choice((1.0, 1.0, 0.5)),
            "state_bytes": rng.randrange(60),
            "before_us": rng.choice((0.0, 0.0, 3.0)),
            "after_us": rng.choice((0.0, 4.0)),
            "forward_bytes": rng.randrange(30),
            "backward_bytes": rng.randrange(30),
        }

    of_batch = [random_block() for _ in range(blocks)]

    def of_size(samples: int) -> list[Block]:
        found = []
        for at, whole in enumerate(of_batch):
            values = dict(whole)
            for name, value in whole.items():
                if name in ("forward_us", "input_us", "weight_us", "recompute_us") and value:
                    values[name] = value * samples / batch + overhead_us
                elif name.endswith("_bytes") and name != "state_bytes":
                    values[name] = value * samples
            shares = (("embedding", 17.0),) if tied and at in (0, blocks - 1) else ()
            found.append(Block(f"h.{at}", **values, shares=shares))
        return found

    link = Link(alpha=rng.choice((0, 1e-7, 1e-6)), beta=rng.choice((0, 1e-8, 5e-8)))
    return PipelineProblem(of_size, ranks, batch, link)


@pytest.mark.parametrize("seed", range(30))
def test_equals_brute_force(seed: int):
    rng = random.Random(seed)
    # Brute force on 8 blocks takes seconds, so few are that long.
    blocks = (8, 7)[seed] if seed < 2 else rng.randint(1, 6)
    ranks = rng.randint(2 if blocks > 6 else 1, min(blocks, 4))
    problem = random_problem(rng, blocks, ranks, 2 if blocks > 6 else rng.choice((1, 2, 3, 4, 6)))
    choices = list(every_choice(problem))
    smallest = min(peak for _, peak in choices)
    for budget_bytes in (math.inf, smallest, 1.05 * smallest, 1.2 * smallest):
        choice = choose_pipeline(replace(problem, budget_bytes=budget_bytes))
        best_us = min(us for us, peak in choices if peak <= budget_bytes)
        assert choice.step_us == pytest.approx(best_us, rel=1e-9)
        assert max(choice.peak_bytes) <= budget_bytes
        assert_consistent(problem, choice)
    if smallest:
        with pytest.raises(InfeasibleError, match="no pipeline of") as caught:
            choose_pipeline(replace(problem, budget_bytes=smallest - 1))
        assert caught.value.smallest_bytes == smallest
        assert caught.value.proven


def assert_consistent(problem: PipelineProblem, choice: PipelineChoice) -> None:
    """What a choice says of itself is so."""
    blocks = problem.blocks(math.ceil(problem.batch / choice.microbatches))
    borders = (0, *choice.cuts, len(blocks))
    costs = stage_costs(blocks, borders, choice.recompute, choice.schedule, problem.link)
    assert step_time_us(choice.schedule, costs) == pytest.approx(choice.step_us, rel=1e-9)
    assert peak_bytes(choice.schedule, costs) == pytest.approx(choice.peak_bytes, rel=1e-9)
    assert step_time_us(choice.schedule, choice.costs) == choice.step_us
    assert peak_bytes(choice.schedule, choice.costs) == choice.peak_bytes
    assert 0 <= choice.bubble_fraction < 1


# --- its parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
def test_live_counts_have_the_peak(name: str):
    rng = random.Random(name)
    for p, m, per_rank in itertools.product((1, 2, 3, 5), (1, 2, 4, 9), (1, 2, 3)):
        row = SCHEDULES[name]
        if per_rank != row.stages_per_rank and not (row.more and per_rank > row.stages_per_rank):
            continue
        schedule = make_schedule(name, p, m, per_rank)
        costs = []
        for _ in range(schedule.stages):
            held, more = rng.randrange(20), rng.choice((0, rng.randrange(20)))
            weight = rng.randint(0, held + more)
            costs.append(StageCost(1, held_bytes=held, recomputed_bytes=more, weight_bytes=weight))
        peaks = []
        for rank, live in enumerate(live_counts(schedule)):
            own = [costs[s] for s in schedule.stages_of_rank[rank]]
            nbytes = [c.held_bytes for c in own] + [c.weight_bytes for c in own]
            peaks.append((live @ np.array(nbytes + [c.recomputed_bytes for c in own])).max())
        assert tuple(peaks) == peak_bytes(schedule, costs)


@pytest.mark.parametrize("seed", range(20))
def test_partition_is_the_best(seed: int):
    rng = np.random.default_rng(seed)
    blocks = int(rng.integers(2, 8))
    stages = int(rng.integers(1, blocks + 1))
    costs = rng.integers(0, 9, (stages, blocks, blocks)).astype(float)
    costs[rng.random(costs.shape) < 0.1] = np.inf

    def largest(borders: Sequence[int]) -> float:
        spans = enumerate(itertools.pairwise(borders))
        return max(costs[s, a, b - a - 1] for s, (a, b) in spans)

    borders, cost = partition(blocks, stages, lambda stage: costs[stage])
    every = [(0, *c, blocks) for c in itertools.combinations(range(1, blocks), stages - 1)]
    assert cost == min(map(largest, every))
    assert math.isinf(cost) or (borders in every and largest(borders) == cost)


def test_bounds_are_below_the_step():
    for seed in range(20):
        rng = random.Random(seed)
        ranks = rng.randint(1, 4)
        problem = random_problem(rng, 2 * ranks + rng.randint(0, 3), ranks, rng.choice((2, 5, 8)))
        for option in choose._options(problem):
            borders = rng.choice(list(option.all_borders()))
            counts = tuple(rng.randint(0, b - a) for a, b in itertools.pairwise(borders))
            costs = option.costs(borders, counts)
            us = step_time_us(option.schedule(), costs) * (1 + 1e-9)
            assert option.least_us <= us
            assert option.bound_us(costs) <= us


def test_estimates_extrapolate_the_step():
    problem = uniform(24, ranks=4, batch=256)
    for option in choose._options(replace(problem, microbatches=200)):
        costs = option.costs(option.starts()[0])
        exact_us = step_time_us(option.schedule(), costs)
        assert option.estimate_us(costs) == pytest.approx(exact_us, rel=0.005)


# --- longer chains ------------------------------------------------------------------------------


def uniform(blocks: int, ranks: int, batch: int, **pins: object) -> PipelineProblem:
    """Equal layers between a cheap first block and an expensive last one."""

    def of_size(samples: int) -> list[Block]:
        found = []
        for at in range(blocks):
            weight = {0: 0.3, blocks - 1: 3.0}.get(at, 1.0)
            us = weight * 100.0 * samples
            found.append(
                Block(
                    f"h.{at}", us, us, us, 50e6 * samples, 25e6 * samples, 4e6 * samples, us,
                    600e6 * weight, 100.0, 200.0, 4e6 * samples, 4e6 * samples,
                    (("embedding", 5e8),) if at in (0, blocks - 1) else (),
                )
            )  # fmt: skip
        return found

    return PipelineProblem(of_size, ranks, batch, Link(5e-6, 1 / 50e9), **pins)  # type: ignore[arg-type]


def test_local_search_is_close_to_the_best():
    equal = close = count = 0
    for seed in range(4):
        rng = random.Random(seed)
        problem = random_problem(rng, rng.randint(9, 11), rng.randint(2, 4), rng.choice((4, 6, 8)))
        options = choose._options(replace(problem, budget_bytes=0.0))
        smallest = min(o.peak_bytes(b) for o in options for b in o.all_borders())
        for budget_bytes in (math.inf, 1.15 * smallest):
            bounded = replace(problem, budget_bytes=budget_bytes)
            best = best_of_all(choose._options(bounded))
            found = best_found(choose._options(bounded))
            assert best and found
            ratio = found.step_us / best.step_us
            assert 1 - 1e-9 <= ratio < 1.1
            equal, close, count = equal + (ratio < 1 + 1e-9), close + (ratio < 1.02), count + 1
    assert equal >= 0.8 * count
    assert close >= 0.9 * count


def test_a_large_model_takes_seconds():
    problem = uniform(126, ranks=16, batch=1024, budget_bytes=12e9)
    begin = time.process_time()
    choice = choose_pipeline(problem)
    assert time.process_time() - begin < 15  # 4 s on an idle core
    assert_consistent(problem, choice)
    assert max(choice.peak_bytes) <= 12e9
    # What all ranks have to compute, with the largest block that no cut divides.
    ideal_us = 3 * 100 * 1024 * (124 + 3.3) / 16
    assert choice.step_us < 1.04 * ideal_us


def test_less_memory_is_recomputed_or_slower():
    steps, recomputed = [], []
    for budget_bytes in (math.inf, 3.5e9):
        problem = uniform(18, ranks=4, batch=16, budget_bytes=budget_bytes)
        choice = choose_pipeline(problem)
        assert_consistent(problem, choice)
        assert max(choice.peak_bytes) <= budget_bytes
        steps.append(choice.step_us)
        recomputed.append(sum(choice.recompute))
    assert steps == sorted(steps)
    assert recomputed[0] == 0 < recomputed[-1]


def test_the_smallest_budget_of_a_long_chain_has_a_plan():
    problem = uniform(18, ranks=4, batch=16, budget_bytes=2e9, schedules=("1f1b", "zbv"))
    with pytest.raises(InfeasibleError, match="The smallest found needs") as caught:
        choose_pipeline(problem)
    assert not caught.value.proven
    choice = choose_pipeline(replace(problem, budget_bytes=caught.value.smallest_bytes))
    assert max(choice.peak_bytes) <= caught.value.smallest_bytes


# --- shared parameters --------------------------------------------------------------------------


def test_a_v_has_no_copy_of_tied_embeddings():
    shares = (("embedding", 100.0),)
    blocks = [Block("embed", 1, shares=shares), Block("a", 1), Block("b", 1),
              Block("head", 1, shares=shares)]  # fmt: skip
    link = Link(alpha=1e-6, beta=1e-8)
    chain = Chain(blocks, link, splits=False)
    assert chain.copies((0, 1, 2, 3, 4), (0, 1, 1, 0)) == {}
    assert chain.copies((0, 1, 2, 3, 4), (0, 1, 0, 1)) == {3: (200.0, pytest.approx(2.0))}
    assert chain.copies((0, 4), (0,)) == {}


# --- pins and errors ----------------------------------------------------------------------------


def test_pins_are_kept():
    problem = uniform(8, ranks=2, batch=12)
    assert choose_pipeline(replace(problem, microbatches=5)).microbatches == 5
    assert choose_pipeline(replace(problem, schedules=("gpipe",))).schedule.name == "gpipe"
    assert choose_pipeline(replace(problem, stages_per_rank=3)).schedule.stages == 6
    choice = choose_pipeline(replace(problem, cuts=(1,)))
    assert choice.cuts == (1,)
    assert choose_pipeline(replace(problem, recompute="none")).recompute[0] == 0
    choice = choose_pipeline(replace(problem, recompute="all"))
    assert choice.recompute == tuple(np.diff((0, *choice.cuts, 8)))
    assert choose_pipeline(replace(problem, cuts=(4,), recompute=(1, 3))).recompute == (1, 3)
    # 12 in 5 microbatches: the larger ones have 3.
    assert choose_pipeline(replace(problem, microbatches=5)).costs[0].forward_us % 30 == 0


def test_more_ranks_than_blocks():
    with pytest.raises(PlanError, match=r"can be cut at 2 places, into 3 stages; use 3 ranks or"):
        choose_pipeline(uniform(3, ranks=4, batch=8))
    problem = uniform(5, ranks=4, batch=8, schedules=("zbv", "dualpipev"))
    with pytest.raises(PlanError, match=r"no pipeline of at most 5 stages on 4 ranks .* zbv or"):
        choose_pipeline(problem)


@pytest.mark.parametrize(
    "pins, message",
    [
        ({"cuts": (0,)}, "cuts (0,) of a pipeline: write the blocks at which stages after the"),
        ({"cuts": (8,)}, "from 1 to 7"),
        ({"cuts": (5, 3, 6)}, "in ascending order"),
        ({"cuts": (3, 5)}, "no pipeline of 3 stages on 2 ranks"),
        ({"cuts": (4,), "recompute": (5, 0)}, "whose stages have [4, 4] blocks"),
        ({"recompute": (1, 0)}, "write none, all or, with cuts, the number"),
        ({"recompute": "some"}, "recompute 'some'"),
        (
            {"microbatches": 17},
            "a batch of 16 in 17 microbatches: each needs a sample; choose 1 to",
        ),
        ({"schedules": ("1f1b", "forward-only")}, "choose of gpipe, 1f1b"),
        ({"schedules": ()}, "(none)"),
        ({"ranks": 0}, "each has to be 1 or more"),
    ],
)
def test_wrong_pins(pins: dict[str, object], message: str):
    with pytest.raises(PlanError, match=re.escape(message)):
        choose_pipeline(replace(uniform(8, ranks=2, batch=16), **pins))  # type: ignore[arg-type]


def test_wrong_blocks():
    with pytest.raises(PlanError, match=r"block a of a pipeline: forward_us is -1; 0 is the least"):
        Block("a", -1)
    with pytest.raises(PlanError, match="block a of a pipeline: W needs 2 bytes of the 1 that"):
        Block("a", 1, held_bytes=1, weight_bytes=2)


def test_what_dominates_the_memory_is_named():
    def states(samples: int) -> list[Block]:
        return [Block(f"h.{at}", 1, state_bytes=2**30, held_bytes=2**20) for at in range(4)]

    problem = PipelineProblem(states, 2, 4, Link(0, 0), budget_bytes=2**30)
    with pytest.raises(InfeasibleError) as caught:
        choose_pipeline(problem)
    message = str(caught.value)
    assert "rank 0 (stage 0: h.0-h.1) has 2 GiB of parameters, gradients and optimizer" in message
    assert "Most are states: shard them, or use more ranks, or raise the budget to" in message

    def activations(samples: int) -> list[Block]:
        return [Block(f"h.{at}", 1, held_bytes=2**30 * samples) for at in range(4)]

    with pytest.raises(InfeasibleError, match="Most are activations: use smaller blocks"):
        choose_pipeline(PipelineProblem(activations, 2, 4, Link(0, 0), budget_bytes=2**29))
    with pytest.raises(InfeasibleError, match="allow more microbatches and recomputation"):
        choose_pipeline(
            PipelineProblem(
                activations, 2, 4, Link(0, 0), budget_bytes=2**29, microbatches=1, recompute="none"
            )
        )
