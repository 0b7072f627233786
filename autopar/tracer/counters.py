"""Whether an instruction reads a number only to count on: `self.calls += 1`."""

from __future__ import annotations

import ast
import linecache
from functools import lru_cache
from types import CodeType

from autopar.tracer.source import position_of


def only_counts(code: CodeType, instruction: int, name: str) -> bool:
    """Whether an attribute that is read there goes, plus or minus a constant, into itself alone.

    Args:
        instruction: offset of the one that reads `name`.
    """
    where = position_of(code, instruction)
    return where is not None and (name, *where) in _counting(code.co_filename)


@lru_cache(maxsize=64)
def _counting(file: str) -> frozenset[tuple[str, int, int]]:
    """Attributes in the statements of a file that count: name, line and column."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign):
            target, read, change, op = node.target, node.target, node.value, node.op
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            if len(node.targets) != 1:
                continue
            target, read = node.targets[0], node.value.left  # type: ignore[assignment]
            change, op = node.value.right, node.value.op
        else:
            continue
        constant = isinstance(change, ast.Constant) and type(change.value) in (int, float)
        if not constant or not isinstance(op, ast.Add | ast.Sub):
            continue
        if not isinstance(target, ast.Attribute) or not isinstance(read, ast.Attribute):
            continue
        if target.attr == read.attr and ast.dump(target.value) == ast.dump(read.value):
            found.add((read.attr, read.lineno, read.col_offset))
    return frozenset(found)
