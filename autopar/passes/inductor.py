"""Inductor for a forward or backward graph: each is compiled by itself, so that what one passes to
the other, and what the backward recomputes, stays as planned.

`compile_fx_inner`, its results and the table of decompositions are private to torch; tested with
2.11 and 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autopar.passes.verify import VerifyError

# Of autopar's operators, those that start to move data to or from the host. What ends that is
# declared to write.
_TRANSFERS = ("offload", "reload", "fetch", "store")
_CALL = re.compile(r"torch\.ops\.(?:_c10d_functional|autopar)\.(\w+)\.\w+\((.*)\)")
_TEXT = re.compile(r"'([^']*)'")


def missing_tool(device_type: str) -> str | None:
    """What Inductor needs and does not find on this machine, with the remedy; None if nothing."""
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device_type == "cuda":
        return None if has_triton() else "Triton; install it (pip install triton)"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        named = [c for c in _as_tuple(config.cpp.cxx) if c]
        return (
            f"a C++ compiler (tried: {', '.join(named)}); install g++, or name one by the "
            "environment variable CXX"
        )
    return None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


@dataclass(frozen=True)
class CompiledGraph:
    """A graph that Inductor has built.

    Args:
        run: called by a list that it empties.
        from_cache: it was read from Inductor's cache on disk.
    """

    run: Callable[[list[Any]], Any]
    from_cache: bool


def compile_graph(gm: fx.GraphModule, *, backward: bool) -> CompiledGraph:
    """Generate and build the code of a graph.

    Args:
        gm: with `meta["val"]` on its placeholders.
        backward: which of the two graphs it is.

    Raises:
        VerifyError: what was built is not what was planned.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    # Inductor caches nothing without an environment for symbols; all sizes are constants.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        arguments = [_fake_like(n.meta["val"]) for n in gm.graph.find_nodes(op="placeholder")]
        graph = _decomposed(gm, arguments)
    output = graph.graph.output_node()
    results = [n.meta.get("val") if isinstance(n, fx.Node) else n for n in output.args[0]]  # type: ignore[union-attr]
    # The backward is built for the strides that its graph has, so nothing may choose others.
    tensors = [i for i, t in enumerate(results) if isinstance(t, torch.Tensor)]
    output.meta["user_visible_output_idxs"] = tensors
    output.meta["original_output_strides"] = [
        t.stride() if isinstance(t, torch.Tensor) else None for t in results
    ]
    planned = [_described(t) for t in results]
    calls = ordered_calls(gm)
    tracing = torch._guards.tracing(torch._guards.TracingContext(mode))
    options = {
        "fallback_random": True,  # random operators draw what they draw without Inductor
        "layout_optimization": False,
        # the order is planned: for memory, and for collectives, equally on ranks of other sizes
        "reorder_for_peak_memory": False,
        "reorder_for_locality": False,
    }
    hits = counters["inductor"]["fxgraph_cache_hit"]
    with tracing, config.patch(options):
        built = compile_fx_inner(graph, arguments, is_backward=backward)
    check_order(calls, _calls_in_source(getattr(built, "source_code", None) or "", calls))
    from_cache = counters["inductor"]["fxgraph_cache_hit"] > hits
    return CompiledGraph(_Checked(built, planned), from_cache)


def ordered_calls(gm: fx.GraphModule) -> list[tuple[str, ...]]:
    """Names and text arguments (groups, reductions) of collectives and transfers, in order."""
    return [
        (_functional(node.target._opname), *(a for a in node.args if isinstance(a, str)))
        for node in gm.graph.nodes
        if _is_ordered(node.target)
    ]


def _is_ordered(target: Any) -> bool:
    """Whether an operator has its planned place among others: collectives, and transfers to the
    host and back."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "autopar":
        return target._schema.is_mutable or target._opname in _TRANSFERS
    return target.namespace == "_c10d_functional"


def _calls_in_source(source: str, planned: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The same of code that Inductor has generated, of the operators that are planned."""
    names = {name for name, *_ in planned}
    lines = (line for line in source.splitlines() if not line.lstrip().startswith("#"))
    found = (match for line in lines if (match := _CALL.search(line)))
    calls = ((_functional(match[1]), *_TEXT.findall(match[2])) for match in found)
    return [call for call in calls if call[0] in names]


def _functional(name: str) -> str:
    """The name of an operator of which Inductor calls the form that writes in place."""
    return name.removesuffix("_out").removesuffix("_")


def check_order(planned: Sequence[Any], built: Sequence[Any]) -> None:
    """Compare the order of collectives and transfers.

    Raises:
        VerifyError: naming the first that differs.
    """
    if list(planned) == list(built):
        return
    pairs = zip([*planned, "none"], [*built, "none"], strict=False)
    k, (here, there) = next((k, (a, b)) for k, (a, b) in enumerate(pairs) if a != b)
    raise VerifyError(
        f"Inductor has changed the order of collectives and transfers: number {k} of "
        f"{len(planned)} is {here} in the plan and {there} of {len(built)} in its code. This is an "
        "error of autopar; leave compile= out"
    )


def _described(x: Any) -> Any:
    """Shape, dtype and strides of a result; None if it is no tensor."""
    if not isinstance(x, torch.Tensor):
        return None
    # strides of dims of one element mean nothing
    strides = tuple(s if n > 1 else None for n, s in zip(x.shape, x.stride(), strict=True))
    return tuple(x.shape), x.dtype, strides if x.numel() else None


class _Checked:
    """Compares what a built graph gives with the plan, at the first call: results, and what the
    backward receives.

    Args:
        planned: per result.
    """

    def __init__(self, run: Callable[[list[Any]], Any], planned: Sequence[Any]) -> None:
        self._run = run
        self._planned: Sequence[Any] | None = planned

    def __call__(self, arguments: list[Any]) -> Any:
        results = self._run(arguments)
        if self._planned is not None:
            check_results(self._planned, [_described(x) for x in results])
            self._planned = None
        return results


def check_results(planned: Sequence[Any], given: Sequence[Any]) -> None:
    """Compare shapes, dtypes and strides.

    Raises:
        VerifyError: naming the first that differs.
    """
    if len(planned) != len(given):
        raise VerifyError(
            f"Inductor's code gives {len(given)} values, the plan {len(planned)}. This is an error "
            "of autopar; leave compile= out"
        )
    for k, (here, there) in enumerate(zip(planned, given, strict=True)):
        if here != there:
            raise VerifyError(
                f"Inductor's code gives (shape, dtype, strides) {there} as value {k} of "
                f"{len(given)}, the plan {here}. This is an error of autopar; leave compile= out"
            )


def _fake_like(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _decomposed(gm: fx.GraphModule, arguments: list[Any]) -> fx.GraphModule:
    """In the operators that Inductor knows. Tracing merges nothing: what runs twice stays twice."""
    from torch._inductor.decomposition import select_decomp_table

    def run(*flat: Any) -> Any:
        return fx.Interpreter(gm).run(*flat)

    return make_fx(run, decomposition_table=select_decomp_table())(*arguments)
