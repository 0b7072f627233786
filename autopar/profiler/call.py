"""One operator call on fake tensors: its work, its derivative, and what both save and free."""

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
from autopar.ir.graph import operand_at, operands
from autopar.profiler.counting import Recorder, Work
from autopar.profiler.tape import GRADIENT, OPERAND, Emission, Event, Storage, Strides, Tape

aten = torch.ops.aten

_NUMBER = re.compile(r"_\d+$")


class _Saved:
    """Holds a tensor that autograd saves. Autograd deletes it to release the tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class Call:
    """One operator call on fake operands. Its autograd graph lives until `finish` consumes it.

    Args:
        requires_grad: per operand.
        on_view: the call overwrites a view. Autograd then differentiates the base by a node of its
            own (`CopySlices`), which copies the gradient. So the call is made as the author wrote
            it.
    """

    def __init__(
        self,
        node: fx.Node,
        requires_grad: Sequence[bool],
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
            self._make_operands(node, requires_grad)
            if on_view:
                self._view_first_operand(node)
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: self.fakes.get(n, n.meta["val"])
            )
            with self._hooks(), self.recorder:
                out = program(*args, **kwargs)
        self.results = tensors_of(out)
        self.carries = tuple(t.requires_grad for t in self.results)
        self.views = tuple(map(_views_all_of_its_base, self.results))
        self.storages = tuple(map(self.recorder.storage, self.results))
        self.work, self.events = self.recorder.take()

    def _make_operands(self, node: fx.Node, requires_grad: Sequence[bool]) -> None:
        self.fakes: dict[fx.Node, torch.Tensor] = {}
        self.leaves: list[tuple[int, torch.Tensor]] = []
        for i, (n, grad) in enumerate(zip(operands(node), requires_grad, strict=True)):
            if n is None or n in self.fakes:
                continue
            like = n.meta["val"]
            fake = torch.empty_strided(
                like.size(), like.stride(), dtype=like.dtype, device=like.device
            )
            self.fakes[n] = fake.requires_grad_(grad)
            self.recorder.name(fake, Storage(OPERAND, i))
            if grad:
                self.leaves.append((i, fake))

    def _view_first_operand(self, node: fx.Node) -> None:
        """Put a view in the place of the first operand. Autograd refuses to overwrite leaves, so it
        is a view of a copy, under the operand's name."""
        first = operand_at(node, 0)
        base = self.fakes[first].clone()
        self.recorder.name(base, Storage(OPERAND, 0))
        self.fakes[first] = base.view_as(base)

    def _hooks(self) -> AbstractContextManager[Any]:
        def pack(t: torch.Tensor) -> _Saved:
            number = len(self.saved)
            # a result that holds its own autograd graph would never be freed
            token = _Saved(t.detach() if t.requires_grad else t)
            self.saved.append(self.recorder.storage(t))
            self._tokens.append(weakref.ref(token, lambda _: self._released(number)))
            return token

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor)

    def _released(self, number: int) -> None:
        if self.recorder.open:
            self.recorder.events.append(Event("release", number))

    def finish(self, incoming: Sequence[Strides | None]) -> tuple[Work, Tape]:
        """Run the backward, unless no gradient comes in. The result is the backward's work, and the
        tape of forward and backward.

        Args:
            incoming: per result the strides of its gradient, or None if it has none.
        """
        self.spent = True
        runs = any(strides is not None for strides in incoming)
        work, events, emitted = self._backward(incoming) if runs else (Work(), (), [])
        self.recorder.open = False
        tape = Tape(
            tuple(self.recorder.sizes), self.events, self.storages, tuple(self.saved),
            events, tuple(emitted), tuple(self.recorder.overwrites),
        )  # fmt: skip
        return work, tape.in_place() if self._in_place else tape

    def _backward(
        self, incoming: Sequence[Strides | None]
    ) -> tuple[Work, tuple[Event, ...], list[Emission]]:
        seeds: dict[int, torch.Tensor] = {}
        roots, stand_ins = [], []
        emitted: list[Emission] = []
        tensors: list[weakref.ref[torch.Tensor]] = []
        passed: dict[int, weakref.ref[torch.Tensor]] = {}

        def emit(i: int, gradient: torch.Tensor | None) -> None:
            if gradient is None:  # of a custom function
                return
            number = next((~k for k, ref in passed.items() if ref() is gradient), None)
            if number is None:
                number = next((m for m, r in enumerate(tensors) if r() is gradient), len(tensors))
                tensors.append(weakref.ref(gradient))
            self.recorder.events.append(Event("emit", len(emitted)))
            storage = self.recorder.storage(gradient)
            view = gradient._is_view()
            emitted.append(Emission(i, storage, number, view, gradient.stride()))

        with self.mode:
            for k, strides in enumerate(incoming):
                if strides is None:
                    continue
                t = self.results[k]
                seeds[k] = torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device)
                passed[k] = weakref.ref(seeds[k])
                self.recorder.name(seeds[k], Storage(GRADIENT, k))
                # only the engine may hold a gradient, so that its end is seen: a stand-in goes in
                # here, and a hook replaces it by the gradient
                t.register_hook(lambda _, k=k: seeds.pop(k))
                roots.append(t)
                stand_ins.append(torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape))
            for i, leaf in self.leaves:
                leaf.register_hook(lambda gradient, i=i: emit(i, gradient))
            with self.recorder:
                gradients = torch.autograd.grad(
                    roots, [leaf for _, leaf in self.leaves], stand_ins, allow_unused=True
                )
            self.recorder.open = False
            del gradients
        work, events = self.recorder.take()
        return work, events, emitted


def origin_of(node: fx.Node) -> str:
    """The operator that the author's code called. Capturing may have replaced it.

    Export names a node after its operator, with a number.
    """
    sources = node.meta.get("from_node")
    name = sources[0].name if sources else node.name
    return _NUMBER.sub("", name)


def _written_in_place(node: fx.Node) -> bool:
    """Whether the author's operator overwrote its first operand, or a part of it."""
    assert isinstance(node.target, torch._ops.OpOverload)
    base, origin = node.target._schema.name.removeprefix("aten::"), origin_of(node)
    return origin.endswith("_") and (base == origin[:-1] or base.endswith("_scatter"))


def in_place_variant(node: fx.Node) -> Any:
    """The operator that overwrites the first operand, if the author wrote it so."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._opname + "_"
    if not _written_in_place(node) or origin_of(node) != name:
        return None
    return getattr(getattr(aten, name, None), node.target._overloadname, None)


def _views_all_of_its_base(t: torch.Tensor) -> bool:
    return t._is_view() and t._base is not None and t.numel() == t._base.numel()


def _program(node: fx.Node, eager: bool) -> Any:
    """What to dispatch for a node: its operator, or with `eager` what eager PyTorch runs."""
    if not eager:
        return node.target
    if node.target is aten.clone.default and origin_of(node) == "dropout":
        return lambda x: x  # a rate of 0
    return _EAGER.get(node.target, node.target)


def _dropout(x: Any, p: float, train: Any) -> Any:
    return torch.dropout(x, p, bool(train)), None


def _batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Any:
    results = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *results, mean, var  # updated in place


# what capturing replaced, and what eager PyTorch runs
_EAGER: Mapping[Any, Callable[..., Any]] = {
    aten.native_dropout.default: _dropout,
    aten._native_batch_norm_legit_functional.default: _batch_norm,
}
