"""Times, sizes and counts as people read them."""

import math


def time_text(us: float) -> str:
    """`15.9 ms`, three digits."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us < 999.5 * scale:
            return f"{_three_digits(us / scale)} {unit}"
    return f"{_three_digits(us / 1e6)} s"


def bytes_text(nbytes: float) -> str:
    """`1.26 GiB`, three digits."""
    for unit, scale in (("B", 1.0), ("KiB", 2.0**10), ("MiB", 2.0**20)):
        if nbytes < 999.5 * scale:
            return f"{_three_digits(nbytes / scale)} {unit}"
    return f"{_three_digits(nbytes / 2**30)} GiB"


def count_text(count: float) -> str:
    """`38.6 M`, three digits."""
    for unit, scale in (("", 1.0), (" K", 1e3), (" M", 1e6)):
        if count < 999.5 * scale:
            return f"{_three_digits(count / scale)}{unit}"
    return f"{_three_digits(count / 1e9)} B"


def _three_digits(x: float) -> str:
    if x == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(x)) + 1e-9))
    return f"{x:.{min(digits, 2)}f}" if x != round(x) else f"{x:.0f}"


def format_bytes(nbytes: float) -> str:
    """`1536` to `"1.5 KiB"`: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1000 or unit == "GiB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable: GiB ends the loop")
