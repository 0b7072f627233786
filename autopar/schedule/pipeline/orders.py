"""In which order one rank runs its actions, for the published pipeline schedules.

All have one mechanism. A rank has an order of forwards and an order of backwards, over all
microbatches of all its stages. It runs the next forward while fewer than a limit are in flight
(forward done, backward not), otherwise the next backward. Backwards are full (B), or are split into
I and W, where a W follows when more than a number of W are pending. A schedule says what the two
orders, the limit and that number are.

The warm-up of the V schedules needs a number of microbatches. For fewer, they are made for that
number, and the excess is left out. That keeps a schedule valid, because microbatches meet only in
the order of a rank.

Sources:
    gpipe: Huang et al. 2019, arXiv:1811.06965.
    one_f_one_b, interleaved: Narayanan et al. 2021, arXiv:2104.04473 (PipeDream-Flush, and with
        several stages per rank).
    zb_h1: Qi et al. 2023, arXiv:2401.10241, section 2.
    zbv: Qi et al. 2023, section 6; Qi et al. 2024, arXiv:2405.15362 (V-ZB).
    dualpipev: DeepSeek's DualPipe (arXiv:2412.19437) folded into a V,
        https://github.com/deepseek-ai/DualPipe.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from autopar.schedule.pipeline.actions import Action, Kind


class Sizes(NamedTuple):
    """What the order of one rank depends on."""

    rank: int
    ranks: int
    stages_per_rank: int
    microbatches: int
    in_flight: int


class RankOrder(NamedTuple):
    """The order of one rank. A chunk is the number of a stage among the stages of its rank.

    Args:
        forwards, backwards: chunks, without end. The k-th time that a chunk comes is microbatch k.
        microbatches: for how many it is made; more than there are if its warm-up needs them.
        limit: by how many backwards were run, how many forwards may be in flight.
        pending: by how many backwards are still to run, how many W may be pending after the
            next one; None if it is not split.
    """

    forwards: Iterable[int]
    backwards: Iterable[int]
    microbatches: int
    limit: Callable[[int], int]
    pending: Callable[[int], int | None] = lambda left: None


def rank_actions(order: RankOrder, stages: tuple[int, ...], microbatches: int) -> list[Action]:
    """The actions of a rank with these stages, by chunk."""
    actions: list[Action] = []

    def run(chunk: int, kind: Kind, microbatch: int) -> None:
        if microbatch < microbatches:
            actions.append(Action(stages[chunk], kind, microbatch))

    forwards, backwards = _numbered(order.forwards), _numbered(order.backwards)
    pending: deque[tuple[int, int]] = deque()
    started = finished = 0
    left = order.microbatches * len(stages)  # of the backwards
    while left:
        if started - finished < order.limit(finished):
            chunk, microbatch = next(forwards)
            started += 1
            run(chunk, Kind.FORWARD, microbatch)
            continue
        chunk, microbatch = next(backwards)
        finished += 1
        if microbatch >= order.microbatches:
            continue
        may_be_pending = order.pending(left)
        left -= 1
        if may_be_pending is None:
            run(chunk, Kind.BACKWARD, microbatch)
            continue
        run(chunk, Kind.INPUT, microbatch)
        pending.append((chunk, microbatch))
        if len(pending) > may_be_pending:
            chunk, microbatch = pending.popleft()
            run(chunk, Kind.WEIGHT, microbatch)
    for chunk, microbatch in pending:
        run(chunk, Kind.WEIGHT, microbatch)
    return actions


def forward_actions(order: RankOrder, stages: tuple[int, ...], microbatches: int) -> list[Action]:
    """The forwards alone."""
    left = microbatches * len(stages)
    real = (
        Action(stages[chunk], Kind.FORWARD, microbatch)
        for chunk, microbatch in _numbered(order.forwards)
        if microbatch < microbatches
    )
    return list(itertools.islice(real, left))


def _numbered(chunks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """With each chunk, how often it came before."""
    counts: dict[int, int] = {}
    for chunk in chunks:
        counts[chunk] = counts.get(chunk, -1) + 1
        yield chunk, counts[chunk]


def _single(s: Sizes) -> tuple[Iterable[int], Iterable[int]]:
    return itertools.repeat(0), itertools.repeat(0)


def gpipe(s: Sizes) -> RankOrder:
    """All forwards, then all backwards."""
    limit = min(s.microbatches, s.in_flight)
    return RankOrder(*_single(s), s.microbatches, lambda done: limit)


def one_f_one_b(s: Sizes) -> RankOrder:
    """As many forwards as there are ranks from this one on, then one backward, one forward."""
    limit = min(s.ranks - s.rank, s.in_flight)
    return RankOrder(*_single(s), s.microbatches, lambda done: limit)


def zb_h1(s: Sizes) -> RankOrder:
    """1F1B, where rank r keeps r W pending. They fill its idle time at the end, and every rank
    holds as many microbatches as the first."""
    limit = min(s.ranks - s.rank, s.in_flight)
    pending = min(s.rank, s.in_flight - limit)
    return RankOrder(*_single(s), s.microbatches, lambda done: limit, lambda left: pending)


def interleaved(s: Sizes) -> RankOrder:
    """1F1B over several stages per rank: the microbatches of a round go through one chunk, then
    through the next."""
    sizes = _round_sizes(s.microbatches, s.ranks)
    warmup = (s.stages_per_rank - 1) * sizes[0] + 2 * (s.ranks - 1 - s.rank)
    return RankOrder(
        _in_rounds(range(s.stages_per_rank), sizes),
        _in_rounds(range(s.stages_per_rank - 1, -1, -1), sizes),
        s.microbatches,
        lambda done: warmup + 1,
    )


def _round_sizes(microbatches: int, ranks: int) -> list[int]:
    """A microbatch per rank at least, so that the first is back when the last was sent. The rest
    is spread over the rounds: ranks would wait in every chunk of a round that is shorter."""
    rounds = max(1, microbatches // ranks)
    least, larger = divmod(microbatches, rounds)
    return [least + (k < larger) for k in range(rounds)]


def _in_rounds(chunks: Sequence[int], sizes: Iterable[int]) -> Iterator[int]:
    rounds = [chunk for size in sizes for chunk in chunks for _ in range(size)]
    return itertools.chain(rounds, itertools.cycle(chunks))


def _v_orders(s: Sizes) -> tuple[Iterable[int], Iterable[int]]:
    """Chunk 0 runs alone until the first microbatch is back on this rank, in chunk 1. Both take
    turns until its gradient is back. Of chunk 1, p - r microbatches then run forward and backward
    before the first gradient reaches chunk 0; from there on both take turns again."""
    to_last = s.ranks - s.rank
    forwards = [0] * (2 * to_last - 1) + [1, 0] * s.rank + [1] * to_last
    return (
        itertools.chain(forwards, itertools.cycle((0, 1))),
        itertools.chain([1] * to_last, itertools.cycle((0, 1))),
    )


def zbv(s: Sizes) -> RankOrder:
    """2p chunks in flight on every rank. W follows I, except in the last p + r backwards: there, 2r
    W wait for the idle time at the end."""
    at_end = s.ranks + s.rank
    return RankOrder(
        *_v_orders(s),
        max(s.microbatches, 2 * s.ranks - 1),
        lambda done: 2 * s.ranks,
        lambda left: 0 if left > at_end else 2 * s.rank,
    )


def dualpipev(s: Sizes) -> RankOrder:
    """Each forward is next to a backward of the other chunk, beside which it can run. Backwards are
    split at the ends only: I goes first while other ranks wait for it."""
    warmup = s.ranks - s.rank - 1
    microbatches = max(s.microbatches, 2 * s.ranks)

    def pending(left: int) -> int | None:
        if left > 2 * microbatches - warmup:
            return 0
        return s.rank if left <= s.ranks else None

    return RankOrder(
        *_v_orders(s),
        microbatches,
        lambda done: 2 * s.ranks if done < warmup else 2 * s.ranks + 1,
        pending,
    )


def forward_only(s: Sizes) -> RankOrder:
    """Evaluation, in rounds as interleaved 1F1B."""
    forwards = _in_rounds(range(s.stages_per_rank), _round_sizes(s.microbatches, s.ranks))
    return RankOrder(forwards, (), s.microbatches, lambda done: 0)


def forward_only_v(s: Sizes) -> RankOrder:
    """Evaluation of stages in a V: both chunks take turns once the first microbatch is back."""
    alone = [0] * (2 * (s.ranks - s.rank) - 1)
    forwards = itertools.chain(alone, itertools.cycle((1, 0)))
    return RankOrder(forwards, (), s.microbatches, lambda done: 0)
