"""Python of a step beyond its operators: a tiny model, whose time is that of the host.

A step is forward and backward, gradients made anew. Its operators alone are the two lowered graphs,
called with plain tensors. Rounds of each in turn; the figure is the fastest round's, as anything
else the machine does only adds. The target is of autopar's Python: the step without its operators.
With --compile, Inductor's graphs too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
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
    for name, compiled in names.items():
        engine, _ = auto_engine(tiny(), None, "1", example_inputs=(x,), compile=compiled)
        steps[name] = trained(engine, x)
        steps[f"{name}: operators alone"] = operators(engine, x)
    times = fastest_us(steps, *((20, 50) if options.quick else (60, 100)))
    rows = [Row(_CASE, name, us, "us") for name, us in times.items()]
    for name in names:
        python = times[name] - times[f"{name}: operators alone"]
        rows.append(Row(_CASE, f"{name}: Python of a step", python, "us", _TARGET_US))
    headline = f"a step takes {rows[-1].value:.0f} us of Python"
    return common.finish("Step overhead", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
