"""The package is layered: a folder imports only what stands below it, and no files in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

import autopar

ROOT = Path(autopar.__file__).parent

# From the ground up. A module at the top of the package is a layer of its own.
LAYERS = (
    "errors", "units", "files", "gc_utils", "progress", "versions", "ir", "cluster", "operators",
    "tracer", "solver", "plan_records", "plan", "comm", "profiler", "sharding", "optim",
    "schedule", "kernels", "passes",
    "planner",
    "compiled_step", "compiled_stages",
    "compile", "runtime", "quantization", "integrations", "testing", "report", "cli",
)  # fmt: skip


def _name(path: Path) -> str:
    parts = ("autopar", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = {_name(path): path for path in ROOT.rglob("*.py")}


def _imports(source: str) -> Iterator[str]:
    """The files of the package that a source imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(source)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name of what is imported"
            for imported in (a.name for a in node.names):
                own = f"{node.module}.{imported}"
                # what `autopar` exports is defined elsewhere
                value = getattr(autopar, imported, None) if node.module == "autopar" else None
                names.append(own if own in FILES else getattr(value, "__module__", node.module))
        yield from (name for name in names if name in FILES)


def _rank(file: str) -> int:
    return LAYERS.index(file.split(".")[1])


def test_imports_are_found():
    source = "from autopar import auto_engine, cli, __version__\nimport autopar.plan, torch"
    found = ["autopar.runtime.auto_engine", "autopar.cli", "autopar", "autopar.plan"]
    assert list(_imports(source)) == found
    with pytest.raises(AssertionError, match="whole name"):
        list(_imports("from ..cli import app"))


def test_imports_point_down_and_not_in_circles():
    graph = nx.DiGraph()
    for file, path in FILES.items():
        graph.add_edges_from((file, other) for other in _imports(path.read_text()))
    inner = [
        edge for edge in graph.edges if "autopar" not in edge and "autopar.__main__" not in edge
    ]
    upward = [f"{file} imports {other}" for file, other in inner if _rank(file) < _rank(other)]
    assert not upward, "\n".join(upward)
    circles = [files for files in nx.strongly_connected_components(graph) if len(files) > 1]
    assert not circles, circles
