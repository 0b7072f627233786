"""Triton kernels that a pass may put in the place of ATen operators.

Importing this package needs no Triton. `layer_norm` holds the kernels and imports it;
`substitute` holds the pass and asks here first.
"""

from functools import cache

__all__ = ["kernels_run_on", "triton_available"]


@cache
def triton_available() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def kernels_run_on(device_type: str) -> bool:
    """Whether the kernels can run on this type of device.

    They run on GPUs, and on the CPU when Triton interprets (`TRITON_INTERPRET=1`), which is for
    tests: it is orders of magnitude slower than ATen.
    """
    if device_type not in ("cuda", "cpu") or not triton_available():
        return False
    import triton

    return device_type == "cuda" or bool(triton.knobs.runtime.interpret)
