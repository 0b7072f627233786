"""The best cuts over schedules and numbers of microbatches: all of them, or by local search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from autopar.schedule.pipeline.memory import Counts
from autopar.schedule.pipeline.option import Borders, Option, Score
from autopar.schedule.pipeline.timeline import peak_bytes, step_time_us

# So many actions may be simulated to improve borders, a part of them for each of the best options;
# a bound takes as long as a number of actions.
IMPROVE_ACTIONS = 10_000_000
IMPROVED_OPTIONS = 4
BOUND_ACTIONS, BOUND_ACTIONS_PER_STAGE = 400, 20
# Moves of moves are looked at if there are no more than so many moves.
MOST_MOVES = 40
# How often some random moves lead out of a place where no single one helps.
KICKS = 300
# So many options are simulated in full.
FINAL_OPTIONS = 12
# Where ranks may recompute this or that, so many combinations are tried at the end.
FINAL_COUNTS = 32


@dataclass(frozen=True)
class Found:
    """Borders of an option, with the exact step."""

    option: Option
    borders: Borders
    counts: Counts
    step_us: float


def best_of_all(
    options: Sequence[Option], borders: Sequence[Borders] | None = None
) -> Found | None:
    """Of all choices, or of all with these borders. What cannot be the best is not simulated."""
    bounds = sorted(
        (option.bound_us(option.costs(e)), at, e)
        for at, option in enumerate(options)
        for e in borders or option.all_borders()
    )
    best: Found | None = None
    for bound_us, at, e in bounds:
        if best and bound_us >= best.step_us:
            break
        option = options[at]
        for counts in option.all_counts(e):
            costs = option.costs(e, counts)
            if best and option.bound_us(costs) >= best.step_us:
                continue
            us = step_time_us(option.schedule(), costs)
            if not best or us < best.step_us:
                best = Found(option, e, counts, us)
    return best


def best_found(options: Sequence[Option]) -> Found | None:
    """The best that local search finds."""
    best_us = math.inf
    starts: list[tuple[Score, int, Borders]] = []
    for at, option in sorted(enumerate(options), key=lambda o: o[1].least_us):
        if option.least_us >= best_us:
            break
        for borders in option.starts():
            score, _ = option.bound(borders)
            if score.step_us < best_us:
                score = option.score(borders)
            if not score.excess_bytes:
                best_us = min(best_us, score.step_us)
            starts.append((score, at, borders))
    improved: list[tuple[Score, int, Borders]] = []
    left: float = IMPROVE_ACTIONS
    for k, (score, at, borders) in enumerate(sorted(starts)):
        if left <= 0:
            break
        share = left / min(IMPROVED_OPTIONS, len(starts) - k)
        borders, score, rest = _improve(options[at], borders, score, share)
        left -= share - rest
        improved.append((score, at, borders))
    random = Random(0)
    for _ in range(KICKS):
        best = min(improved)[0]
        able = [
            k
            for k, (_, at, _) in enumerate(improved)
            if best.excess_bytes or options[at].least_us < best.step_us
        ]
        if left <= 0 or not able:
            break
        k = random.choice(able)
        score, at, borders = improved[k]
        moved = _kicked(options[at], borders, random)
        again, again_score, left = _improve(options[at], moved, options[at].score(moved), left)
        if again_score < score:
            improved[k] = again_score, at, again
    found: Found | None = None
    for score, at, borders in sorted(improved)[:FINAL_OPTIONS]:
        # Estimates from fewer microbatches are good to a percent or two.
        if score.excess_bytes or (found and score.step_us > 1.03 * found.step_us):
            continue
        option = options[at]
        for counts in itertools.islice(option.all_counts(borders), FINAL_COUNTS):
            costs = option.costs(borders, counts)
            if found and option.bound_us(costs) >= found.step_us:
                continue
            us = step_time_us(option.schedule(), costs)
            fits = max(peak_bytes(option.schedule(), costs)) <= option.budget_bytes
            if fits and (found is None or us < found.step_us):
                found = Found(option, borders, counts, us)
    return found


def _improve(
    option: Option, borders: Borders, score: Score, most_actions: float
) -> tuple[Borders, Score, float]:
    """Move borders while that helps: those with the lowest bounds are simulated first.

    Args:
        most_actions: that may be simulated. Also returned is how many were left.
    """
    seen = {borders}
    moves, further = _moves(option, borders), False
    while most_actions > 0:
        moves -= seen
        most_actions -= len(moves) * (BOUND_ACTIONS + BOUND_ACTIONS_PER_STAGE * option.stages)
        bounds = ((option.bound(moved), moved) for moved in moves)
        for _, moved in sorted(b for b in bounds if b[0][0] < score):
            seen.add(moved)
            most_actions -= option.actions
            if (moved_score := option.score(moved)) < score:
                borders, score = moved, moved_score
                moves, further = _moves(option, borders), False
                break
            if most_actions <= 0:
                break
        else:
            if further or len(moves) > MOST_MOVES:
                break
            further = True
            moves = {m for moved in _moves(option, borders) for m in _moves(option, moved)}
    return borders, score, most_actions


def _kicked(option: Option, borders: Borders, random: Random) -> Borders:
    """After some moves at random."""
    for _ in range(3):
        borders = random.choice(sorted(_moves(option, borders)) or [borders])
    return borders


def _moves(option: Option, borders: Borders) -> set[Borders]:
    """Each stage gives a block to a neighbour, and those of the fullest or else the busiest rank to
    any stage; the stages between move along."""
    times = option.rank_bounds_us(option.costs(borders, next(option.all_counts(borders), None)))
    over = [max(0.0, peak - option.budget_bytes) for _, peak in option.fits(borders)]
    worst = max(range(option.ranks), key=lambda rank: (over[rank], times[rank]))
    pairs = {(s, s + d) for s in range(option.stages) for d in (-1, 1)}
    pairs |= {(s, to) for s in option.stages_of[worst] for to in range(option.stages)}
    moves = set()
    for giver, taker in pairs:
        if not 0 <= taker < option.stages or borders[giver + 1] - borders[giver] == 1:
            continue
        moved = list(borders)
        for border in range(giver + 1, taker + 1):
            moved[border] -= 1
        for border in range(taker + 1, giver + 1):
            moved[border] += 1
        moves.add(tuple(moved))
    return moves - {borders}
