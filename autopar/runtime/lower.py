"""Lowering: a rank's sharded forward program becomes a compiled forward and backward.

AOTAutograd traces the joint graph, our partition function decides what is saved, and the passes
below run on the backward and forward graphs, which `autopar/runtime/program.py` makes one function.
Aliasing and mutation are AOTAutograd's job: where a program has them, its function is what runs.
`aot_function`, the boxed code generator, what runs generated code, and `_op` of an operator are
private to torch; tested with 2.11 and 2.13.
"""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.fx.traceback
from torch._functorch.aot_autograd import aot_function
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.cluster.cluster import ClusterInfo
from autopar.kernels import batch_norm
from autopar.kernels.linear import add_bias_within
from autopar.kernels.substitute import substitute_kernels
from autopar.passes.async_sums import positions_of_late
from autopar.passes.bucket import bucket_collectives
from autopar.passes.inductor import Compiled
from autopar.passes.overlap import overlap_collectives
from autopar.passes.overwrite import overwrite
from autopar.passes.partition import partition, partition_within
from autopar.passes.runner import Pass, run_passes
from autopar.passes.verify import propagate_shapes, verify
from autopar.runtime.distribute import shards
from autopar.runtime.program import Boxed, OtherKind, differentiable
from autopar.schedule.program import Program, Schedule

log = logging.getLogger(__name__)

# Tracing uses process-wide state; simulated ranks are threads.
_TRACING = threading.Lock()


@dataclass
class LoweredStep:
    """A compiled program: call it with the flat local tensors, or DTensors for parameters.

    Attributes:
        forward, backward: the final graphs (no backward where nothing requires grad).
        late: positions of the results whose sum over ranks is only started, in their memory.
    """

    function: Callable[..., Any]
    forward: fx.GraphModule | None = None
    backward: fx.GraphModule | None = None
    late: tuple[int, ...] = ()

    def __call__(self, *flat: torch.Tensor) -> Any:
        return self.function(*flat)


