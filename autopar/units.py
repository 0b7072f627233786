"""Sizes as people read them."""


def format_bytes(nbytes: float) -> str:
    """`1536` to `"1.5 KiB"`: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1000 or unit == "GiB":
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable: GiB ends the loop")
