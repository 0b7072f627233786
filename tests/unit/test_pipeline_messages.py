"""Messages between stages are released as soon as the other rank is known to have them."""

import pytest

from autopar.runtime import pipeline_runtime
from autopar.runtime.pipeline_runtime import _Sent
from autopar.schedule.pipeline.actions import Action, Kind
from autopar.schedule.pipeline.schedules import SCHEDULES, make_schedule

TRAINS = [name for name, row in SCHEDULES.items() if row.trains]


class Message:
    """A work of torch, of which only `wait` is called."""

    def __init__(self, taken_by: tuple[int, bool, int], taken: set) -> None:
        self.taken_by, self.taken, self.waited = taken_by, taken, False

    def wait(self) -> None:
        assert self.taken_by in self.taken, "it might wait for ever"
        self.waited = True


def ran(name: str, ranks: int, microbatches: int) -> list[int]:
    """Run the actions of all ranks in an order that can be; by rank, the most messages that it
    held."""
    per_rank = SCHEDULES[name].stages_per_rank
    schedule = make_schedule(name, ranks, microbatches, per_rank)
    owner, last = schedule.rank_of_stage, schedule.stages - 1
    sent = [_Sent(schedule) for _ in range(ranks)]
    held: list[list[Message]] = [[] for _ in range(ranks)]
    most, at, done, taken = [0] * ranks, [0] * ranks, set(), set()

    def needed(action: Action) -> tuple[int, bool, int] | None:
        forward = action.kind is Kind.FORWARD
        source = action.stage + (-1 if forward else 1)
        if action.kind is Kind.WEIGHT or not 0 <= source <= last:
            return None
        return source, forward, action.microbatch

    while any(k < len(row) for k, row in zip(at, schedule.ranks, strict=True)):
        before = list(at)
        for rank, row in enumerate(schedule.ranks):
            if at[rank] == len(row):
                continue
            action = row[at[rank]]
            source = needed(action)
            if source is not None and source not in done:
                continue
            key = action.stage, action.kind is Kind.FORWARD, action.microbatch
            at[rank] += 1
            if action.kind is Kind.WEIGHT:
                continue
            taken.add(key)
            if source is not None:
                sent[rank].arrived(*source)
            done.add(key)
            target = action.stage + (1 if key[1] else -1)
            if 0 <= target <= last and owner[target] != rank:
                taker = target, key[1], action.microbatch
                message = Message(taker, taken)
                held[rank].append(message)
                sent[rank].send([message], *taker)
            held[rank] = [m for m in held[rank] if not m.waited]
            most[rank] = max(most[rank], len(held[rank]))
        assert at != before, "no rank goes on"
    for rank in range(ranks):
        sent[rank].finish()
        assert all(m.waited for m in held[rank])
    return most


@pytest.fixture(autouse=True)
def _messages_as_they_are(monkeypatch):
    monkeypatch.setattr(pipeline_runtime.torch_schedules, "_batch_p2p", lambda ops: ops)


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_no_rank_waits_for_what_is_not_taken(name, ranks):
    for microbatches in (2 * ranks, 4 * ranks):
        ran(name, ranks, microbatches)


@pytest.mark.parametrize("name", [name for name in TRAINS if name != "gpipe"])
def test_messages_do_not_add_up_over_microbatches(name):
    few, many = ran(name, 4, 16), ran(name, 4, 64)
    assert many == few
    assert max(many) < 16
