"""Where in the user's code something happens: frames, lines, and what a branch there does."""

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
class Site:
    """A place in the source. `text` is the line, without indentation."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def _site(file: str, line: int) -> Site:
    return Site(file, line, linecache.getline(file, line).strip())


def user_frame() -> FrameType | None:
    """The innermost frame of the user's code on this thread's stack."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def current_site() -> Site:
    """The user's line that is being executed."""
    frame = user_frame()
    if frame is None:
        return Site("unknown source", 0, "")
    return _site(frame.f_code.co_filename, frame.f_lineno)


def failing_site(error: BaseException) -> Site | None:
    """The innermost line of the user's code that an exception passed through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if is_users(f.filename)]
    return _site(own[-1].filename, own[-1].lineno or 0) if own else None


def harmless_side(frame: FrameType | None) -> bool | None:
    """Which value of the tensor now being tested does not raise.

    For an `if` whose body only raises (warnings before it are fine), or an `assert`, read off the
    syntax tree; None where the statement does anything else.
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
        # a test without `and` and `or` is attributed to its statement
        whole = where == (node.lineno, node.col_offset)
        if not whole and not _covers(node.test, where):
            continue
        at = None if whole else where
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
    found = next(islice(code.co_positions(), lasti // 2, None), None)
    if found is None or found[0] is None or found[2] is None:
        return None
    return found[0], found[2]


def _covers(node: ast.expr, where: _Position) -> bool:
    start = (node.lineno, node.col_offset)
    end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
    return start <= where < end


def _only_raises(body: list[ast.stmt]) -> bool:
    """Raises in the end, and does nothing before that lasts (building a message, warning)."""
    return isinstance(body[-1], ast.Raise) and all(
        isinstance(s, ast.Expr | ast.Assign | ast.Raise) for s in body
    )


def _polarity(test: ast.expr, where: _Position | None, wanted: bool) -> bool | None:
    """The value that the part of `test` at `where` (None: any part) has if `test` is `wanted`."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _polarity(test.operand, where, not wanted)
    if isinstance(test, ast.BoolOp):
        parts = [v for v in test.values if where is None or _covers(v, where)]
        found = {_polarity(v, where, wanted) for v in parts}
        return found.pop() if len(found) == 1 else None
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "bool":
        return _polarity(test.args[0], where, wanted)
    plain = isinstance(test, ast.Call | ast.Compare | ast.Name | ast.Attribute | ast.Subscript)
    return wanted if plain else None
