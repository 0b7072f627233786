"""Every case, by name."""

from tests.scripts import (  # noqa: F401 (each registers its cases)
    capture,
    identity,
    lowering,
    modes,
    optimizers,
    ranks,
    results,
    saving,
    side_effects,
    structure,
)
from tests.scripts.case import CASES

# Programs that broke a stage of the compiler. What breaks one process may work on several.
PROGRAMS = [
    name
    for name, one in CASES.items()
    if one.body.__module__ in (capture.__name__, lowering.__name__)
]


def cases_on(mesh: str) -> list[str]:
    """The names of the cases to run on a mesh: one process runs the programs alone."""
    return PROGRAMS if mesh == "1" else list(CASES)


__all__ = ["CASES", "PROGRAMS", "cases_on"]
