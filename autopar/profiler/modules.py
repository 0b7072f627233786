"""The profile by module: what every part of the model computes, moves, saves and holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch.fx as fx

from autopar.ir.graph import ModelGraph
from autopar.profiler.counting import Work
from autopar.profiler.profile import NodeProfile
from autopar.profiler.tape import Count
from autopar.profiler.timeline import MemoryTimeline


@dataclass(frozen=True)
class ModuleRow:
    """One module with all that is inside of it.

    Args:
        path: qualified name; "" is the model.
        calls: operator calls.
        forward, backward: their work.
        saved_bytes: kept for backward, each storage at the call that keeps it first; as in
            `MemoryTimeline.saved_bytes`.
        parameters: elements; a tied weight counts in every module that has it, once in each.
    """

    path: str
    calls: int = 0
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    saved_bytes: Count = 0
    parameters: int = 0

    @property
    def depth(self) -> int:
        """Of the model 0, of its children 1."""
        return len(self.path.split(".")) if self.path else 0


def _with_parents(path: str) -> Iterator[str]:
    yield ""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def module_table(
    graph: ModelGraph, profiles: Mapping[fx.Node, NodeProfile], timeline: MemoryTimeline
) -> list[ModuleRow]:
    """A row per module, parents before children, in the order of execution."""
    calls: dict[str, list[fx.Node]] = {"": []}
    for node in profiles:
        for path in _with_parents(graph.info(node).module):
            calls.setdefault(path, []).append(node)
    held: dict[str, dict[str, int]] = {}
    names = {name: name for name in graph.parameters.values()} | dict(graph.aliases)
    size = {
        name: int(graph.placeholders[p].meta["val"].numel()) for p, name in graph.parameters.items()
    }
    for name, stands in names.items():
        for path in _with_parents(name.rpartition(".")[0]):
            held.setdefault(path, {})[stands] = size.get(stands, 0)
    return [
        ModuleRow(
            path,
            len(nodes),
            sum((profiles[n].forward for n in nodes), Work()),
            sum((profiles[n].backward for n in nodes), Work()),
            sum(timeline.saved_by.get(n.name, 0) for n in nodes),
            sum(held.get(path, {}).values()),
        )
        for path, nodes in _nested(calls)
    ]


def _nested(calls: Mapping[str, list[fx.Node]]) -> Iterator[tuple[str, list[fx.Node]]]:
    """Depth first; children in the order in which they first ran."""
    children: dict[str, list[str]] = {}
    for path in calls:
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)

    def walk(path: str) -> Iterator[tuple[str, list[fx.Node]]]:
        yield path, calls[path]
        for child in children.get(path, []):
            yield from walk(child)

    yield from walk("")
