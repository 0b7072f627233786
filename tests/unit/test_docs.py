"""The documentation tells the truth: snippets run, commands parse, names and files exist.

Of the fenced blocks in the README and in docs:

    ```python           runs; later blocks of a file see the names of earlier ones
    ```python no-run    a fragment; must only be Python
    ```text output      what the block before it prints
    ```text error       lines are in messages of the package, word for word
    ```yaml             loads as a cluster
    ```console          lines `$ autopar ...` run in order, gpt2's and serve are only parsed;
                        lines `$ make ...` name targets that exist
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist
import typer
from typer.testing import CliRunner

from autopar import ClusterInfo, auto_engine
from autopar.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/options.md",
    "docs/architecture.md",
    "docs/capture.md",
    "docs/profile.md",
    "docs/cluster.md",
    "docs/conversion.md",
    "docs/rules.md",
    "docs/solver.md",
    "docs/control.md",
    "docs/tensor_parallelism.md",
    "docs/memory.md",
    "docs/pipelines.md",
    "docs/training_scripts.md",
    "docs/checkpoints.md",
    "docs/optimizers.md",
    "docs/precision.md",
    "docs/inference.md",
    "docs/kernels.md",
    "docs/integrations.md",
    "benchmarks/README.md",
)

_FENCE = re.compile(r"^```(\w*)[ ]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_PATH = re.compile(r"(?:autopar|benchmarks|docs|examples|tests|tools)/[\w./-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, its text and where it starts."""

    language: str
    tag: str
    text: str
    line: int


def page_text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(text: str) -> list[Block]:
    return [
        Block(m[1], m[2].strip(), m[3], text.count("\n", 0, m.start()) + 1)
        for m in _FENCE.finditer(text)
    ]


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def commands(text: str, program: str) -> list[list[str]]:
    """Arguments of every `$ program ...` in console blocks."""
    lines = [
        line.removeprefix("$ ")
        for block in blocks(text)
        if block.language == "console"
        for line in block.text.splitlines()
        if line.startswith("$ ")
    ]
    return [words[1:] for words in map(shlex.split, lines) if words[0] == program]


