"""Every optimizer on every mesh against a single device: five steps in float64.

    python -m benchmarks.optimizer_matrix [--quick] [--json FILE]

Parameters and state after five steps with a schedule, a parameter without a gradient, and even or
uneven shards. A row is the largest difference, relative to max(1, |single device|), over ranks.
"""

from __future__ import annotations

import json
import warnings

import torch.distributed as dist

from benchmarks.common import Row, answer, finish, on_ranks, parser

MESHES = {"2": 2, "4": 4, "2x2": 4, "pipe=2,data=2": 4}
TARGET = 1e-12


def _rank(mesh: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    from tests.dist.optimizer_tasks import errors_of

    dist.init_process_group("gloo")
    found = {even: errors_of(names, mesh, even) for even in (True, False)}
    everyone: list[dict] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        answer(
            {
                name: {
                    ("even" if even else "uneven"): [
                        max(rank[even][name][0] for rank in everyone),
                        max(found[even][name][1], default=0),
                    ]
                    for even in (True, False)
                }
                for name in names
            }
        )
    dist.destroy_process_group()


def main() -> int:
    options = parser(__doc__ or "")
    options.add_argument("--rank", nargs=2, help="a rank of the benchmark (internal)")
    args = options.parse_args()
    if args.rank:
        _rank(args.rank[0], json.loads(args.rank[1]))
        return 0
    from tests.dist.optimizer_tasks import makes

    names = list(makes())
    meshes = {"2": 2} if args.quick else MESHES
    rows = []
    for mesh, ranks in meshes.items():
        chosen = names[::4] if args.quick else names
        found = on_ranks("benchmarks.optimizer_matrix", ranks, mesh, json.dumps(chosen))
        for name, errors in found.items():
            for shards, (error, collectives) in errors.items():
                case = f"{name} on {mesh}"
                rows.append(Row(case, f"{shards}: difference", error, "", TARGET))
                rows.append(Row(case, f"{shards}: most collectives", collectives, ""))
    judged = [row for row in rows if row.target is not None]
    right = sum(bool(row.ok) for row in judged)
    return finish("Optimizers on shards", rows, f"{right} of {len(judged)} equal a single device",
                  args.json)  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
