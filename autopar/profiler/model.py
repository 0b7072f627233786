"""The profile of a whole model, as numbers or as formulas in the batch and the sequence."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import sympy
import torch
import torch.fx as fx

from autopar.ir.graph import ModelGraph
from autopar.profiler.counting import Work
from autopar.profiler.memory import memory_timeline
from autopar.profiler.modules import ModuleRow, module_table
from autopar.profiler.profile import NodeProfile, profile_graph
from autopar.profiler.tape import Count, MemoryTimeline

# upper bound of the search in `largest`
_MAX_SIZE = 2**40


@dataclass(frozen=True)
class ModelProfile:
    """What one training step of a model computes, moves and holds.

    Args:
        graph: the captured model.
        nodes: profile per operator call.
        timeline: live bytes.
        symbols: symbols of the formulas, by name of the size; empty if all entries are numbers.
    """

    graph: ModelGraph
    nodes: Mapping[fx.Node, NodeProfile]
    timeline: MemoryTimeline
    symbols: Mapping[str, sympy.Symbol]

    @cached_property
    def forward(self) -> Work:
        return sum((p.forward for p in self.nodes.values()), Work())

    @cached_property
    def backward(self) -> Work:
        return sum((p.backward for p in self.nodes.values()), Work())

    @property
    def flops(self) -> Count:
        """FLOPs of forward and backward. Multiply and add count as two."""
        return self.forward.flops + self.backward.flops

    @property
    def saved_bytes(self) -> Count:
        return self.timeline.saved_bytes

    @property
    def peak_bytes(self) -> Count:
        return self.timeline.peak_bytes

    def modules(self) -> list[ModuleRow]:
        """A row per module, parents before children."""
        return module_table(self.graph, self.nodes, self.timeline)


def profile_model(
    graph: ModelGraph,
    trainable: Iterable[str] | None = None,
    *,
    symbolic: bool = False,
    eager: bool = True,
    sums_in_place: bool = True,
) -> ModelProfile:
    """Profile one training step, without running it.

    Args:
        trainable: placeholder names of the parameters that require grad; all parameters if None.
        symbolic: entries are formulas in the dynamic sizes of the graph. Otherwise they are
            numbers, for the sizes of the example.
        eager: profile the module as eager PyTorch runs it, see `profile_graph`.
        sums_in_place: see `memory_timeline`.

    Raises:
        ValueError: no size of the graph is dynamic, or two of the example's sizes are equal.
    """
    symbols = _dynamic_sizes(graph)
    if symbolic and not symbols:
        raise ValueError(
            "a symbolic profile needs a graph with dynamic sizes, and this one was captured with "
            "fixed ones; trace it with ColoTracer(dynamic=True)"
        )
    trainable = frozenset(graph.parameters if trainable is None else trainable)
    shapes = _input_shapes(graph)
    nodes = profile_graph(graph, trainable, eager=eager)
    timeline = memory_timeline(graph, nodes, trainable, sums_in_place=sums_in_place)
    if _input_shapes(graph) != shapes:
        raise ValueError(
            f"some of {', '.join(symbols.values())} are equal in the example inputs, and operators "
            "were profiled as if they always were; trace with example inputs of other sizes"
        )
    if symbolic:
        values = {s: sympy.Symbol(name, integer=True, positive=True) for s, name in symbols.items()}
    else:
        values = {s: sympy.Integer(n) for s, n in _example(graph).items()}
    return _replaced(ModelProfile(graph, nodes, timeline, {}), values)


def substitute(profile: ModelProfile, sizes: Mapping[str, int]) -> ModelProfile:
    """The profile at some sizes. The other sizes stay symbols.

    Args:
        sizes: by the names in `profile.symbols`.

    Raises:
        ValueError: the profile does not have such a size.
    """
    return _replaced(profile, _values(profile, sizes))


def largest(
    profile: ModelProfile,
    name: str,
    budget_bytes: float,
    sizes: Mapping[str, int] | None = None,
    *,
    input_bytes: float = 0.0,
) -> int:
    """The largest size whose step peaks within a budget, by bisection; 0 if 1 does not fit.

    Args:
        name: the size to maximize ("batch").
        budget_bytes: for activations and gradients. Parameters, buffers, inputs and optimizer
            state are not included.
        sizes: the other dynamic sizes.
        input_bytes: bytes of inputs per unit of the size, if the budget is for inputs too.

    Raises:
        ValueError: sizes are missing, or the peak does not depend on this one.
    """

    def peak(n: int) -> float:
        at = _evaluator(_values(profile, {**(sizes or {}), name: n}))
        deltas = [at(c.delta_bytes) for c in profile.timeline.changes]
        missing = {s for d in deltas if isinstance(d, sympy.Expr) for s in d.free_symbols}
        if missing:
            names = sorted(k for k, s in profile.symbols.items() if s in missing)
            raise ValueError(f"the peak also depends on {names}; give those sizes too")
        return max(accumulate(deltas)) + input_bytes * n

    low, high = 0, 1
    while peak(high) <= budget_bytes:
        low, high = high, 2 * high
        if high > _MAX_SIZE:
            raise ValueError(f"the peak stays within {budget_bytes} bytes whatever {name} is")
    return low + bisect_right(range(low + 1, high), budget_bytes, key=peak)


def _values(profile: ModelProfile, sizes: Mapping[str, int]) -> dict[sympy.Symbol, sympy.Integer]:
    for name in sizes:
        if name not in profile.symbols:
            raise ValueError(f"no dynamic size is called {name!r}; there are {[*profile.symbols]}")
    return {profile.symbols[name]: sympy.Integer(n) for name, n in sizes.items()}


def _evaluator(values: Mapping[sympy.Symbol, sympy.Expr]) -> Callable[[Count], Count]:
    """A function that puts values into entries. It computes each distinct entry once."""
    memo: dict[Any, Count] = {}

    def at(entry: Count) -> Count:
        if not isinstance(entry, sympy.Expr):
            return entry
        if entry not in memo:
            result = entry.xreplace(values)
            memo[entry] = int(result) if result.is_Integer else result
        return memo[entry]

    return at


def _replaced(profile: ModelProfile, values: Mapping[sympy.Symbol, sympy.Expr]) -> ModelProfile:
    """The profile with values for symbols."""
    if not values:
        return profile
    at = _evaluator(values)
    memo: dict[int, NodeProfile] = {}  # repeated layers share a profile object
    for p in profile.nodes.values():
        if id(p) not in memo:
            tape = replace(p.tape, sizes=tuple(map(at, p.tape.sizes)))
            forward, backward = _work(p.forward, at), _work(p.backward, at)
            memo[id(p)] = replace(p, forward=forward, backward=backward, tape=tape)
    nodes = {node: memo[id(p)] for node, p in profile.nodes.items()}
    changes = tuple(replace(c, delta_bytes=at(c.delta_bytes)) for c in profile.timeline.changes)
    saved = {name: at(nbytes) for name, nbytes in profile.timeline.saved_by.items()}
    remaining = (*values.values(), *(s for s in profile.symbols.values() if s not in values))
    symbols = {s.name: s for s in remaining if isinstance(s, sympy.Symbol)}
    return ModelProfile(profile.graph, nodes, MemoryTimeline(changes, saved), symbols)


def _work(work: Work, at: Callable[[Count], Count]) -> Work:
    return Work(at(work.flops), at(work.read_bytes), at(work.written_bytes), work.kernels)


def _input_values(graph: ModelGraph) -> Iterator[Any]:
    return (graph.placeholders[name].meta["val"] for name in graph.inputs if name is not None)


def _input_shapes(graph: ModelGraph) -> list[str]:
    """The shapes as text. They change if profiling finds that two sizes are the same."""
    return [str(value.shape) for value in _input_values(graph)]


def example_sizes(graph: ModelGraph) -> dict[str, int]:
    """The sizes of the example inputs, by the names of the dynamic dims."""
    example = _example(graph)
    return {name: example[symbol] for symbol, name in _dynamic_sizes(graph).items()}


def _dynamic_sizes(graph: ModelGraph) -> dict[sympy.Symbol, str]:
    """The graph's symbols with their names. Several may have one name, such as the batch."""
    return {s: graph.symbols[str(s)] for s in _example(graph) if str(s) in graph.symbols}


def _example(graph: ModelGraph) -> dict[sympy.Symbol, int]:
    """The sizes of the example inputs."""
    return {
        size.node.expr: size.node.hint
        for value in _input_values(graph)
        for size in value.shape
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol
    }