def run_python(text: str, page: str) -> int:
    """Run the page's Python blocks in one namespace; the number that ran.

    Raises:
        AssertionError: a block prints something else than the page says.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    printed: str | None = None
    count = 0
    for block in blocks(text):
        if (block.language, block.tag) == ("text", "output"):
            assert printed == block.text, f"{page}:{block.line} differs from what the code prints"
        elif block.language == "python" and block.tag == "no-run":
            ast.parse(f"({{{block.text}}})" if block.text.startswith('"') else block.text)
        elif block.language == "python":
            assert not block.tag, f"{page}:{block.line}: unknown tag {block.tag!r}"
            code = compile("\n" * block.line + block.text, page, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
            count += 1
    return count


@functools.cache
def known_messages() -> tuple[str, ...]:
    """Every text in the package; parts that vary are cut out."""
    return tuple(
        "\0".join(str(v.value) for v in node.values if isinstance(v, ast.Constant))
        if isinstance(node, ast.JoinedStr)
        else str(node.value)
        for path in (ROOT / "autopar").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.JoinedStr | ast.Constant)
    )


def unknown_errors(text: str) -> list[str]:
    """Lines of error blocks that no message of the package has; `...` stands for what varies."""
    lines = [
        line
        for block in blocks(text)
        if (block.language, block.tag) == ("text", "error")
        for line in block.text.splitlines()
    ]
    pieces = {line: [p.strip() for p in line.split("...")] for line in lines}
    return [
        line
        for line in lines
        if not any(all(piece in message for piece in pieces[line]) for message in known_messages())
    ]


def missing_files(text: str, folder: Path) -> list[str]:
    """Relative links and paths in code that lead nowhere, and `file::name`s that do not exist."""
    links = [target.partition("#")[0] for target in _LINK.findall(prose(text))]
    missing = [t for t in links if t and "://" not in t and not (folder / t).exists()]
    for code in _CODE.findall(prose(text)):
        path, _, name = code.partition("::")
        if not _PATH.fullmatch(path):
            continue
        if not (ROOT / path).exists() or (name and name not in _defined(ROOT / path)):
            missing.append(code)
    return missing


def _defined(file: Path) -> set[str]:
    return set(re.findall(r"^\s*(?:def|class) (\w+)", file.read_text(), re.MULTILINE))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", page_text("Makefile"), re.MULTILINE))


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, with the examples, and without a torchrun world around it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    running = dist.is_initialized()
    yield tmp_path
    if dist.is_initialized() and not running:
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, workplace: Path) -> None:
    count = run_python(page_text(page), page)
    without = (
        "docs/architecture.md",
        "docs/cluster.md",
        "docs/training_scripts.md",
        "docs/conversion.md",
        "docs/kernels.md",
        "benchmarks/README.md",
    )
    assert count or page in without


@pytest.mark.parametrize("page", PAGES)
def test_autopar_commands(page: str, workplace: Path) -> None:
    root = typer.main.get_command(app)
    for arguments in commands(page_text(page), "autopar"):
        # seconds each, or run in tests/dist/test_serve.py; options must still be right
        if "examples/gpt2.py" in arguments or arguments[0] == "serve":
            command = root.commands[arguments[0]]  # type: ignore[attr-defined]
            command.make_context(arguments[0], arguments[1:])
            continue
        if arguments[0] == "cluster":  # measures; run in tests/unit/test_measure.py
            context = root.commands["cluster"].make_context("cluster", list(arguments[1:]))  # type: ignore[attr-defined]
            Path(context.params["output"]).write_text(ClusterInfo.of("2", "cpu").to_yaml())
            continue
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"autopar {shlex.join(arguments)}: {result.output}"


def test_readme_runs_the_cheap_example() -> None:
    assert any("examples/mlp.py" in c for c in commands(page_text("README.md"), "autopar"))


def test_all_options_of_auto_engine_are_listed() -> None:
    rows = re.findall(r"^\| `(\w+)=` \|", page_text("docs/options.md"), re.MULTILINE)
    parameters = inspect.signature(auto_engine).parameters.values()
    assert sorted(rows) == sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    text = page_text(page)
    named = {words[0] for words in commands(text, "make")}
    named |= {c.removeprefix("make ") for c in _CODE.findall(text) if c.startswith("make ")}
    assert named <= make_targets()


@pytest.mark.parametrize("page", PAGES)
def test_files_exist(page: str) -> None:
    assert missing_files(page_text(page), (ROOT / page).parent) == []


@pytest.mark.parametrize("page", PAGES)
def test_errors_are_those_of_the_package(page: str) -> None:
    assert unknown_errors(page_text(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_cluster_files_load(page: str, tmp_path: Path) -> None:
    for block in blocks(page_text(page)):
        if block.language == "yaml":
            (tmp_path / "cluster.yaml").write_text(block.text)
            ClusterInfo.load(tmp_path / "cluster.yaml")


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_import_what_exists(path: str) -> None:
    """Running all of them takes a minute; their imports from autopar are checked at once."""
    for node in ast.walk(ast.parse(page_text(f"examples/{path}"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autopar"):
            module = importlib.import_module(node.module or "")
            absent = [a.name for a in node.names if not hasattr(module, a.name)]
            assert not absent, f"examples/{path}:{node.lineno}: {node.module} has no {absent}"


# -- the checks themselves can fail -------------------------------------------------------------


def test_a_wrong_output_is_seen() -> None:
    page = "```python\nprint(1)\n```\n\n```text output\n2\n```\n"
    with pytest.raises(AssertionError, match="differs"):
        run_python(page, "page")


def test_a_failing_snippet_is_seen() -> None:
    with pytest.raises(ZeroDivisionError):
        run_python("```python\n1 / 0\n```\n", "page")


def test_missing_files_and_names_are_seen() -> None:
    plan = "`autopar/plan.py::Nothing` `autopar/plan.py::ShardingPlan`"
    missing = missing_files(f"[a](nowhere.md) [b](LICENSE) `autopar/none.py` {plan}", ROOT)
    assert missing == ["nowhere.md", "autopar/none.py", "autopar/plan.py::Nothing"]


def test_an_error_in_other_words_is_seen() -> None:
    known = "parameter ... of a lazy module has no shape yet"
    page = f"```text error\n{known}\nparameter ... of a lazy module is missing\n```\n"
    assert unknown_errors(page) == ["parameter ... of a lazy module is missing"]


def test_an_unknown_option_is_seen() -> None:
    assert CliRunner().invoke(app, ["plan", "examples/mlp.py", "--meshes", "4"]).exit_code == 2
