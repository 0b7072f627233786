"""Three resources as queues: what hides, and what compute waits for."""

import itertools

from autopar.report.trace import trace_of
from autopar.schedule.program import SIDE, Op, Program, Resource, Schedule
from autopar.schedule.simulate import timeline

COMPUTE, COMMUNICATION, HOST = Resource


def op(name: str, reads: tuple, makes: tuple, us: float, resource: Resource = COMPUTE) -> Op:
    return Op(name, name, reads, makes, 1.0, us, resource=resource, beside=resource != COMPUTE)


# a parameter (storage 0) is gathered, and then a product of it taken; others compute meanwhile
OPS = (
    op("gather", (0,), (1,), 10, COMMUNICATION),
    op("other", (), (2,), 6),
    op("product", (1, 2), (3,), 5),
    op("reduce", (3,), (4,), 7, COMMUNICATION),
    op("fetch", (), (5,), 30, HOST),
    op("last", (2,), (6,), 4),
)


def step(*forward: int, beside: frozenset = SIDE) -> tuple[Program, Schedule]:
    program = Program(
        OPS, tuple(sorted(forward)), (0, 1, 1, 1, 1, 1, 1), frozenset((3, 4, 6)), frozenset(),
        beside=beside,
    )  # fmt: skip
    return program, Schedule(forward, ())


def starts(predicted) -> dict[str, float]:
    return {m.name: m.start_us for m in predicted.events}


def test_what_stands_ahead_of_its_reader_hides():
    predicted = timeline(*step(0, 1, 2, 3, 5))
    assert starts(predicted) == {"gather": 0, "other": 0, "product": 10, "reduce": 15, "last": 15}
    assert predicted.waited_us[COMMUNICATION] == 4 + 3  # before the product, and at the end
    assert sum(e.us for e in predicted.events if e.resource is COMMUNICATION) == 17
    assert predicted.us == 22 == 6 + 5 + 4 + predicted.waited_us[COMMUNICATION]


def test_what_stands_before_its_reader_does_not():
    predicted = timeline(*step(1, 0, 2, 5))
    assert starts(predicted) == {"other": 0, "gather": 6, "product": 16, "last": 21}
    assert predicted.waited_us[COMMUNICATION] == 10


def test_a_stream_serves_in_order_and_resources_are_apart():
    predicted = timeline(*step(1, 4, 0, 2, 3, 5))
    assert starts(predicted)["fetch"] == starts(predicted)["gather"] == 6
    assert predicted.us == 36  # the copy ends last
    assert predicted.waited_us[COMMUNICATION] == 10 and predicted.waited_us[HOST] == 36 - 25


def test_without_streams_everything_occupies_compute():
    predicted = timeline(*step(0, 1, 4, 2, 3, 5, beside=frozenset()))
    assert predicted.us == sum(o.us for o in OPS)
    assert predicted.waited_us[COMMUNICATION] == 17 and predicted.waited_us[HOST] == 30
    assert [m.start_us for m in predicted.events] == [0, 10, 16, 46, 51, 58]


def test_a_trace_has_a_row_per_resource():
    trace = trace_of(timeline(*step(0, 1, 2, 3, 5)))["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in trace if e["name"] == "thread_name"}
    rows = {names[e["tid"]]: [] for e in trace if e["ph"] == "X"}
    for e in trace:
        if e["ph"] == "X":
            rows[names[e["tid"]]].append(e)
    assert set(rows) == set(names.values()) == {"compute", "communication"}
    for calls in rows.values():
        for before, after in itertools.pairwise(calls):
            assert before["ts"] + before["dur"] <= after["ts"]
    counters = [e["ts"] for e in trace if e["ph"] == "C" and e["name"] == "live bytes"]
    assert counters == sorted(counters)
