"""Lines of the user's code: which one runs, which one failed, and what a branch there does."""

from __future__ import annotations

import ast
import linecache
import sys
import sysconfig
import traceback
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType

_OWN_FRAMES = ("/torch/", "/autopar/", "<string>", "<eval_with_key>", "<frozen", "/numpy/")
_PYTHON = sysconfig.get_paths()["stdlib"]


def is_users(filename: str) -> bool:
    """Whether a frame of this file is neither Python's, torch's, numpy's nor ours."""
    if filename.startswith(_PYTHON) and "-packages" not in filename:
        return False
    return not any(part in filename for part in _OWN_FRAMES)


@dataclass(frozen=True)
class SourceLine:
    """A line of source code; `text` is stripped of indentation."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _source_line(file: str, line: int) -> SourceLine:
    return SourceLine(file, line, linecache.getline(file, line).strip())


def user_frame() -> FrameType | None:
    """The innermost frame of the user's code on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def current_line() -> SourceLine:
    """The user's line that is being executed."""
    frame = user_frame()
    if frame is None:
        return SourceLine("unknown source", 0, "")
    return _source_line(frame.f_code.co_filename, frame.f_lineno)


def failing_line(error: BaseException) -> SourceLine | None:
    """The innermost line of the user's code that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if is_users(f.filename)]
    return _source_line(own[-1].filename, own[-1].lineno or 0) if own else None


def harmless_side(frame: FrameType | None) -> bool | None:
    """The value of the tested tensor that raises nothing.

    For an `assert`, or an `if` whose body only raises (after warnings perhaps), by the syntax tree.
    None if the statement does anything else.
    """
    if frame is None:
        return None
    where = _position(frame.f_code, frame.f_lasti)
    lines = linecache.getlines(frame.f_code.co_filename)
    if where is None or not lines:
        return None
    try:
        tree = ast.parse("".join(lines))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert | ast.If):
            continue
        # Python attributes a test without `and` and `or` to its statement
        entire = where == (node.lineno, node.col_offset)
        if not entire and not _covers(node.test, where):
            continue
        at = None if entire else where
        if isinstance(node, ast.Assert):
            return _polarity(node.test, at, True)
        if _only_raises(node.body):
            return _polarity(node.test, at, False)
        if node.orelse and _only_raises(node.orelse):
            return _polarity(node.test, at, True)
    return None


_Position = tuple[int, int]


def _position(code: CodeType, lasti: int) -> _Position | None:
    """Line and column of the expression that an instruction belongs to."""
    position = next(islice(code.co_positions(), lasti // 2, None), None)
    if position is None or position[0] is None or position[2] is None:
        return None
    return position[0], position[2]


def _covers(node: ast.expr, where: _Position) -> bool:
    start = (node.lineno, node.col_offset)
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return start <= where < end


def _only_raises(body: list[ast.stmt]) -> bool:
    """Whether it ends in a raise, after nothing but messages and warnings."""
    return isinstance(body[-1], ast.Raise) and all(
        isinstance(s, ast.Expr | ast.Assign | ast.Raise) for s in body
    )


def _polarity(test: ast.expr, where: _Position | None, value: bool) -> bool | None:
    """The value that the part of `test` at `where` (None: any part) has if `test` is `value`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _polarity(test.operand, where, not value)
    if isinstance(test, ast.BoolOp):
        parts = [v for v in test.values if where is None or _covers(v, where)]
        values = {_polarity(v, where, value) for v in parts}
        return values.pop() if len(values) == 1 else None
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "bool":
        return _polarity(test.args[0], where, value)
    plain = isinstance(test, ast.Call | ast.Compare | ast.Name | ast.Attribute | ast.Subscript)
    return value if plain else None
