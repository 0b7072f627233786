"""The predicted step as a Chrome trace, which Perfetto (https://ui.perfetto.dev) reads too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from autopar.schedule.program import Resource
from autopar.schedule.timeline import Timeline

_ROWS = {resource: {"pid": 0, "tid": row} for row, resource in enumerate(Resource)}


def trace_of(timeline: Timeline) -> dict[str, Any]:
    """A row of operators per resource, and counters of live bytes; JSON. Recomputed operators have
    a category of their own."""
    return {"traceEvents": [*_names(timeline), *_events(timeline)], "displayTimeUnit": "ms"}


def _names(timeline: Timeline) -> Iterator[dict[str, Any]]:
    def name(resource: Resource, kind: str, text: str) -> dict[str, Any]:
        return _ROWS[resource] | {"ph": "M", "name": kind, "args": {"name": text}}

    yield name(Resource.COMPUTE, "process_name", "predicted step")
    used = {event.resource for event in timeline.events} | {Resource.COMPUTE}
    for resource in Resource:
        if resource in used:
            yield name(resource, "thread_name", str(resource))


def _events(timeline: Timeline) -> Iterator[dict[str, Any]]:
    parameters = any(event.parameter for event in timeline.events)
    for at, event in enumerate(timeline.events):
        phase = "forward" if at < timeline.forward else "backward"
        yield _ROWS[event.resource] | {
            "ph": "X",
            "name": event.name,
            "cat": "recompute" if event.recomputed else phase,
            "ts": event.start_us,
            "dur": event.us,
            "args": {"module": event.module, "live bytes": event.live_bytes},
        }
        yield _counter("live bytes", event.issued_us, bytes=event.live_bytes)
        yield _counter(
            "live by origin", event.issued_us, kept=event.kept_bytes,
            recomputed=event.recomputed_bytes, other=event.other_bytes,
        )  # fmt: skip
        if parameters:
            yield _counter("parameters on the host", event.issued_us, bytes=event.evicted_bytes)
    yield _counter("live bytes", timeline.us, bytes=0)


def _counter(name: str, at_us: float, **values: int) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": 0, "ts": at_us, "args": values}
