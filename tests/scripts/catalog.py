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
)  # fmt: skip
from tests.scripts.case import CASES

__all__ = ["CASES"]
