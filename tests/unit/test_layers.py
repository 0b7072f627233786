"""The package is layered: a folder imports only what stands below it."""

import ast
from pathlib import Path

import autopar

ROOT = Path(autopar.__file__).parent

# From the ground up. A module at the top of the package is a layer of its own.
LAYERS = (
    "errors", "units", "files", "gc_utils", "ir", "cluster", "tracer", "solver",
    "plan", "comm", "profiler", "sharding", "schedule", "kernels", "passes", "planner",
    "compiled_step",
    "compile", "runtime", "testing", "report", "cli",
)  # fmt: skip


def _imports(path: Path) -> set[str]:
    """The layers that a module imports, at its top or inside of functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name.split(".")[1] for name in names if name.startswith("autopar.")}


def test_imports_point_down():
    upward = []
    for path in ROOT.rglob("*.py"):
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if layer not in ("__init__", "__main__"):
            rank = LAYERS.index(layer)
            upward += [
                f"{path.relative_to(ROOT)} imports {name}"
                for name in sorted(_imports(path))
                if LAYERS.index(name) > rank
            ]
    assert not upward, "\n".join(upward)
