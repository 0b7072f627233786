"""The profile per module: what it computes, moves, saves and holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

import torch.fx as fx

from autopar.ir.graph import ModelGraph
from autopar.profiler.counting import Work
from autopar.profiler.profile import NodeProfile
from autopar.profiler.tape import Count, MemoryTimeline


@dataclass(frozen=True)
class ModuleRow:
    """One module, with all modules inside it.

    Args:
        path: qualified name; "" is the model.
        calls: number of operator calls.
        forward, backward: their work.
        saved_bytes: saved for the backward. Each storage counts at the call that saves it first, as
            in `MemoryTimeline.saved_bytes`.
        parameters: number of elements. A tied weight counts once in every module that has it.
    """

    path: str
    calls: int = 0
    forward: Work = field(default_factory=Work)
    backward: Work = field(default_factory=Work)
    saved_bytes: Count = 0
    parameters: int = 0

    def __add__(self, other: ModuleRow) -> ModuleRow:
        """Two copies of a module, under the name of the first."""
        return ModuleRow(
            self.path,
            self.calls + other.calls,
            self.forward + other.forward,
            self.backward + other.backward,
            self.saved_bytes + other.saved_bytes,
            self.parameters + other.parameters,
        )

    @property
    def depth(self) -> int:
        """0 for the model, 1 for its children."""
        return len(self.path.split(".")) if self.path else 0


def with_parents(path: str) -> Iterator[str]:
    """The model (""), and all modules on the way to this one."""
    yield ""
    if path:
        yield from accumulate(path.split("."), "{}.{}".format)


def module_table(
    graph: ModelGraph, profiles: Mapping[fx.Node, NodeProfile], timeline: MemoryTimeline
) -> list[ModuleRow]:
    """A row per module, parents before children, in the order of execution."""
    calls: dict[str, list[fx.Node]] = {"": []}
    for node in profiles:
        for path in with_parents(graph.info(node).module):
            calls.setdefault(path, []).append(node)
    parameters: dict[str, dict[str, int]] = {}
    names = {name: name for name in graph.parameters.values()} | dict(graph.aliases)
    size = {
        name: int(graph.placeholders[p].meta["val"].numel()) for p, name in graph.parameters.items()
    }
    for name, owner in names.items():
        for path in with_parents(name.rpartition(".")[0]):
            parameters.setdefault(path, {})[owner] = size.get(owner, 0)
    return [
        ModuleRow(
            path,
            len(nodes),
            sum((profiles[n].forward for n in nodes), Work()),
            sum((profiles[n].backward for n in nodes), Work()),
            sum(timeline.saved_by.get(n.name, 0) for n in nodes),
            sum(parameters.get(path, {}).values()),
        )
        for path, nodes in _nested(calls)
    ]


def _nested(calls: Mapping[str, list[fx.Node]]) -> Iterator[tuple[str, list[fx.Node]]]:
    """Depth first, children in the order in which they first ran."""
    children: dict[str, list[str]] = {}
    for path in calls:
        if path:
            children.setdefault(path.rpartition(".")[0], []).append(path)

    def walk(path: str) -> Iterator[tuple[str, list[fx.Node]]]:
        yield path, calls[path]
        for child in children.get(path, []):
            yield from walk(child)

    yield from walk("")
