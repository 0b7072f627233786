"""Predicts live bytes over a training step from the profiles of its operator calls.

The graph runs forward in its order, and backward in the order of autograd's engine: reversed, and a
parameter's gradient is accumulated when its last part is there. Storages live as long as they have
holders, as in PyTorch: values until their last use, saved tensors until the operator that saved
them has run backward, gradients until they are consumed.

The bytes are those of storages that the step makes: activations, gradients and results. Parameters,
buffers, inputs and optimizer state exist before. Gradients of parameters (None before the step) and
results stay to its end.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import ModelGraph, operand_at, producer
from autopar.profiler.counting import count
from autopar.profiler.profile import NodeProfile, Value, gradient_roots, summed_strides
from autopar.profiler.tape import (
    GRADIENT,
    OPERAND,
    OWN,
    Change,
    Count,
    Emission,
    Event,
    MemoryTimeline,
    Phase,
    Storage,
    Strides,
)


def memory_timeline(
    graph: ModelGraph,
    profiles: Mapping[fx.Node, NodeProfile],
    trainable: Iterable[str],
    *,
    sums_in_place: bool = True,
) -> MemoryTimeline:
    """Simulate one training step, without sharding and recomputation.

    Args:
        profiles: the result of `profile_graph`.
        trainable: placeholder names of the parameters that require grad.
        sums_in_place: gradients of one value are summed into the first one if autograd may do that.
            It may not under a `TorchDispatchMode`, such as one that measures memory.
    """
    return _Step(graph, profiles, frozenset(trainable), sums_in_place).run()


class _Holders:
    """Number of holders by storage. Unknown storages exist before the step."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.now: tuple[str, Phase] = ("", "forward")
        self._sizes: dict[Any, Count] = {}
        self._holders: Counter[Any] = Counter()

    def make(self, key: Any, nbytes: Count) -> None:
        self._sizes[key] = nbytes
        self._holders[key] = 1
        self.changes.append(Change(*self.now, nbytes))

    def hold(self, key: Any) -> None:
        if key in self._sizes:
            self._holders[key] += 1

    def drop(self, key: Any) -> None:
        if key in self._sizes:
            self._holders[key] -= 1
            if not self._holders[key]:
                self.changes.append(Change(*self.now, -self._sizes.pop(key)))

    def sole(self, key: Any) -> bool:
        return self._holders[key] == 1


@dataclass(frozen=True)
class _Gradient:
    """A gradient that is not consumed yet.

    Args:
        storage: key of its storage.
        tensor: equal for the same tensor in two places.
        view: another tensor, which it views, holds its storage.
    """

    storage: Any
    tensor: Any
    strides: Strides
    view: bool = False


