"""Python of a step beyond its operators: a tiny model, whose time is that of the host.

A step is forward and backward, gradients made anew. Its operators are the two lowered graphs; their
time is taken within the step, where caches are as they are there, and of the graphs alone, called
in a loop with plain tensors. Rounds of each in turn; the figure is the fastest round's, as anything
else the machine does only adds. The target is of the step without its operators: autopar's Python,
and autograd, which eager PyTorch needs as well. With --compile, of Inductor's graphs too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autopar import auto_engine
from benchmarks import common
from benchmarks.common import Row, console

_TARGET_US = 150.0
_CASE = "tanh between two linear layers of 8, batch 4"


def tiny() -> nn.Module:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def trained(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """A step of the model."""
    parameters = list(model.parameters())

    def step() -> None:
        for p in parameters:
            p.grad = None
        model(x).sum().backward()

    return step


class Timed:
    """A graph that notes its seconds."""

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self.run, self.seconds = run, 0.0

    def __call__(self, arguments: list[Any]) -> Any:
        begin = time.perf_counter()
        results = self.run(arguments)
        self.seconds += time.perf_counter() - begin
        return results


def python_us(engine: Any, x: torch.Tensor, rounds: int, repeats: int) -> float:
    """Microseconds of a step beyond its graphs, in the fastest round."""
    step, (bound,) = trained(engine, x), engine.steps
    program = bound.train
    graphs = Timed(program.forward), Timed(program.backward)
    timed = replace(program, forward=graphs[0], backward=graphs[1])
    (programs,) = engine._autopar_runner._choice._programs.values()
    programs[:] = [replace(bound, train=timed)]
    best = float("inf")
    for _ in range(rounds):
        graphs[0].seconds = graphs[1].seconds = 0.0
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        seconds = time.perf_counter() - begin - graphs[0].seconds - graphs[1].seconds
        best = min(best, 1e6 * seconds / repeats)
    programs[:] = [bound]
    return best


def operators(engine: Any, x: torch.Tensor) -> Callable[[], None]:
    """The operators of an engine's step alone."""
    program = engine.steps[0].train
    results = len(program.step.results)
    shards = [p.to_local().detach() for p in engine.parameters()]
    tangent = torch.ones(4, 8)

    @torch.no_grad()
    def step() -> None:
        values = program.forward([*shards, x])
        program.backward([*values[results:], tangent])

    return step


def fastest_us(steps: dict[str, Callable[[], None]], rounds: int, repeats: int) -> dict[str, float]:
    """Microseconds of each step in its fastest round."""
    times = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        for _ in range(repeats):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                step()
            times[name] = min(times[name], 1e6 * (time.perf_counter() - begin) / repeats)
    return times


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--compile", action="store_true", help="by Inductor, too")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    torch.set_num_threads(1)
    x = torch.randn(4, 8)
    steps = {"eager": trained(tiny(), x)}
    names = {"autopar": False} | ({"autopar, compiled": True} if options.compile else {})
    engines: dict[str, Any] = {}
    for name, compiled in names.items():
        engine, _ = auto_engine(tiny(), None, "1", example_inputs=(x,), compile=compiled)
        engines[name] = engine
        steps[name] = trained(engine, x)
        steps[f"{name}: operators alone"] = operators(engine, x)
    counts = (20, 50) if options.quick else (60, 100)
    times = fastest_us(steps, *counts)
    rows = [Row(_CASE, name, us, "us") for name, us in times.items()]
    for name, engine in engines.items():
        python = python_us(engine, x, *counts)
        rows.append(Row(_CASE, f"{name}: step without its operators", python, "us", _TARGET_US))
    headline = f"a step takes {rows[-1].value:.0f} us of Python"
    return common.finish("Step overhead", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
