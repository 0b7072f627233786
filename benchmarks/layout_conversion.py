"""What exact layout conversion saves, and how long its search takes.

For all pairs of layouts of tensors of 1 to 4 dims on a mesh of two axes, and for a seeded sample of
pairs on three axes: the time of three conversions, forward and backward, in the cost model of
A100-80G. The three are the exact path, the greedy search of Colossal-Auto, and DTensor's conversion
mesh axis by mesh axis. The pairs include partial and varying layouts. They exclude a layout with
itself, and pairs that lead out of a varying layout, since no step does.

Search times are medians over pairs: cold, in a new converter that knows no graph; with the graph of
that number of dims built; and warm, the same query again.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from autopar import ClusterInfo
from autopar.ir.spec import ShardingSpec
from autopar.sharding.conversion.converter import LayoutConverter, Step
from autopar.sharding.conversion.graph import spec_graph
from benchmarks import common
from benchmarks.common import Row, console
from benchmarks.conversion_baselines import axis_by_axis, greedy

DEVICE = "A100-80G"
ITEMSIZE = 4
SHAPES = ((4096,), (4096, 4096), (16, 128, 768), (16, 12, 128, 64))
SAMPLE = 5000
QUERIES = 300
COLD_US, WARM_US = 5000.0, 50.0

Pair = tuple[ShardingSpec, ShardingSpec]


@dataclass(frozen=True)
class Case:
    """Tensors of one shape on one mesh."""

    mesh: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} on {self.mesh}"

    def converter(self) -> LayoutConverter:
        return LayoutConverter(ClusterInfo.of(self.mesh, DEVICE))

    def pairs(self, converter: LayoutConverter, count: int) -> tuple[list[Pair], int]:
        """At most `count` pairs that differ and have a path, and how many there are."""
        specs = converter.specs(self.shape)
        pairs = [
            (a, b) for a in specs for b in specs if a != b and set(a.varying) <= set(b.varying)
        ]
        chosen = random.Random(0).sample(pairs, count) if count < len(pairs) else pairs
        return chosen, len(pairs)


@dataclass(frozen=True)
class Costs:
    """Microseconds of the conversions of the same pairs."""

    exact: list[float]
    others: dict[str, list[float]]


def costs_of(case: Case, converter: LayoutConverter, pairs: Sequence[Pair]) -> Costs:
    """Price every pair's three paths."""

    def price(path: Sequence[Step]) -> float:
        return sum(sum(converter.step_us(case.shape, ITEMSIZE, step)) for step in path)

    ways: dict[str, Callable[..., list[Step]]] = {
        "greedy": greedy,
        "axis by axis": axis_by_axis,
    }
    return Costs(
        [float(converter.costs_us(case.shape, ITEMSIZE, (a,), (b,))[0, 0]) for a, b in pairs],
        {
            name: [price(way(converter, case.shape, a, b)) for a, b in pairs]
            for name, way in ways.items()
        },
    )


def saving_rows(case: str, costs: Costs, of: int) -> Iterator[Row]:
    """The cost of each other conversion relative to the exact one's."""
    yield Row(case, "pairs of layouts", len(costs.exact), f"of {of}")
    for name, times in costs.others.items():
        ratios = [t / e for t, e in zip(times, costs.exact, strict=True)]
        cheaper = sum(r > 1 + 1e-9 for r in ratios) / len(ratios)
        below = sum(r < 1 - 1e-9 for r in ratios)
        yield Row(case, f"{name} / exact, mean", statistics.fmean(ratios), "x")
        yield Row(case, f"{name} / exact, median", statistics.median(ratios), "x")
        yield Row(case, f"{name} / exact, largest", max(ratios), "x")
        yield Row(case, f"exact is cheaper than {name}", 100 * cheaper, "% of pairs")
        yield Row(case, f"exact is costlier than {name}", below, "pairs", 0)
        yield Row(case, f"saved of all time of {name}", _saved(costs, name), "%")


def _saved(costs: Costs, name: str) -> float:
    return 100 * (1 - sum(costs.exact) / sum(costs.others[name]))


def search_rows(case: Case, pairs: Sequence[Pair]) -> Iterator[Row]:
    """Medians of the time of one path search."""

    def timed(a: ShardingSpec, b: ShardingSpec, converter: LayoutConverter | None = None) -> float:
        start = time.perf_counter()
        (converter or case.converter()).path(case.shape, ITEMSIZE, a, b)
        return 1e6 * (time.perf_counter() - start)

    cold, built, warm = [], [], []
    for a, b in pairs:
        spec_graph.cache_clear()
        cold.append(timed(a, b))
        built.append(timed(a, b))
        converter = case.converter()
        converter.path(case.shape, ITEMSIZE, a, b)
        warm.append(timed(a, b, converter))
    three = case.mesh.count("x") >= 2
    yield Row(
        case.name, "path search, cold", statistics.median(cold), "us", COLD_US if three else None
    )
    yield Row(case.name, "path search, graph built", statistics.median(built), "us")
    yield Row(case.name, "path search, warm", statistics.median(warm), "us", WARM_US)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and measure; returns the exit code."""
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--pairs", type=int, default=None, help=f"at most so many of a shape; {SAMPLE} if not given"
    )
    options = parser.parse_args(arguments)
    count = options.pairs or (200 if options.quick else SAMPLE)
    queries = 20 if options.quick else QUERIES
    meshes = ("2x4", "2x2x2") if options.quick else ("2x4", "2x2x2", "4x8x8")
    console.print(common.machine(), markup=False)
    rows: list[Row] = []
    total = Costs([], {})
    for case in (Case(mesh, shape) for mesh in meshes for shape in SHAPES):
        converter = case.converter()
        pairs, of = case.pairs(converter, count)
        costs = costs_of(case, converter, pairs)
        total.exact.extend(costs.exact)
        for name, times in costs.others.items():
            total.others.setdefault(name, []).extend(times)
        rows += saving_rows(case.name, costs, of)
        rows += search_rows(case, random.Random(1).sample(pairs, min(queries, len(pairs))))
        console.print(f"{case.name}: {len(pairs)} of {of} pairs", markup=False)
    rows += saving_rows("all", total, len(total.exact))
    searches = {
        kind: max(r.value for r in rows if r.metric == f"path search, {kind}")
        for kind in ("cold", "warm")
    }
    saved = ", ".join(f"{_saved(total, name):.1f}% of {name}" for name in total.others)
    headline = (
        f"the exact path saves {saved}; search (slowest median): {searches['cold'] / 1e3:.1f} ms "
        f"cold, {searches['warm']:.1f} us warm (targets {COLD_US / 1e3:g} ms, {WARM_US:g} us)"
    )
    return common.finish("Layout conversion", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