class _Step:
    """The simulation. The key of a storage that a call makes is (node, number)."""

    def __init__(
        self,
        graph: ModelGraph,
        profiles: Mapping[fx.Node, NodeProfile],
        trainable: frozenset[str],
        sums_in_place: bool,
    ) -> None:
        self.graph, self.profiles, self.sums_in_place = graph, profiles, sums_in_place
        self.trainable = trainable
        self.nodes = list(profiles)
        self.live = _Holders()
        self.storage: dict[Value, Any] = {
            (n, 0): (n, "existing") for n in graph.placeholders.values()
        }
        self.saved: set[Any] = set()
        self.saved_by: dict[str, Count] = {}
        self.gradients: dict[Value, _Gradient] = {}
        self.shares: Counter[Any] = Counter()  # places that hold a gradient tensor
        self.sums = 0
        self.awaited: Counter[Value] = Counter(
            producer(operand_at(node, e.operand))
            for node in self.nodes
            for e in profiles[node].tape.emitted
        )

    def run(self) -> MemoryTimeline:
        last_uses = self._last_uses()
        unreachable = self._unreachable(last_uses)
        for node in self.nodes:
            self.forward(node, last_uses[node])
            for other in unreachable[node]:
                for storage in self.profiles[other].tape.saved:
                    self.live.drop(self._key(other, storage))
        self._start_backward()
        for node in reversed(self.nodes):
            self.backward(node)
        self.live.now = ("output", "backward")
        for node, k in gradient_roots(self.graph, self._carries):
            self.live.drop((node, k, "seed"))
        return MemoryTimeline(tuple(self.live.changes), self.saved_by)

    def _last_uses(self) -> dict[fx.Node, list[Value]]:
        """The values that nothing needs after a node. Results are needed to the end."""
        last_uses: dict[fx.Node, list[Value]] = {n: [] for n in self.nodes}
        seen = {producer(n) for n in self.graph.output.all_input_nodes}
        for node in reversed(self.nodes):
            for value in dict.fromkeys(producer(n) for n in node.all_input_nodes):
                if value not in seen and value[0] in last_uses:
                    seen.add(value)
                    last_uses[node].append(value)
            results = [(node, k) for k in range(len(self.profiles[node].carries))]
            last_uses[node] += [value for value in results if value not in seen]
        return last_uses

    def _unreachable(
        self, last_uses: Mapping[fx.Node, list[Value]]
    ) -> dict[fx.Node, list[fx.Node]]:
        """Calls that the backward does not reach, by the node after which their autograd graph is
        freed with its saved tensors: no value that was computed from them with a gradient lives."""
        order = {n: i for i, n in enumerate(self.nodes)}
        dies = {value: order[node] for node, values in last_uses.items() for value in values}
        unreachable: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        ends: dict[fx.Node, int] = {}
        for node in reversed(self.nodes):
            profile = self.profiles[node]
            values = [(node, k) for k in range(len(profile.carries))]
            parts = (u for u in node.users if u.target is operator.getitem)
            uses = [u for n in (node, *parts) for u in n.users if u in ends]
            ends[node] = max(
                [dies.get(value, len(order)) for value in values]
                + [ends[u] for u in uses if self.profiles[u].differentiable]
            )
            if profile.tape.saved and not profile.tape.backward and ends[node] < len(order):
                unreachable[self.nodes[ends[node]]].append(node)
        return unreachable

    # forward

    def forward(self, node: fx.Node, dying: Iterable[Value]) -> None:
        tape = self.profiles[node].tape
        self.live.now = (node.name, "forward")
        alive = self._play_own(node, tape.forward)
        for k, storage in enumerate(tape.results):
            self.storage[node, k] = self._key(node, storage)
            self.live.hold(self.storage[node, k])
            if self._is_leaf((node, k)) and self.awaited[node, k]:
                self.live.hold(self.storage[node, k])  # its `AccumulateGrad`, to the end
        for storage in tape.saved:
            key = self._key(node, storage)
            self.live.hold(key)
            parameter = key[1] == "existing" and key[0].target in self.graph.parameters
            if key not in self.saved and not parameter:
                self.saved.add(key)
                nbytes = self.saved_by.get(node.name, 0) + self._bytes(key)
                self.saved_by[node.name] = nbytes
        for index in alive:
            self.live.drop((node, index))
        for value in dying:
            self.live.drop(self.storage[value])

    def _play_own(self, node: fx.Node, events: Iterable[Event]) -> list[int]:
        """Play the events; the result are the storages that are made and not freed."""
        alive: list[int] = []
        for kind, index in events:
            if kind == "make":
                self.live.make((node, index), self.profiles[node].tape.sizes[index])
                alive.append(index)
            else:
                self.live.drop((node, index))
                alive.remove(index)
        return alive

    def _key(self, node: fx.Node, storage: Storage) -> Any:
        if storage.owner == OPERAND:
            return self.storage[producer(operand_at(node, storage.number))]
        return node, storage.number

    def _bytes(self, key: Any) -> Count:
        node, number = key
        if number == "existing":
            return count(node.meta["val"].untyped_storage().nbytes())
        return self.profiles[node].tape.sizes[number]

    # backward

    def _start_backward(self) -> None:
        self.live.now = ("output", "backward")
        for node, k in gradient_roots(self.graph, self._carries):
            like = tensors_of(node.meta["val"])[k]
            key = (node, k, "seed")
            self.live.make(key, _bytes_of(like))
            self.live.hold(key)  # the caller of the backward, to the end
            self.shares[key] = 2
            self._receive((node, k), _Gradient(key, key, like.stride()))

    def _carries(self, value: Value) -> bool:
        node, k = value
        if node.op == "placeholder":
            return node.target in self.trainable
        return node in self.profiles and self.profiles[node].carries[k]

    def _is_leaf(self, value: Value) -> bool:
        """Whether the value's gradient ends there and stays."""
        node, k = value
        return node.op == "placeholder" or k in self.profiles[node].leaves

    def backward(self, node: fx.Node) -> None:
        tape = self.profiles[node].tape
        if not tape.backward:
            return
        self.live.now = (node.name, "backward")
        incoming = {k: self.gradients.pop((node, k), None) for k in range(len(tape.results))}
        # what the call holds: incoming gradients and own storages
        held = {Storage(GRADIENT, k): g for k, g in incoming.items() if g is not None}
        unreleased = set(range(len(tape.saved)))
        for kind, index in tape.backward:
            if kind == "make":
                own = held[Storage(OWN, index)] = _Gradient((node, index), None, ())
                self.live.make(own.storage, tape.sizes[index])
            elif kind == "emit":
                self._emit(node, tape.emitted[index], incoming, held)
            elif kind == "release":
                unreleased.remove(index)
                self.live.drop(self._key(node, tape.saved[index]))
            else:
                # a storage of the forward is freed with its saved tensors
                consumed = held.pop(Storage(OWN if kind == "free" else GRADIENT, index), None)
                if consumed is not None:
                    self._release(consumed)
        for gradient in held.values():
            self._release(gradient)
        for index in unreleased:
            self.live.drop(self._key(node, tape.saved[index]))

    def _release(self, gradient: _Gradient) -> None:
        self.live.drop(gradient.storage)
        self.shares[gradient.tensor] -= 1

    def _emit(
        self,
        node: fx.Node,
        emission: Emission,
        incoming: Mapping[int, _Gradient | None],
        held: dict[Storage, _Gradient],
    ) -> None:
        """Pass a gradient on. The call releases a storage when it first passes it on."""
        holder = held.pop(emission.storage, None)
        source = incoming[emission.storage.number] if emission.storage.owner == GRADIENT else None
        if source is not None and emission.tensor < 0:
            gradient = source
        else:
            key = source.storage if source is not None else self._key(node, emission.storage)
            tensor = (node, "emitted", emission.tensor)
            gradient = _Gradient(key, tensor, emission.strides, emission.view)
        self.live.hold(gradient.storage)
        self.shares[gradient.tensor] += 1
        if holder is not None:
            self._release(holder)
        self._receive(producer(operand_at(node, emission.operand)), gradient)

    def _receive(self, value: Value, new: _Gradient) -> None:
        old = self.gradients.pop(value, None)
        self.gradients[value] = new if old is None else self._sum(value, old, new)
        if self._is_leaf(value):
            self.awaited[value] -= 1
            if not self.awaited[value]:
                self._accumulate(value, self.gradients.pop(value))

    def _sum(self, value: Value, old: _Gradient, new: _Gradient) -> _Gradient:
        """As `InputBuffer` of autograd's engine does."""
        like = tensors_of(value[0].meta["val"])[value[1]]
        sole = self.shares[old.tensor] == 1 and self.live.sole(old.storage) and not old.view
        if self.sums_in_place and sole and _dense(like.shape, old.strides):
            self._release(new)
            return old
        self.sums += 1
        key = (value, "sum", self.sums)
        self.live.make(key, _bytes_of(like))
        self.shares[key] = 1
        self._release(old)
        self._release(new)
        return _Gradient(key, key, summed_strides(like, old.strides, new.strides))

    def _accumulate(self, leaf: Value, gradient: _Gradient) -> None:
        """As `AccumulateGrad` does: the gradient itself becomes `.grad` if nothing else holds it
        and its layout is the leaf's; else a copy does."""
        like = tensors_of(leaf[0].meta["val"])[leaf[1]]
        fits = all(
            (g == s) if size != 1 else (not isinstance(g, int) or g != 0)
            for g, s, size in zip(gradient.strides, like.stride(), like.shape, strict=True)
        )
        if not (fits and self.shares[gradient.tensor] == 1):
            self.live.make((leaf, "grad"), _bytes_of(like))
            self._release(gradient)


def _bytes_of(t: torch.Tensor) -> Count:
    return count(t.numel() * t.element_size())


def _dense(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether elements have neither gaps nor overlaps."""
    expected: Any = 1
    dims = sorted((st, size) for st, size in zip(strides, shape, strict=True) if size != 1)
    for stride, size in dims:
        if stride != expected:
            return False
        expected = expected * size
    return True
