"""Random pipelines against one device: 200 draws of a model, a mesh, cuts, a schedule, a number of
microbatches, layouts and an optimizer.

The ranks are threads of one process, which compute in float64. A draw is exact if losses, gradients
and parameters after two steps differ by less than 1e-9. `--first` and `--count` choose other ones.
"""

from __future__ import annotations

import sys
import time

from benchmarks import common
from benchmarks.common import Row, console
from tests.random_pipelines import Draw, largest_error

EXACT = 1e-9


def main() -> int:
    options = common.parser(__doc__ or "")
    options.add_argument("--first", type=int, default=0, metavar="SEED")
    options.add_argument("--count", type=int, default=200)
    given = options.parse_args()
    count = 10 if given.quick else given.count
    rows: list[Row] = []
    for seed in range(given.first, given.first + count):
        draw, start = Draw.of(seed, small=given.quick), time.perf_counter()
        try:
            error = largest_error(draw)
        except Exception as problem:
            console.print(f"{draw}: {type(problem).__name__}: {problem}", markup=False)
            error = float("inf")
        rows.append(Row(str(draw), "largest error", error, "", EXACT))
        console.print(f"{draw}: {error:.1e}, {time.perf_counter() - start:.1f} s", markup=False)
    exact = sum(bool(row.ok) for row in rows)
    headline = f"{exact} of {count} random pipelines equal a single device"
    return common.finish("Random pipelines", rows, headline, given.json)


if __name__ == "__main__":
    sys.exit(main())
