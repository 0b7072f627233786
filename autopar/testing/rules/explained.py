"""Correct strategies that the table omits on purpose, and why."""

from __future__ import annotations

import re

from autopar.testing.rules.discover import AxisStrategy

# Op and strategy (as printed), both as regular expressions, and the reason.
_REASONS = (
    (r".*", r".*\b(max|min)\b.*", "there is no layout for a maximum or minimum over ranks"),
    (
        r".*_norm.*|.*conv.*",
        r"R, P, .*|R, P -> P",
        "weight and bias are parameters, which are never pending sums",
    ),
    (
        r".*(broadcast_tensors|meshgrid).*",
        r".* -> (.*R, P.*|.*P, R.*)",
        "all results of an op are pending sums, or none",
    ),
    (
        r".*(type_as|new_\w+).*",
        r"(.*, )?(P|S\d) -> .*",
        "only the operand's dtype is read: one layout of it suffices",
    ),
    (r".*nextafter.*", r".*P.*", "the result differs from an operand in its last bit only"),
    (r".*xlog1?p?y.*", r"P.* -> P", "0 log 0 is 0, but terms of that 0 give infinities"),
    (r".*slice_scatter.*", r"(S\d), \1 -> \1", "what is written replaces the entire tensor"),
    (r".*roll.*", r"(S\d) -> \1", "the dim is rolled by zero"),
    (r".*_pool.*", r"(S\d) -> \1", "ceil mode without a remainder to round up"),
    (r".*im2col.*", r"S2 -> S2", "windows of a single row, which are a view"),
    (r".*ctc_loss.*", r"S1, S0, S0, S0 -> .*", "targets without padding, all equally long"),
    (
        r"autopar\.packed_.*",
        r"R, S0, (S0|-) -> S\d|S0, R, S1 -> S1",
        "the parts are read one by one: if split, each would be on some ranks only",
    ),
    (
        r".*tri[lu].*",
        r"(S\d) -> \1",
        "a diagonal outside of the matrix: the op keeps everything or nothing",
    ),
)


def why_omitted(name: str, strategy: AxisStrategy) -> str | None:
    """The reason why an op's rule omits a strategy; None if there is none."""
    for op, pattern, reason in _REASONS:
        if re.fullmatch(op, name) and re.fullmatch(pattern, str(strategy)):
            return reason
    return None
