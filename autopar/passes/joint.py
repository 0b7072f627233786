"""Trace a sharded forward program to a joint graph of forward and backward.

Private to torch here: `make_fx` and its proxy mode, `enable_python_dispatcher`, lazy graph modules,
and what AOTAutograd has for hooks on saved tensors and for the metadata of nodes; tested with 2.13.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.fx.traceback
from functorch.compile import aot_function
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing
from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.grad_mode import set_multithreading_enabled
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from autopar.ir.joint_graph import JointGraph, Result
from autopar.passes.verify import propagate_shapes, verify

# Tracing uses process-wide state; simulated ranks are threads.
_TRACING = threading.Lock()

_CLONE = torch.ops.aten.clone.default


def trace_joint(
    gm: fx.GraphModule, arguments: Sequence[torch.Tensor], *, name_modules: bool = False
) -> JointGraph:
    """Trace a program that takes flat local tensors and returns a flat tuple.

    Results that are views of arguments, or of other results, are copied: a graph then returns
    tensors that own their memory, and needs no runtime that restores views.

    Args:
        arguments: tensors of the shapes, dtypes and grad flags that it will be called with; only
            their metadata is used, so they may be fake.
        name_modules: nodes of the joint graph name the module that they come from.
    """
    with _TRACING, FakeTensorMode():
        fakes = [_fake_like(t) for t in arguments]
        verify(propagate_shapes(gm, fakes))
        _copy_aliased_results(gm, fakes)
        (returned,) = gm.graph.output_node().args
        tangents = [_tangent(n.meta["val"] if isinstance(n, fx.Node) else n) for n in returned]  # type: ignore[union-attr]
        function = _with_modules(gm) if name_modules else gm
        graph = _traced(function, fakes, tangents)
    return JointGraph(graph, tuple(Result(t is not None, t) for t in tangents))


def _tangent(value: Any) -> torch.Tensor | None:
    """A tensor like the gradient of a result; None without one."""
    if not (torch.is_grad_enabled() and isinstance(value, torch.Tensor) and value.requires_grad):
        return None
    return torch.empty_like(value.detach())


def _traced(
    function: Callable[..., Any],
    arguments: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor | None],
) -> fx.GraphModule:
    """The joint graph, or the forward graph if no result carries a gradient.

    AOTAutograd takes twice as long: it runs a program once more, to find out what it writes, and
    replaces that. Ours write nothing, and few of torch's derivatives do; those it traces again.

    Args:
        tangents: gradients of the results; None for results without one.
    """
    kept = [t for t in tangents if t is not None]

    def joint(primals: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]) -> Any:
        results = function(*primals)
        for node in get_proxy_mode().tracer.graph.nodes:  # type: ignore[union-attr]
            node.meta["partitioner_tag"] = "is_forward"
        inputs = [p for p in primals if p.requires_grad]
        differentiated = [r for r in results if isinstance(r, torch.Tensor) and r.requires_grad]
        setup_stacktrace_preservation_hooks([r.grad_fn for r in differentiated if r.grad_fn])
        # a device's thread has not the modes of this one
        with set_multithreading_enabled(False), torch.fx.traceback.preserve_node_meta():
            given = torch.autograd.grad(differentiated, inputs, tangents, allow_unused=True)
        gradients = iter(_laid_out_as(p, g) for p, g in zip(inputs, given, strict=True))
        return *results, *(next(gradients) if p.requires_grad else None for p in primals)

    def forward(primals: Sequence[torch.Tensor]) -> Any:
        with torch.no_grad():
            return tuple(function(*primals))

    # hooks on saved tensors are for what runs
    with (
        enable_python_dispatcher(), _disable_saved_tensors_hooks_during_tracing(),
        _use_lazy_graph_module(True),
    ):  # fmt: skip
        gm = make_fx(joint)(list(arguments), kept) if kept else make_fx(forward)(list(arguments))
    if any(_writes(node) for node in gm.graph.nodes):
        return _functionalized(function, arguments)
    gm.graph.eliminate_dead_code()
    _name_modules_of_backward(gm.graph)
    return gm


def _laid_out_as(x: torch.Tensor, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient with the strides of its tensor, as autograd would hand it out: copied here, where
    schedules see it, and not after the step, when all gradients are alive."""
    if gradient is None or gradient.stride() == x.stride() or not x.is_contiguous():
        return gradient
    return gradient.clone(memory_format=torch.contiguous_format)


def _name_modules_of_backward(graph: fx.Graph) -> None:
    """Operators of the backward name the module whose forward they belong to, as AOTAutograd's do:
    autograd numbers operators, and their derivatives alike."""
    forward: dict[int, fx.Node] = {}
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        if number is None:
            continue
        if node.meta.get("partitioner_tag") == "is_forward":
            forward.setdefault(number, node)
        elif number in forward and not node.meta.get("is_gradient_acc"):
            node.meta["fwd_nn_module_stack"] = forward[number].meta.get("nn_module_stack")


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Traced(Exception):
    """Ends AOTAutograd, which would go on to split the graph and to run a part."""


def _functionalized(
    function: Callable[..., Any], arguments: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """The same graph, by AOTAutograd."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, *_: Any, **__: Any) -> Any:
        graphs.append(gm)
        raise _Traced

    with contextlib.suppress(_Traced):
        aot_function(function, fw_compiler=keep, partition_fn=keep)(*arguments)
    return graphs[0]


def _fake_like(t: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
    return fake.requires_grad_(t.requires_grad)


def _copy_aliased_results(gm: fx.GraphModule, arguments: Sequence[torch.Tensor]) -> None:
    """Clone the results that share memory with an argument or an earlier result.

    Args:
        arguments: the program was run on them: `meta["val"]` holds what every node gave.
    """
    output = gm.graph.output_node()
    (results,) = output.args
    used = {t.untyped_storage()._cdata for t in arguments}
    copied: list[Any] = []
    for node in results:  # type: ignore[union-attr]
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()._cdata
            if storage in used:
                with gm.graph.inserting_before(output):
                    meta = node.meta  # type: ignore[union-attr]
                    node = gm.graph.call_function(_CLONE, (node,))
                    node.meta = dict(meta)
            used.add(storage)
        copied.append(node)
    output.args = (tuple(copied),)
    gm.recompile()


def return_arguments(gm: fx.GraphModule) -> None:
    """Take back the copies of results that share memory with an argument: for a caller who writes
    to none of them."""
    output = gm.graph.output_node()
    results: Any = output.args[0]
    output.args = (
        tuple(r.args[0] if isinstance(r, fx.Node) and r.target is _CLONE else r for r in results),
    )
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _with_modules(gm: fx.GraphModule) -> Callable[..., Any]:
    """The program, run so that nodes traced from its nodes name their module as those do, and the
    node itself."""
    for node in gm.graph.nodes:
        if node.meta.get("autopar") is not None:
            path = node.meta["autopar"].module
            node.meta["nn_module_stack"] = {path: (path, node.name)}

    def run(*flat: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*flat)

    return run
