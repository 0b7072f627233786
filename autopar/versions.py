"""The versions of torch that autopar is tested with."""

from __future__ import annotations

import functools
import re
import warnings
from importlib.metadata import PackageNotFoundError, version

OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)


def torch_version() -> str:
    """Of the torch that is installed, without importing it: `2.13.0+cpu`."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return "not installed"


@functools.cache
def warn_if_torch_is_untested(installed: str) -> None:
    """Warn, once in a process, of a torch that is newer than the newest one tested."""
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST_TORCH:
        return
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_TORCH, NEWEST_TORCH))
    warnings.warn(
        f"autopar is tested with torch {oldest} to {newest}, and this is {installed}; it uses "
        f"private interfaces of torch, which may have changed. Install torch {newest} if "
        "something fails",
        stacklevel=3,
    )
