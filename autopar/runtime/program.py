"""A program's forward and backward graph as one differentiable function.

AOTAutograd brings a runtime of its own, for programs of every kind: whose results are views of
their arguments or of each other, or that write into arguments. Sharded programs are rarely of such
a kind, and what that runtime does in Python takes up to a millisecond of a step. `differentiable`
does what is left for the others.

Private to torch here: `_DisableAutocast`, `maybe_clear_saved_tensors` and `boxed_grads_call`, as
AOTAutograd uses them, and `_will_engine_execute_node`. Tested with 2.11, which knows no
`boxed_grads_call`, and 2.13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor

from autopar.errors import EngineError
from autopar.runtime.distribute import gradients

# What a graph is called by: a list of tensors, which it empties so that they die at their last use.
Boxed = Callable[[list[Any]], Sequence[Any]]


class OtherKind(Exception):
    """Says why a program needs AOTAutograd's runtime."""


@dataclass(frozen=True)
class _Tangent:
    """Of which result a gradient is, and how the backward graph expects it."""

    result: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def of(self, grads: Sequence[torch.Tensor | None]) -> torch.Tensor:
        grad = grads[self.result]
        if grad is not None and grad.stride() == self.stride:
            return grad
        made = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        return made.zero_() if grad is None else made.copy_(grad)


@dataclass(frozen=True)
class Program:
    """Call it with flat tensors; parameters may be DTensors, and then so are their gradients.

    Args:
        forward: takes the tensors on this rank, gives the results and what it saves.
        backward: takes what is saved and the gradients of results, gives those of the arguments.
        results: how many they are.
        constant: positions of those without gradients.
        tangents: the gradients that the backward takes, in that order.
        casts: autocast was on when the graphs were traced, so that what it casts is in them.
    """

    forward: Boxed
    backward: Boxed
    results: int
    constant: tuple[int, ...]
    tangents: tuple[_Tangent, ...]
    casts: bool

    def __call__(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        found: tuple[Any, ...] = _Run.apply(self, *flat)
        return found

    def run(self, graph: Boxed, arguments: list[Any]) -> Sequence[Any]:
        if not self.casts:
            return graph(arguments)
        with torch._C._DisableAutocast():
            return graph(arguments)


def differentiable(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    run_forward: Boxed,
    run_backward: Boxed,
    *,
    arguments: Sequence[torch.Tensor],
    results: Sequence[Any],
) -> Program:
    """Two graphs, as AOTAutograd has compiled them, as one function.

    Args:
        forward, backward: the graphs, with `meta["val"]` on the placeholders of the backward.
        run_forward, run_backward: run them.
        arguments, results: of a call of the function that AOTAutograd has made; may be fake.

    Raises:
        OtherKind: the program needs AOTAutograd's function.
    """
    storages = [
        t.untyped_storage()._cdata for t in (*arguments, *results) if isinstance(t, torch.Tensor)
    ]
    if len(set(storages)) < len(storages):
        raise OtherKind("a result is a view of an argument or of another result")
    given = [n.meta["val"] for n in backward.graph.find_nodes(op="placeholder")]
    (made,) = forward.graph.output_node().args
    (grads,) = backward.graph.output_node().args
    trained = [k for k, t in enumerate(results) if isinstance(t, torch.Tensor) and t.requires_grad]
    saved = len(given) - len(trained)
    if len(made) != len(results) + saved:  # type: ignore[arg-type]
        raise OtherKind("it writes into arguments, or has results that are views of the same value")
    if len(grads) != len(arguments):  # type: ignore[arg-type]
        raise OtherKind("its gradients are not those of its arguments")
    tangents = tuple(
        _Tangent(k, t.size(), t.stride(), t.dtype, t.device)
        for k, t in zip(trained, given[saved:], strict=True)
    )
    if any(t.size != results[t.result].size() for t in tangents):
        raise OtherKind("its gradients are not those of its results")
    constant = tuple(
        k for k, t in enumerate(results) if isinstance(t, torch.Tensor) and k not in trained
    )
    casts = torch._C._is_any_autocast_enabled()
    return Program(run_forward, run_backward, len(results), constant, tangents, casts)


class _Run(torch.autograd.Function):
    boxed_grads_call = True  # gradients in a list, so that they die at their last use as well

    @staticmethod
    def forward(ctx: Any, program: Program, *flat: torch.Tensor) -> tuple[Any, ...]:
        made = program.run(program.forward, [_local(x) for x in flat])
        # what holds a view holds its base, whose gradient this function is
        kept = [x.detach() if x._is_view() else x for x in made[program.results :]]
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        ctx.program = program
        ctx.parameters = [x if isinstance(x, DTensor) else None for x in flat]
        results = tuple(_apart(x) for x in made[: program.results])
        ctx.mark_non_differentiable(*(results[k] for k in program.constant))
        return results

    @staticmethod
    def backward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        grads = given[0] if isinstance(given[0], list) else list(given)
        del given
        program: Program = ctx.program
        arguments = [*ctx.saved_tensors]
        ctx.maybe_clear_saved_tensors()
        arguments += [t.of(grads) for t in program.tangents]
        callers = [g.data_ptr() for g in grads if g is not None]
        grads.clear()
        with torch.no_grad():
            local = program.run(program.backward, arguments)
            made = gradients(ctx.parameters, local, taken=callers)
            del local
        if torch.is_grad_enabled():  # create_graph=True
            made = list(_Once.apply(torch.empty(0, requires_grad=True), *made))
        else:
            _deliver(ctx.parameters, made, [node for node, _ in ctx.next_functions])
        return None, *made


def _deliver(
    parameters: Sequence[DTensor | None],
    grads: list[torch.Tensor | None],
    nodes: Sequence[Any],
) -> None:
    """Put gradients where autograd is to, at a tenth of the time: it makes each DTensor anew.

    It stays autograd's where there is a gradient to add to, where a hook may want to see it, and
    where it is not for the parameter (`torch.autograd.grad`). What is delivered becomes None.

    Args:
        nodes: what autograd runs next, with each gradient.
    """
    if torch.is_anomaly_enabled():
        return
    for k, (p, grad, node) in enumerate(zip(parameters, grads, nodes, strict=True)):
        if p is not None and grad is not None and p.grad is None and _only_for(p, node):
            p.grad, grads[k] = grad, None


def _only_for(p: DTensor, node: Any) -> bool:
    """Autograd is to put a gradient into the parameter, and nobody else asks for it."""
    if node is None or not p.is_leaf or p._backward_hooks or p._post_accumulate_grad_hooks:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # `torch.autograd.grad`
        return False


class _Once(torch.autograd.Function):
    """Gradients that depend on what has gradients, whose own are not to be had."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return tuple(None if g is None else g.detach() for g in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise EngineError(
            "the gradients of a distributed program have no gradients themselves: "
            "create_graph=True is for models that run on one device"
        )


def _local(x: torch.Tensor) -> torch.Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x


def _apart(x: Any) -> Any:
    """A result that is a view of what only the program knows: no view for the caller."""
    if isinstance(x, torch.Tensor) and x._is_view():
        return torch.ops.aten._unsafe_view.default(x, x.shape)
    return x
