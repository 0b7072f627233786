"""Training libraries on autopar's engines: what each does, against one process.

Each library trains a small GPT-2 in float64 by its own loop: alone, and on 2 and 4 processes (mesh
2x2) on slow devices and fast links, so that even a small model is split. Per action, the largest
difference of its results (parameters, losses, norms, logits, tokens) on any rank from those of one
process. In bf16 these are losses.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import Row, console
from tests.integrations.compare import differences, tolerance
from tests.integrations.run import MODULES

MESHES = ("2", "2x2")


def rows_of(tool: str, mesh: str) -> list[Row]:
    """A row per action; one that fails if the library does not get through."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            gaps = differences(tool, mesh, Path(folder))
        except RuntimeError as error:
            console.print(str(error), markup=False)
            return [Row(f"{tool}, {mesh}", "ends", float("inf"), "", 0.0)]
    case = f"{tool}, {mesh}"
    return [Row(case, action, gap, "", tolerance(tool, action)) for action, gap in gaps.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; the exit code is 1 if results differ."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--only", default="", metavar="TOOL", help=f"one of {', '.join(MODULES)}")
    options = parser.parse_args(arguments)
    console.print(common.machine(), markup=False)
    tools = [tool for tool in MODULES if options.only in tool]
    if not tools:
        parser.error(f"no library has {options.only!r} in its name; there are {', '.join(MODULES)}")
    meshes = MESHES[:1] if options.quick else MESHES
    rows: list[Row] = []
    for tool in tools[:1] if options.quick else tools:
        for mesh in meshes:
            rows += rows_of(tool, mesh)
            console.print(f"{tool}, {mesh}: done", markup=False)
    wrong = sum(row.ok is False for row in rows)
    headline = f"{len(rows)} actions, {wrong} of them other than on one process"
    return common.finish("Integrations", rows, headline, options.json)


if __name__ == "__main__":
    sys.exit(main())
