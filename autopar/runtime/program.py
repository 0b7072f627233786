"""A lowered step as one differentiable function.

Private to torch here: `_DisableAutocast`, `maybe_clear_saved_tensors` and `boxed_grads_call`, as
AOTAutograd uses them, `_will_engine_execute_node`, and fx's boxed code generator. Tested with 2.11,
which knows no `boxed_grads_call`, and 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor
from torch.fx._lazy_graph_module import _LazyGraphModule

from autopar.comm import host_copies
from autopar.comm.ranks import Ranks
from autopar.comm.world import explained_failures
from autopar.errors import EngineError
from autopar.passes.announce_gradients import announced
from autopar.passes.lower import LoweredStep
from autopar.progress import SILENT, Progress
from autopar.runtime.compiled_graphs import compiled_graphs
from autopar.runtime.distribute import argument_of, gradients
from autopar.runtime.result_gradients import ResultGradients
from autopar.runtime.sharded_values import ShardedParameter

_NOTHING: AbstractContextManager[None] = nullcontext()

# A graph is called by a list of tensors, which it empties so that they are freed at their last use.
Boxed = Callable[[list[Any]], Sequence[Any]]


Beside = Callable[[Sequence[Any], Collection[int]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Program:
    """Call it with flat tensors; parameters may be DTensors, and then so are their gradients.

    Args:
        step: what is run.
        forward: takes the tensors on this rank, gives the results and what it saves.
        backward: takes what is saved and the gradients of results, gives those of the arguments.
        weights: the rest of a backward that is split; takes what it returns behind its gradients.
        gradients: which results have a part in which gradients; None if each has a part in all.
        beside: what an optimizer does beside the backward; takes the arguments, and positions of
            those whose gradients are announced.
        announced: these positions.
    """

    step: LoweredStep
    forward: Boxed
    backward: Boxed | None
    gradients: ResultGradients | None = None
    weights: Boxed | None = None
    beside: Beside | None = None
    announced: frozenset[int] = frozenset()

    def __call__(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        if self.backward is None:
            with torch.no_grad():
                outputs = self.run(self.forward, [argument_of(x) for x in flat])
            return tuple(map(own, outputs))
        results: tuple[Any, ...] = _Run.apply(self, *flat)
        return results

    def run(self, graph: Boxed, arguments: list[Any]) -> Sequence[Any]:
        with explained_failures():
            if not torch._C._is_any_autocast_enabled():
                return graph(arguments)
            with torch._C._DisableAutocast():
                return graph(arguments)

    def tangents(self, grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """The gradients of the results as the backward graph reads them."""
        return [
            _laid_out(whole(grad), result.tangent)
            for grad, result in zip(grads, self.step.results, strict=True)
            if result.tangent is not None
        ]


def bind(
    step: LoweredStep,
    gradients: ResultGradients | None = None,
    *,
    beside: Beside | None = None,
    ranks: Ranks | None = None,
    progress: Progress = SILENT,
) -> Program:
    """Make a lowered step callable.

    Args:
        beside: as of `Program`.
        ranks: that bind the same step now, and agree on how it is compiled; each by itself if None.

    Raises:
        EngineError, VerifyError: see `compiled_graphs`.
    """
    parts = {"forward": step.forward, "backward": step.backward, "weights": step.weights}
    graphs = {name: gm for name, gm in parts.items() if gm is not None}
    if step.compile:
        run = compiled_graphs(graphs, step.compile, boxed, ranks, progress)
    else:
        run = {name: boxed(gm) for name, gm in graphs.items()}
    announcing = frozenset() if step.backward is None else announced(step.backward)
    return Program(
        step, run["forward"], run.get("backward"), gradients, run.get("weights"),
        beside if announcing else None, announcing,
    )  # fmt: skip


def boxed(gm: fx.GraphModule) -> Boxed:
    """Call a graph by a list that it empties, so that values are freed at their last use."""
    if not hasattr(fx.graph, "_BoxedCodeGen"):  # slower, node by node
        return fx.Interpreter(gm).boxed_run
    gm.graph.set_codegen(fx.graph._BoxedCodeGen())
    gm.recompile()
    _LazyGraphModule.force_recompile(gm)
    return functools.partial(type(gm).forward, gm)


def whole(grad: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient as a plain tensor, also where the caller computed on with DTensors."""
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def _laid_out(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """A gradient with the strides that the backward graph expects; zeros if there is none."""
    if grad is not None and grad.stride() == like.stride():
        return grad
    copy = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=like.device)
    return copy.zero_() if grad is None else copy.copy_(grad)


def own(x: Any) -> Any:
    """A result that is a view of a value inside the program, as no view for the caller."""
    if isinstance(x, torch.Tensor) and x._is_view():
        return torch.ops.aten._unsafe_view.default(x, x.shape)
    return x


class _Run(torch.autograd.Function):
    boxed_grads_call = True  # gradients in a list, so that they are freed at their last use as well

    @staticmethod
    def forward(ctx: Any, program: Program, *flat: torch.Tensor) -> tuple[Any, ...]:
        outputs = program.run(program.forward, [argument_of(x) for x in flat])
        count = len(program.step.results)
        # what holds a view holds its base, whose gradient this function is
        saved = [x.detach() if x._is_view() else x for x in outputs[count:]]
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        ctx.program = program
        ctx.parameters = [x if isinstance(x, ShardedParameter) else None for x in flat]
        results = tuple(map(own, outputs[:count]))
        constant = (
            x
            for x, result in zip(results, program.step.results, strict=True)
            if isinstance(x, torch.Tensor) and not result.differentiable
        )
        ctx.mark_non_differentiable(*constant)
        return results

    @staticmethod
    def backward(ctx: Any, *boxed_grads: Any) -> tuple[Any, ...]:
        grads = boxed_grads[0] if isinstance(boxed_grads[0], list) else list(boxed_grads)
        del boxed_grads
        program: Program = ctx.program
        arguments = [*ctx.saved_tensors]
        ctx.maybe_clear_saved_tensors()
        arguments += program.tangents(grads)
        present = tuple(g is not None for g in grads)
        callers = [g.data_ptr() for g in grads if g is not None]
        grads.clear()
        assert program.backward is not None
        differentiated = torch.is_grad_enabled()  # create_graph=True
        used = None if program.gradients is None else program.gradients.used(present)
        beside = _NOTHING
        if program.beside is not None and not differentiated:
            told = program.announced if used is None else program.announced & used
            beside = program.beside(ctx.parameters, told)
        with beside:
            with torch.no_grad() if differentiated else _NOTHING:
                local = program.run(program.backward, arguments)
                host_copies.settle(local)
                if used is not None:
                    local = [g if k in used else None for k, g in enumerate(local)]
                parameter_grads = gradients(ctx.parameters, local, taken=callers)
                del local
            if differentiated:
                parameter_grads = without_gradients(parameter_grads)
            else:
                nodes = [node for node, _ in ctx.next_functions]
                deliver(ctx.parameters, parameter_grads, nodes)
        return None, *parameter_grads


def deliver(
    parameters: Sequence[DTensor | None],
    grads: list[torch.Tensor | None],
    nodes: Sequence[Any],
) -> None:
    """Store gradients where autograd would, in a tenth of its time: it makes each DTensor anew.

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


def without_gradients(grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Gradients that depend on what has gradients, and say that their own are not to be had."""
    anchor = torch.empty(0, requires_grad=True)
    return list(_Once.apply(anchor, *grads))


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
