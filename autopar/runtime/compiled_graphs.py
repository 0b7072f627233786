"""The graphs of a step, built by Inductor: told, agreed on by all ranks, and compared with ATen's
where that was asked for."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from autopar.comm.ranks import Ranks
from autopar.errors import EngineError
from autopar.passes.compile_mode import CompileMode
from autopar.passes.inductor import CompiledGraph, compile_graph, missing_tool
from autopar.progress import SILENT, Progress

log = logging.getLogger(__name__)

Boxed = Callable[[list[Any]], Sequence[Any]]

# Of integers and booleans, such as masks, the share that a rounding may have turned.
_TURNED = 1e-3
# What runs twice for a comparison, unless it is declared to write: it changes nothing but the state
# of random numbers.
_REPEATABLE = ("aten", "prims", "autopar", "_c10d_functional")


def usable(mode: CompileMode, device_type: str, ranks: Ranks) -> CompileMode:
    """The mode, if all ranks have what Inductor needs; without it, one that was to be verified runs
    ATen's operators.

    Raises:
        EngineError: on all ranks, naming what is missing and where.
    """
    if not mode:
        return mode
    missing = {r: m for r, m in enumerate(ranks.of_all(missing_tool(device_type))) if m is not None}
    if not missing:
        return mode
    rank, tool = next(iter(missing.items()))
    where = f"ranks {list(missing)} have" if len(missing) > 1 else f"rank {rank} has"
    why = f"Inductor needs what {where} not: {tool}"
    if not mode.verified:
        raise EngineError(f"{why}; or leave compile= out")
    log.warning("steps run uncompiled. %s", why)
    return CompileMode()


class NotBuiltError(EngineError):
    """Inductor cannot build a step that may run uncompiled as well; on all ranks."""


def compiled_graphs(
    graphs: Mapping[str, fx.GraphModule],
    mode: CompileMode,
    plain: Callable[[fx.GraphModule], Boxed],
    ranks: Ranks | None = None,
    progress: Progress = SILENT,
) -> dict[str, Boxed]:
    """Build the graphs of a step.

    Args:
        graphs: by name: "forward", "backward", "weights".
        plain: runs a graph as ATen's operators.
        ranks: that run the same step; each by itself if None.

    Raises:
        VerifyError: what was built is not what was planned.
        EngineError: another rank cannot build its graphs.
        NotBuiltError: a rank cannot, and the mode is verified.
    """
    ranks = ranks or Ranks()
    names = " and ".join(graphs)

    def build() -> dict[str, CompiledGraph]:
        return {name: compile_graph(gm, backward=name != "forward") for name, gm in graphs.items()}

    with progress.stage("compile by Inductor") as running:
        try:
            built = ranks.together(build)
        except Exception as error:
            if not mode.verified:
                raise
            raise NotBuiltError(f"Inductor cannot build {names}: {_named(error)}") from error
        cached = all(b.from_cache for b in built.values())
        running.done = f"compiled {names} by Inductor" + (", from its cache" if cached else "")
    if not mode.verified:
        return {name: b.run for name, b in built.items()}
    return {
        name: _Verified(name, b.run, graphs[name], plain(graphs[name]), ranks)
        for name, b in built.items()
    }


def _named(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class _Verified:
    """A graph that Inductor has built. Its first call runs ATen's operators too, and compares.

    ATen's results are on the host meanwhile; the arguments stay until both have run.

    Args:
        name: of the graph.
        built, plain: what runs it.
        ranks: that run the same step: they choose alike.
    """

    def __init__(
        self, name: str, built: Boxed, gm: fx.GraphModule, plain: Boxed, ranks: Ranks
    ) -> None:
        self._name, self._built, self._plain, self._ranks = name, built, plain, ranks
        self._once = _not_repeatable(gm)
        self._run: Boxed | None = None

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        if self._run is None:
            return self._first(arguments)
        return self._run(arguments)

    def _first(self, arguments: list[Any]) -> Sequence[Any]:
        if self._once is not None:
            log.warning(
                "the %s runs uncompiled: %s cannot run twice for a comparison; compile=True "
                "compiles without one", self._name, self._once,
            )  # fmt: skip
            self._run = self._plain
            return self._run(arguments)
        kept = [*arguments]
        arguments.clear()
        state = _random_state(kept)
        expected = [_on_host(x) for x in self._plain([*kept])]
        _set_random_state(state)
        results: Sequence[Any] = ()
        try:
            results = self._built([*kept])
            failure = difference(results, expected)
        except Exception as error:
            failure = _named(error)
        failures = self._ranks.of_all(failure)
        rank = next((r for r, f in enumerate(failures) if f is not None), None)
        if rank is None:
            self._run = self._built
            return results
        log.warning(
            "the %s runs uncompiled: on rank %d, Inductor's differs from ATen's: %s", self._name,
            rank, failures[rank],
        )  # fmt: skip
        del results
        self._run = self._plain
        _set_random_state(state)
        return self._run(kept)


def _not_repeatable(gm: fx.GraphModule) -> str | None:
    """An operator of a graph that changes what it gets; None if there is none."""
    for node in gm.graph.nodes:
        target = node.target
        if node.op != "call_function" or target is operator.getitem:
            continue
        if (
            not isinstance(target, torch._ops.OpOverload)
            or target.namespace not in _REPEATABLE
            or target._schema.is_mutable
        ):
            return str(target)
    return None


def _random_state(arguments: Sequence[Any]) -> list[tuple[torch.device | None, torch.Tensor]]:
    """Of the CPU's generator, and of those of the GPUs that the arguments are on."""
    gpus = {x.device for x in arguments if isinstance(x, torch.Tensor) and x.is_cuda}
    states = [(device, torch.cuda.get_rng_state(device)) for device in gpus]
    return [(None, torch.get_rng_state()), *states]


def _set_random_state(states: Sequence[tuple[torch.device | None, torch.Tensor]]) -> None:
    for device, state in states:
        if device is None:
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _on_host(x: Any) -> Any:
    return x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x


def difference(found: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """What of the results is not equal within the dtype's rounding; None if nothing.

    Half of the dtype's digits agree, in the 2-norm of each result; so that a gradient that is zero
    but for rounding may differ, a rounding of the largest norm of all is allowed too.

    Args:
        found: on any device.
        expected: on the host.
    """
    if len(found) != len(expected):
        return f"{len(found)} results, not {len(expected)}"
    norms = [_norm(torch.nan_to_num(b, 0, 0, 0)) if _rounds(b) else 0.0 for b in expected]
    largest = max(norms, default=0.0)
    for k, (x, b, norm) in enumerate(zip(found, expected, norms, strict=True)):
        if not isinstance(b, torch.Tensor):
            if x != b:
                return f"result {k} is {x}, not {b}"
            continue
        a = x.detach().to("cpu")
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"result {k} is {a.dtype}{list(a.shape)}, not {b.dtype}{list(b.shape)}"
        if not _rounds(b):
            turned = int((a != b).sum())
            if turned > _TURNED * b.numel():
                return f"result {k}: {turned} of {b.numel()} elements differ"
            continue
        eps = torch.finfo(b.dtype).eps
        allowed = math.sqrt(eps) * norm + 16 * eps * largest
        equal = (a == b) | ((a != a) & (b != b))
        apart = _norm(torch.where(equal, 0, a - b))
        if not apart <= allowed:
            return f"result {k} of {b.dtype} is off by {apart:.2g}, at a norm of {norm:.2g}"
    return None


def _rounds(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x.to(torch.promote_types(x.dtype, torch.float64))))
