"""Times, sizes, counts and meshes as text for people."""

import math
from collections.abc import Sequence


def time_text(us: float) -> str:
    """`15.9 ms`: three digits."""
    return _scaled(us, (("us", 1.0), ("ms", 1e3), ("s", 1e6)))


_BYTES = (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20), ("GiB", 2.0**30))


def bytes_unit(nbytes: float) -> tuple[str, float]:
    """The unit in which so many bytes are written, and its bytes."""
    return next((u for u in _BYTES if abs(nbytes) < 999.5 * u[1]), _BYTES[-1])


def bytes_text(nbytes: float) -> str:
    """`1.26 GiB`: three digits."""
    return _scaled(nbytes, _BYTES)


def budget_text(nbytes: float) -> str:
    """`709 KiB (726016 bytes)`, as refusals name a budget."""
    return f"{bytes_text(nbytes)} ({nbytes:.0f} bytes)"


def bytes_up(nbytes: float) -> float:
    """The next number of bytes whose text says no less."""
    _, scale = bytes_unit(nbytes)
    x = nbytes / scale
    digits = 0 if x <= 0 or scale == 1.0 else min(2, max(0, 2 - math.floor(math.log10(x) + 1e-9)))
    return math.ceil(x * 10**digits - 1e-9) / 10**digits * scale


def count_text(count: float) -> str:
    """`38.6 M`: three digits."""
    return _scaled(count, (("", 1.0), ("K", 1e3), ("M", 1e6), ("B", 1e9)))


def flops_text(flops: float) -> str:
    """`516 GFLOP`: three digits."""
    prefixes = ("", "K", "M", "G", "T", "P")
    return _scaled(flops, tuple((f"{p}FLOP", 1e3**i) for i, p in enumerate(prefixes)))


def percent_text(part: float, total: float) -> str:
    """`12.3%`, of a total; `-` of nothing."""
    return f"{part / total:.1%}" if total > 0 else "-"


def _scaled(x: float, units: Sequence[tuple[str, float]]) -> str:
    """In the first unit in which `x` has three digits before the point, or in the last."""
    unit, scale = next((u for u in units if abs(x) < 999.5 * u[1]), units[-1])
    return f"{_three_digits(x / scale)} {unit}".rstrip()


def _three_digits(x: float) -> str:
    if x == 0 or not math.isfinite(x):
        return f"{x:.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(x)) + 1e-9))
    return f"{x:.{min(digits, 2)}f}" if x != round(x) else f"{x:.0f}"


def mesh_text(mesh: Sequence[int], axis_names: Sequence[str] = ()) -> str:
    """`2x8`, or `node=2,gpu=8` if the axes have names."""
    if axis_names:
        return ",".join(f"{n}={size}" for n, size in zip(axis_names, mesh, strict=True))
    return "x".join(map(str, mesh))