def lower(
    gm: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    *,
    reshard_after_forward: Sequence[int] = (),
    device_type: str = "cpu",
    choose: Callable[[Program], Schedule] | None = None,
    cluster: ClusterInfo | None = None,
    compile: bool = False,
    parameters: Mapping[int, str] | None = None,
    at_once: int | None = None,
    disable: frozenset[str] = frozenset(),
) -> LoweredStep:
    """Compile a sharded forward program.

    Args:
        gm: takes flat local tensors, returns a flat tuple. Changed in place for GPUs.
        arguments: tensors of the shapes, dtypes and grad flags that it will be called with; only
            their metadata is used, so they may be fake.
        reshard_after_forward: indices of arguments whose gathered copies are not kept for backward.
        device_type: decides which kernels are substituted.
        choose: what is kept and what is computed again (`autopar.memory`); as eager autograd does
            if None.
        cluster: what the choice predicts times for, and whether collectives run beside compute; one
            CPU if None.
        compile: run the graphs by Inductor.
        parameters: names of arguments that the choice may have on the host for a part of the step,
            by their indices; none if None.
        at_once: so many of the results, the first, are to be there when the program returns; of
            the others the caller waits for those that it leaves `late`. All if None.
        disable: names of passes to leave out.
    """
    step = LoweredStep(lambda *flat: None)
    compiled: list[Compiled] = []
    runs: list[Boxed] = []  # forward, backward
    kernels: Pass = functools.partial(substitute_kernels, device_type=device_type)
    cluster = cluster or ClusterInfo.of("1")
    if device_type == "cuda" and torch.cuda.is_available():  # its workspace is cuDNN's to tell
        gm = batch_norm.use_library(gm)
    overlaps = cluster.device.runs_beside
    last: list[Pass] = [] if compile else [add_bias_within, overwrite]  # Inductor does both itself
    if choose is None:
        split = functools.partial(
            partition,
            reshard_after_forward=frozenset(reshard_after_forward),
            at_once=at_once,
            disable=disable,
        )
        ahead: list[Pass] = [overlap_collectives] if overlaps else []
        forward_passes: list[Pass] = [kernels, bucket_collectives, *ahead, *last]
        backward_passes = forward_passes
    else:
        split = functools.partial(
            partition_within, choose=choose, cluster=cluster,
            device_type=device_type, parameters=parameters or {}, at_once=at_once,
            disable=disable,
        )  # fmt: skip
        forward_passes = backward_passes = last

    def compile_forward(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        step.forward = run_passes(gm, forward_passes, disable=disable)
        step.late = tuple(positions_of_late(step.forward))
        return finish(step.forward, backward=False)

    def compile_backward(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        step.backward = run_passes(gm, backward_passes, disable=disable)
        return finish(step.backward, backward=True)

    def finish(gm: fx.GraphModule, *, backward: bool) -> Callable[..., Any]:
        run = boxed(gm)
        if compile:
            compiled.append(Compiled(gm, run, backward=backward))
            run = compiled[-1]
        runs.append(run)
        return run

    function = aot_function(
        gm if choose is None else _with_modules(gm),
        fw_compiler=compile_forward,
        bw_compiler=compile_backward,
        partition_fn=split,
    )
    with _TRACING, FakeTensorMode():
        verify(propagate_shapes(gm, [_like(t) for t in arguments]))
        # on fake tensors a call traces and compiles but computes shapes only; the backward's
        # compilation may be put off to its first call, so that follows at once
        given = [_like(t) for t in arguments]
        results = function(*given)
        roots = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
        if roots:
            torch.autograd.backward(roots, [torch.empty_like(t) for t in roots])
    for graph in compiled:
        graph.compile()
    step.function = lambda *flat: function(*shards(flat))
    if step.forward is not None and step.backward is not None:
        try:
            step.function = differentiable(
                step.forward, step.backward, *runs, arguments=given, results=results
            )
        except OtherKind as why:
            log.info("run by AOTAutograd: %s", why)
    return step


def _with_modules(gm: fx.GraphModule) -> Callable[..., Any]:
    """The program, run so that nodes traced from its nodes name their module as those do."""
    for node in gm.graph.nodes:
        if "autopar" in node.meta:
            path = node.meta["autopar"].module
            node.meta["nn_module_stack"] = {path: (path, "")}

    def run(*flat: Any) -> Any:
        with torch.fx.traceback.preserve_node_meta():
            return fx.Interpreter(gm).run(*flat)

    return run


def _like(t: torch.Tensor) -> torch.Tensor:
    fake = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=t.device)
    return fake.requires_grad_(t.requires_grad)


def boxed(gm: fx.GraphModule) -> Callable[..., Any]:
    """Call by a list that the program empties, so that saved values die at their last use."""
    if hasattr(fx.graph, "_BoxedCodeGen"):
        gm.graph.set_codegen(fx.graph._BoxedCodeGen())
        gm.recompile()
        call = functools.partial(_with_operators(gm), gm)
    else:  # slower, node by node
        call = functools.partial(fx.Interpreter(gm).boxed_run)
    call._boxed_call = True  # type: ignore[attr-defined]
    return call


def _with_operators(gm: fx.GraphModule) -> Callable[..., Any]:
    """A graph's code with its operators at hand, which it would look up by name at every call: 1%
    of a step of small operators."""
    code = gm.graph.python_code("self")
    names = dict(code.globals)

    def at_hand(call: re.Match[str]) -> str:
        namespace, operator, overload = call.groups()
        name = f"{namespace}__{operator}__{overload}"
        names[name] = getattr(getattr(getattr(torch.ops, namespace), operator), overload)._op
        return f"{name}("

    source = re.sub(r"\btorch\.ops\.(\w+)\.(\w+)\.(\w+)\(", at_hand, code.src)
    fx.graph_module._exec_with_source(source, names)
    forward: Callable[..., Any] = names["forward"]
    return forward
