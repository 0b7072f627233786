"""One operator call on fake tensors: its program, its derivative, what they keep and free."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.ir.aliasing import tensors_of
from autopar.ir.graph import operands
from autopar.profiler.counting import Recorder, Work
from autopar.profiler.tape import GRADIENT, OPERAND, Emission, Event, Storage, Strides, Tape

aten = torch.ops.aten

_NUMBER = re.compile(r"_\d+$")


class _Saved:
    """A tensor that autograd keeps; when it goes, it was released."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Call:
    """One operator call on fake operands, with its autograd graph until `finish` consumes it.

    Args:
        wanted: per operand, whether it requires grad.
        on_view: it overwrites a view. Autograd then differentiates the base by a node of its own
            (`CopySlices`), which copies the gradient; so the call is made as the author wrote it.
    """

    def __init__(
        self,
        node: fx.Node,
        wanted: Sequence[bool],
        mode: FakeTensorMode,
        eager: bool,
        on_view: bool = False,
    ) -> None:
        self.mode, self.recorder, self.spent = mode, Recorder(), False
        self.saved: list[Storage] = []
        self._tokens: list[Any] = []
        program = in_place_variant(node) if on_view else _program(node, eager)
        self._in_place = eager and not on_view and _written_in_place(node)
        with mode, torch.enable_grad():
            self._operands(node, wanted)
            if on_view:
                self._view_first(node)
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: self.given.get(n, n.meta["val"])
            )
            with self._hooks(), self.recorder:
                out = program(*args, **kwargs)
        self.results = tensors_of(out)
        self.carries = tuple(t.requires_grad for t in self.results)
        self.views = tuple(map(_views_all_of_its_base, self.results))
        self.storages = tuple(map(self.recorder.storage, self.results))
        self.work, self.events = self.recorder.take()

    def _operands(self, node: fx.Node, wanted: Sequence[bool]) -> None:
        self.given: dict[fx.Node, torch.Tensor] = {}
        self.leaves: list[tuple[int, torch.Tensor]] = []
        for i, (n, grad) in enumerate(zip(operands(node), wanted, strict=True)):
            if n is None or n in self.given:
                continue
            like = n.meta["val"]
            made = torch.empty_strided(
                like.size(), like.stride(), dtype=like.dtype, device=like.device
            )
            self.given[n] = made.requires_grad_(grad)
            self.recorder.name(made, Storage(OPERAND, i))
            if grad:
                self.leaves.append((i, made))

    def _view_first(self, node: fx.Node) -> None:
        """Give a view of the first operand: of a copy under its name, as leaves are not written."""
        first = operands(node)[0]
        assert first is not None
        base = self.given[first].clone()
        self.recorder.name(base, Storage(OPERAND, 0))
        self.given[first] = base.view_as(base)

    def _hooks(self) -> AbstractContextManager[Any]:
        def pack(t: torch.Tensor) -> _Saved:
            number = len(self.saved)
            # detached: a result that holds its own autograd graph would never be freed
            token = _Saved(t.detach() if t.requires_grad else t)
            self.saved.append(self.recorder.storage(t))
            self._tokens.append(weakref.ref(token, lambda _: self._released(number)))
            return token

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor)

    def _released(self, number: int) -> None:
        if self.recorder.open:
            self.recorder.events.append(Event("release", number))

    def finish(self, arriving: Sequence[Strides | None]) -> tuple[Work, Tape]:
        """Run backward, if gradients arrive; its work, and the tape of the whole call.

        Args:
            arriving: per result the strides of its gradient, None where there is none.
        """
        self.spent = True
        reached = any(strides is not None for strides in arriving)
        work, events, emitted = self._backward(arriving) if reached else (Work(), (), [])
        self.recorder.open = False
        tape = Tape(
            tuple(self.recorder.sizes), self.events, self.storages, tuple(self.saved),
            events, tuple(emitted),
        )  # fmt: skip
        return work, tape.in_place() if self._in_place else tape

    def _backward(
        self, arriving: Sequence[Strides | None]
    ) -> tuple[Work, tuple[Event, ...], list[Emission]]:
        seeds: dict[int, torch.Tensor] = {}
        roots, stand_ins = [], []
        emitted: list[Emission] = []
        tensors: list[weakref.ref[torch.Tensor]] = []
        passed: dict[int, weakref.ref[torch.Tensor]] = {}

        def emit(i: int, gradient: torch.Tensor) -> None:
            number = next((~k for k, ref in passed.items() if ref() is gradient), None)
            if number is None:
                number = next((m for m, r in enumerate(tensors) if r() is gradient), len(tensors))
                tensors.append(weakref.ref(gradient))
            self.recorder.events.append(Event("emit", len(emitted)))
            storage = self.recorder.storage(gradient)
            view = gradient._is_view()
            emitted.append(Emission(i, storage, number, view, gradient.stride()))

        with self.mode:
            for k, strides in enumerate(arriving):
                if strides is None:
                    continue
                t = self.results[k]
                seeds[k] = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
                passed[k] = weakref.ref(seeds[k])
                self.recorder.name(seeds[k], Storage(GRADIENT, k))
                # the engine alone may hold a gradient, else it is not seen to die: a stand-in goes
                # in from here, and a hook hands over the real one
                t.register_hook(lambda _, k=k: seeds.pop(k))
                roots.append(t)
                stand_ins.append(torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape))
            for i, leaf in self.leaves:
                leaf.register_hook(lambda gradient, i=i: emit(i, gradient))
            with self.recorder:
                kept = torch.autograd.grad(
                    roots, [leaf for _, leaf in self.leaves], stand_ins, allow_unused=True
                )
            self.recorder.open = False
            del kept
        work, events = self.recorder.take()
        return work, events, emitted


def origin_of(node: fx.Node) -> str:
    """The operator that the author's code called, which capturing may have replaced by another.

    Node names tell: export numbers the nodes that it names after their operators.
    """
    sources = node.meta.get("from_node")
    name = sources[0].name if sources else node.name
    return _NUMBER.sub("", name)


def _written_in_place(node: fx.Node) -> bool:
    """Whether the author's operator overwrote its first operand, or a part of it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    base, written = node.target._schema.name.removeprefix("aten::"), origin_of(node)
    return written.endswith("_") and (base == written[:-1] or base.endswith("_scatter"))


def in_place_variant(node: fx.Node) -> Any:
    """The operator that overwrites the first operand, if that is how the author wrote it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._opname + "_"
    if not _written_in_place(node) or origin_of(node) != name:
        return None
    return getattr(getattr(aten, name, None), node.target._overloadname, None)


def _views_all_of_its_base(t: torch.Tensor) -> bool:
    return t._is_view() and t._base is not None and t.numel() == t._base.numel()


def _program(node: fx.Node, eager: bool) -> Any:
    """What to dispatch for a node: its operator, or what eager PyTorch runs in its place."""
    if not eager:
        return node.target
    if node.target is aten.clone.default and origin_of(node) == "dropout":
        return _nothing  # a rate of 0
    return _EAGER.get(node.target, node.target)


def _nothing(x: Any) -> Any:
    return x


def _dropout(x: Any, p: float, train: Any) -> Any:
    return torch.dropout(x, p, bool(train)), None


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    found = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *found, mean, var  # updated in place


# what capturing puts in the place of dropout and batch_norm
_EAGER: Mapping[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _dropout,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
}
